"""Gradient checkpointing: keep what went into a block, and compute the block again when its gradient is asked for.

    forward     y = block(x); of each tensor that autograd would keep, its number is kept instead
    backward    at the first number that is asked for, y is computed again with the generators as they were then, and what is
                to be kept is kept under its number until the backward has used it

Of n blocks, the activations of one are alive at a time, beside n inputs (arXiv 1604.06174 keeps every √n-th; here each block
keeps its own).  In a Llama each half of a layer, attention and MLP, is a block here: of L layers about 2L inputs are kept.

The price is a second forward.  A weight that is trained takes part in three products (forward, ∂x, ∂W), and the fourth is a
third more; a frozen one has no ∂W, so there it is about half as many again.  Not all of it is made twice.  The second forward
ends where the last tensor to be kept is there: what follows it, such as a block's last base product, is not computed again.
And what is dear to make but small is `remembered`: of attention its result (arXiv 2205.05198, section 5, "selective"
recomputation).

Two ways to keep less still, for long notes.  What lies on a GPU between forward and backward can lie in host memory instead
(`on_host`).  And a block that treats each row by itself, as an MLP does, needs the activations of some rows at a time alone
(`recompute_rows`; arXiv 2305.19370 cuts the feed-forward network like that).

``torch.utils.checkpoint(use_reentrant=False)`` does the same, and gives the same gradients (tests/llama/test_recompute.py).  It
asks torch's compiler about its state, and so imports it: more than a second, and 130 MB that stay (torch 2.13).

Lesson 13 explains it.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_local = threading.local()


class _Enough(Exception):
    """All that is to be kept is there."""


class _Held(torch.autograd.Function):
    """Keeps tensors as autograd does, so that whoever counts or moves what is kept meets them."""

    @staticmethod
    def forward(ctx: Any, always: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return always.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise AssertionError("nothing is computed from it")


def _hold(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    held = _Held.apply(torch.empty(0, device="cpu", requires_grad=True), *(tensor.detach() for tensor in tensors))
    return lambda: held.grad_fn.saved_tensors     # through the tensor: where it dies, older versions of torch free what is kept


def _on_host(x: Tensor) -> Tensor:
    """A copy in host memory: from a GPU in pages that it reads and writes by itself, while the processor goes on.

    Trap: such a copy is there only when the GPU's stream has come to it; so what brings it back must be of the same stream.
    """
    return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda).copy_(x.detach(), non_blocking=True)


class _Recomputed:
    """One call of a block: what is needed to make it again, and, while its backward runs, what it made."""

    def __init__(self, block: Callable[[Tensor], Tensor], x: Tensor, on_host: bool) -> None:
        self.block, self.needs_grad = block, x.requires_grad
        self.input = _hold(_on_host(x) if on_host else x)
        self.fresh: list[tuple[Tensor, ...]] = []
        self.remembered: list[Callable[[], tuple[Tensor, ...]]] = []
        self.recalled: Iterator[Callable[[], tuple[Tensor, ...]]] | None = None     # while the block is computed again
        self.device = x.device
        self.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        self.cpu_random = torch.get_rng_state()
        self.cuda_random = torch.cuda.get_rng_state(x.device) if x.is_cuda else None
        self.numbers = 0
        self.made: dict[int, Tensor] = {}

    def number(self, _: Tensor) -> int:
        self.numbers += 1
        return self.numbers - 1

    def tensor(self, number: int) -> Tensor:
        if number not in self.made:
            self.make_again()
        return self.made.pop(number)

    def make_again(self) -> None:
        x = self.input()[0].to(self.device, non_blocking=True)
        self.made.clear()
        count = 0

        def keep(tensor: Tensor) -> None:
            nonlocal count
            self.made[count] = tensor.detach()
            count += 1
            if count == self.numbers:
                raise _Enough

        enabled, dtype = self.autocast
        # Dropout must zero what it zeroed before; afterwards the generators go on from where they are now.
        with torch.random.fork_rng(devices=[self.device] if self.cuda_random is not None else []):
            torch.set_rng_state(self.cpu_random)
            if self.cuda_random is not None:
                torch.cuda.set_rng_state(self.cuda_random, self.device)
            with (torch.enable_grad(), torch.autocast(self.device.type, dtype, enabled), saved_tensors_hooks(keep, _never)):
                self.recalled = iter(self.remembered)
                try:
                    with _calling(self):
                        self.block(x.detach().requires_grad_(self.needs_grad))
                except _Enough:
                    return
        raise AssertionError(f"a block that keeps {self.numbers} tensors kept {count} the second time: it isn't the same twice")


@contextmanager
def _calling(call: _Recomputed) -> Iterator[None]:
    outer, _local.call = getattr(_local, "call", None), call
    try:
        yield
    finally:
        _local.call = outer


def _never(_: None) -> Tensor:
    raise AssertionError("a block that is recomputed takes no gradients inside")


def recompute(block: Callable[[Tensor], Tensor], x: Tensor, on_host: bool = False) -> Tensor:
    """``block(x)``, whose inner activations are not kept for backward but computed again.

    Args: block: from one tensor to one; what else it needs it holds. x: any shape. on_host: keep x in host memory.
    Guarantee: the gradients of ``torch.utils.checkpoint``, to the bit, dropout included (tests/llama/test_recompute.py).
    """
    call = _Recomputed(block, x, on_host)
    with _calling(call), saved_tensors_hooks(call.number, call.tensor):
        y = block(x)
    call.remembered = [_hold(*made) for made in call.fresh]     # outside: beside what the block keeps, not one of its numbers
    call.fresh.clear()
    return y


def recompute_rows(block: Callable[[Tensor], Tensor], x: Tensor, rows: int, on_host: bool = False) -> Tensor:
    """`recompute` of at most so many rows at a time, where a row's result hangs on no other row.

    Args: block: (n, width) -> (n, width), and of x's shape. x: (..., width). rows: of x seen as (rows, width).
    Guarantee: the values of `recompute`; gradients of what the block holds are summed part by part, which rounds them another
        way (tests/llama/test_recompute.py).
    """
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) <= rows:
        return recompute(block, x, on_host)
    return torch.cat([recompute(block, part, on_host) for part in flat.split(rows)]).view(x.shape)


def remembered(make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """``make()``; within `recompute` its result is kept, and made once.

    Args: make: a computation without a graph, the same both times.
    """
    call: _Recomputed | None = getattr(_local, "call", None)
    if call is None:
        return make()
    if call.recalled is not None:
        return tuple(tensor.detach() for tensor in next(call.recalled)())      # what gets a graph here is not what is held
    call.fresh.append(make())
    return call.fresh[-1]
