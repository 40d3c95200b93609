"""AdamW whose moments lie in pages, of which a budget's worth is in fast memory.

AdamW treats every element alike and alone, so a parameter may be updated a piece at a time: the optimizer goes through the
pages, and updates of each parameter the elements whose moments lie there.

    32 bits     a page of P bytes holds m and v of P / 8 elements: m first, then v, float32
    8 bits      of 256 · ⌊P / 520⌋ elements: codes of m, codes of v, then a constant of each for every 256 elements;
                parameters of fewer than 4,096 elements stay in 32 bits, as in bitsandbytes

Parameters follow one another without gaps, small ones share a page, large ones span many; in 8 bits each begins a block of
its own.  Every step turns the order round (`in_order`).  The result does not depend on pages, budget or backing: float32
parameters equal ``torch.optim.AdamW(foreach=False, fused=False)`` to the bit.

Lesson 12 explains it.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minilora.errors import CheckpointError, ConfigError
from minilora.llama.safetensors_file import Pending, TensorEntry, read_tensor
from minilora.optim import adamw
from minilora.optim.adamw import (
    BLOCKSIZE_8BIT,
    AdamW,
    Moments8bit,
    Update,
    adamw_update,
    adamw_update_8bit,
    adamw_updates,
    refuse_sparse,
)
from minilora.optim.paged import PAGE_BYTES, Pager, PagerCounters, in_order

SMALLEST_8BIT = 4096                                    # elements of a parameter whose moments are worth rounding
LARGEST_8BIT = 1e18                                     # of a gradient: its square is far from float32's largest number
BLOCK_BYTES = 2 * BLOCKSIZE_8BIT + 2 * 4                # both moments' codes and constants
PAGES_TOGETHER = 8                                      # whose parameters a GPU updates as one
MOMENTS = ("exp_avg", "exp_avg_sq")
# What is kept of a parameter: name, type, and how many elements share an entry.
FIELDS: dict[int, tuple[tuple[str, torch.dtype, int], ...]] = {
    32: (("exp_avg", torch.float32, 1), ("exp_avg_sq", torch.float32, 1)),
    8: (("exp_avg", torch.uint8, 1), ("exp_avg_sq", torch.uint8, 1),
        ("exp_avg_absmax", torch.float32, BLOCKSIZE_8BIT), ("exp_avg_sq_absmax", torch.float32, BLOCKSIZE_8BIT)),
}


@dataclass(frozen=True)
class _Piece:
    """Elements `start` to `stop` of a parameter, whose moments lie in `page` from its element `at` on."""

    param: Tensor
    start: int
    stop: int
    page: int
    at: int


class _Region:
    """Pages of one form: which elements lie where."""

    def __init__(self, pager: Pager, bits: int) -> None:
        self.pager, self.bits = pager, bits
        self.capacity = pager.page_bytes // 8 if bits == 32 else pager.page_bytes // BLOCK_BYTES * BLOCKSIZE_8BIT
        self.page, self.filled = -1, self.capacity          # elements taken in the last page

    def place(self, param: Tensor) -> list[_Piece]:
        """Find room for a parameter's moments, behind those placed before."""
        if self.bits == 8:
            self.filled = -(-self.filled // BLOCKSIZE_8BIT) * BLOCKSIZE_8BIT
        left = param.numel() - (self.capacity - self.filled)
        first = self.pager.grow(-(-left // self.capacity)) if left > 0 else 0
        pieces, start = [], 0
        while start < param.numel():
            if self.filled == self.capacity:
                self.page, self.filled, first = first, 0, first + 1
            stop = min(param.numel(), start + self.capacity - self.filled)
            pieces.append(_Piece(param, start, stop, self.page, self.filled))
            self.filled += stop - start
            start = stop
        return pieces

    def moments(self, page: Tensor, piece: _Piece) -> tuple[Tensor, Tensor] | Moments8bit:
        """The piece's moments within the bytes of its page."""
        count, n = piece.stop - piece.start, self.capacity
        if self.bits == 32:
            both = page[: 8 * n].view(torch.float32)
            return both[piece.at : piece.at + count], both[n + piece.at : n + piece.at + count]
        constants = page[2 * n : 2 * n + 8 * (n // BLOCKSIZE_8BIT)].view(torch.float32)
        block, blocks = piece.at // BLOCKSIZE_8BIT, -(-count // BLOCKSIZE_8BIT)
        second = n // BLOCKSIZE_8BIT + block
        return Moments8bit(page[piece.at : piece.at + count], page[n + piece.at : n + piece.at + count],
                           constants[block : block + blocks], constants[second : second + blocks])


class StoredState(Mapping[int, dict[str, Tensor]]):
    """The state of a `PagedAdamW` in a file: index of a parameter -> its tensors, read when they are asked for.

    Args: entries: of the file that `PagedAdamW.stored_state` was written to.
    """

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self._entries: dict[int, dict[str, TensorEntry]] = {}
        for key, entry in entries.items():
            index, _, name = key.partition(".")
            self._entries.setdefault(int(index), {})[name] = entry

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: read_tensor(entry) for name, entry in self._entries[index].items()}

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class PagedAdamW(AdamW):
    """AdamW over a pager; its ``state_dict`` has torch's format.

    Args:
        params: parameters or groups, all on one device; float32, or 16-bit, whose moments are float32 all the same.
        lr, betas, eps, weight_decay: as in `AdamW`.
        state_bits: 32, or 8 for moments in 8 bits.
        page_bytes, resident_bytes, backing, folder: of the `Pager`; 128 MiB resident by default.

    Raises: ConfigError: an argument; parameters or gradients of another kind; with 8 bits, before anything is changed, a
        gradient that is not finite. OutputError: the page file has no room, or failed.
    Guarantee: torch's bits, whatever pages, budget and backing (tests/optim/test_paged_adamw.py).
    """

    TYPES = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, state_bits: Literal[32, 8] = 32, page_bytes: int = PAGE_BYTES,
                 resident_bytes: int = 64 * PAGE_BYTES, backing: Literal["host", "disk"] = "host",
                 folder: str | Path | None = None) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
        if state_bits not in (32, 8):
            raise ConfigError(f"state_bits must be 32 or 8, not {state_bits!r}")
        devices = {param.device for group in self.param_groups for param in group["params"]}
        if len(devices) != 1:
            raise ConfigError(f"the pages lie beside the parameters, so these must be on one device, not on "
                              f"{', '.join(sorted(map(str, devices)))}")
        self.pager = Pager(page_bytes, resident_bytes, backing, devices.pop(), folder)
        self._state_bits: int = state_bits
        self._regions: dict[int, _Region] = {bits: _Region(self.pager, bits) for bits in {32, self._state_bits}}
        self._steps: dict[Tensor, int] = {}
        self._places: dict[Tensor, list[_Piece]] = {}
        self._on_page: dict[int, list[_Piece]] = {}
        self._backwards = False
        self._place_all()

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError("a PagedAdamW cannot be copied or pickled, as its moments lie in pages: make another one and give it "
                          "the state_dict of this one")

    @property
    def counters(self) -> PagerCounters:
        """Faults, evictions, bytes and waiting so far."""
        return self.pager.counters

    def evict(self) -> int:
        """Write all pages back and release their fast memory; returns its bytes."""
        return self.pager.evict()

    def _bits(self, param: Tensor) -> int:
        return self._state_bits if param.numel() >= SMALLEST_8BIT else 32

    def _place_all(self) -> None:
        for param in self._parameters():
            if param not in self._places:
                self._places[param] = self._regions[self._bits(param)].place(param)
                for piece in self._places[param]:
                    self._on_page.setdefault(piece.page, []).append(piece)

    @torch.no_grad()
    def update(self) -> None:
        """Update every parameter that has a gradient; the others keep their step count, and their pages stay where they are."""
        self._place_all()       # groups may have been added
        groups = {param: group for group in self.param_groups for param in group["params"] if param.grad is not None}
        self._check_gradients(groups)
        for param in groups:
            self._steps[param] = self._steps.get(param, 0) + 1
        flat = {param: (param.detach().reshape(-1), param.grad.reshape(-1)) for param in groups}
        pages = [page for page in sorted(self._on_page) if any(piece.param in groups for piece in self._on_page[page])]
        at_once = min(PAGES_TOGETHER, self.pager.most_frames // 2) if self.pager.device.type in adamw.TOGETHER_ON else 1
        waiting: list[Update] = []
        for number, (page, ahead) in enumerate(in_order(pages, self._backwards)):
            # Trap: a page is put out when it is the least recently used one, and not before: half of them may wait.
            if number % at_once == 0:
                adamw_updates(waiting)
                waiting.clear()
            content = self.pager.use(page, ahead)
            for piece in self._on_page[page]:
                if piece.param in groups:
                    values, grads = (tensor[piece.start : piece.stop] for tensor in flat[piece.param])
                    waiting += self._update(piece, content, values, grads, groups[piece.param])
        adamw_updates(waiting)
        for param, (values, _) in flat.items():
            if values.data_ptr() != param.data_ptr():       # it does not lie in memory in one piece: a copy was updated
                param.copy_(values.view_as(param))
        self._backwards = not self._backwards

    def _check_gradients(self, params: Iterable[Tensor]) -> None:
        """Before anything is changed: what no moment in 8 bits could hold would be found when half of them are."""
        for param in params:
            refuse_sparse(param)
        sizes = [param.grad.abs().amax().float() for param in params if param.grad is not None and self._bits(param) == 8]
        if sizes and not bool((torch.stack(sizes) < LARGEST_8BIT).all()):
            raise ConfigError("a gradient holds a NaN, or numbers whose squares are infinite, which moments in 8 bits cannot "
                              "hold; nothing was changed: a lower learning rate keeps training from it")

    def _update(self, piece: _Piece, content: Tensor, values: Tensor, grads: Tensor, group: dict[str, Any]) -> list[Update]:
        """Update a piece, or say what there is to do, where that can wait for others."""
        exact, grad = values.float(), grads.float()         # themselves, where they are float32
        moments = self._regions[self._bits(piece.param)].moments(content, piece)
        rest = (self._steps[piece.param], group["lr"], group["betas"], group["eps"], group["weight_decay"])
        if isinstance(moments, Moments8bit):
            adamw_update_8bit(exact, grad, moments, *rest)
        elif exact is values:
            return [Update(exact, grad, *moments, *rest)]
        else:
            adamw_update(exact, grad, *moments, *rest)
        if exact is not values:
            values.copy_(exact)
        return []

    def _moments(self, param: Tensor, write: bool) -> Iterator[tuple[_Piece, Sequence[Tensor]]]:
        """Each piece of a parameter with its moments, valid until the next is asked for."""
        pieces = self._places[param]
        for piece, following in zip_longest(pieces, pieces[1:]):
            content = self.pager.use(piece.page, following.page if following else None, write)
            yield piece, self._regions[self._bits(param)].moments(content, piece)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        """Step and moments of a parameter that was updated before, copied out of the pages."""
        fields = FIELDS[self._bits(param)]
        state = {name: torch.empty(-(-param.numel() // share), dtype=dtype, device=param.device)
                 for name, dtype, share in fields}
        for piece, moments in self._moments(param, write=False):
            for (name, _, share), moment in zip(fields, moments, strict=True):
                state[name][piece.start // share : -(-piece.stop // share)] = moment
        if self._bits(param) == 32:
            state = {name: moment.view(param.shape) for name, moment in state.items()}
        return {"step": torch.tensor(float(self._steps[param]), dtype=torch.float32, device="cpu"), **state}

    def _updated(self) -> list[tuple[int, Tensor]]:
        return [(index, param) for index, param in enumerate(self._parameters()) if param in self._steps]

    def state_dict(self) -> dict[str, Any]:
        """torch's format: step, exp_avg and exp_avg_sq of each parameter, copied out of the pages: all of it, in memory.

        Moments in 8 bits are flat codes, with their constants as exp_avg_absmax and exp_avg_sq_absmax.
        """
        packed = super().state_dict()
        packed["state"] = {index: self._state_of(param) for index, param in self._updated()}
        return packed

    def stored_state(self) -> list[Pending]:
        """The same tensors, each made when it is written, as "<index>.<name>"; `StoredState` reads them back."""
        def pending(index: int, param: Tensor, name: str, dtype: torch.dtype, size: int) -> Pending:
            return Pending(f"{index}.{name}", dtype, (size,), lambda: self._state_of(param)[name].reshape(-1))

        return [pending(index, param, name, dtype, -(-param.numel() // share)) for index, param in self._updated()
                for name, dtype, share in (*FIELDS[self._bits(param)], ("step", torch.float32, param.numel()))]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of torch's AdamW, or of this one in 32 or 8 bits; it is rounded or decoded where the form differs.

        Its ``state`` may be a `StoredState`, which is then in memory a parameter at a time.

        Raises: ValueError: groups of other sizes (from torch). CheckpointError: a moment does not fit its parameter.
        """
        saved = state_dict["state"]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, param in zip(indices, self._parameters(), strict=False):
            _check_fit(saved.get(index), param)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._place_all()
        self._steps = {}
        for index, param in zip(indices, self._parameters(), strict=True):
            state = saved.get(index)
            if state:
                self._steps[param] = int(state["step"])
            self._load(param, state or {})

    def _load(self, param: Tensor, state: dict[str, Tensor]) -> None:
        fields, given = FIELDS[self._bits(param)], {name: moment.to(param.device).flatten() for name, moment in state.items()}
        if state and len(fields) == 2 and "exp_avg_absmax" in state:
            given.update(zip(MOMENTS, Moments8bit(*(given[name] for name, _, _ in FIELDS[8])).decode(), strict=True))
        for piece, moments in self._moments(param, write=True):
            if isinstance(moments, Moments8bit) and state and "exp_avg_absmax" not in state:
                moments.encode(*(given[name][piece.start : piece.stop].float() for name in MOMENTS))
                continue
            for (name, _, share), moment in zip(fields, moments, strict=True):
                if state:
                    moment.copy_(given[name][piece.start // share : -(-piece.stop // share)])
                else:
                    moment.zero_()

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]


def _check_fit(state: dict[str, Tensor] | None, param: Tensor) -> None:
    if not state:
        return
    fields = FIELDS[8 if "exp_avg_absmax" in state else 32]
    if "step" not in state or any(name not in state or state[name].numel() != -(-param.numel() // share) or (
            share == 1 and state[name].dim() > 1 and state[name].shape != param.shape) for name, _, share in fields):
        raise CheckpointError(f"the optimizer's state does not fit a parameter of {tuple(param.shape)}; it is of another "
                              "model, or of other LoRA settings")
