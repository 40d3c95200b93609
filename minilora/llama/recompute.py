"""Gradient checkpointing by hand: keep what went into a block, and compute the block again when its gradient is asked for.

    forward     y = block(x), without a graph; x and the state of the random generators are kept
    backward    the generators are put back, y is computed again with a graph, ∂L/∂y is sent through it, the graph is dropped

Of L blocks, the activations of one are alive at a time, beside L inputs, for a second forward: a third more work (arXiv
1604.06174 keeps every √L-th; here each block keeps its own input).  The model uses ``torch.utils.checkpoint`` in its
non-reentrant form, which gives the same gradients (tests/llama/test_recompute.py) and stops a recomputation early; this is the
idea, to be read.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: Callable[[Tensor], Tensor], always: Tensor, x: Tensor) -> Tensor:
        ctx.block = block
        ctx.cpu_random = torch.get_rng_state()
        ctx.cuda_random = torch.cuda.get_rng_state(x.device) if x.is_cuda else None
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor | None]:
        grad_y, = grads
        x, = ctx.saved_tensors
        again = x.detach().requires_grad_(x.requires_grad)
        # Dropout must zero what it zeroed before; afterwards the generators go on from where they are now.
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():
            torch.set_rng_state(ctx.cpu_random)
            if ctx.cuda_random is not None:
                torch.cuda.set_rng_state(ctx.cuda_random, x.device)
            y = ctx.block(again)
        torch.autograd.backward(y, grad_y)          # the block's parameters collect theirs on the way
        return None, None, again.grad


def recompute(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``block(x)``, whose inner activations are not kept for backward but computed again.

    Args: block: from one tensor to one; what else it needs it holds. x: any shape.
    Guarantee: the gradients of ``torch.utils.checkpoint``, to the bit, dropout included (tests/llama/test_recompute.py).
    """
    # Trap: autograd skips a function none of whose inputs needs a gradient, and the first block's doesn't where embeddings are
    # frozen: its adapters would train nothing.  So one input always does.
    return _Recomputed.apply(block, torch.empty(0, requires_grad=True), x)
