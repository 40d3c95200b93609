"""One buffer for unpacked weights, shared by all layers.

A 4-bit weight is unpacked, used in one product and dropped, layer after layer.  Fresh memory for each is the dear part: the
system hands it out page by page, filled with zeros, at a tenth of the speed at which the same bytes are written the second
time.  So every thread keeps one buffer for each device, as large as its largest layer so far, and unpacks all weights into it.

Trap: what `borrow` returns is overwritten by the next call.  It must not be saved for backward, returned, or be a view of
anything that is; `layers.nf4_linear` uses it within one product (tests/layers/test_scratch.py).

Lessons 07 and 17 explain it.
"""
from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

_local = threading.local()


def borrow(shape: torch.Size, dtype: torch.dtype, device: torch.device, use: str = "weight") -> Tensor:
    """A contiguous tensor with arbitrary content, valid until the thread's next call for the same use.

    Off the CPU it is a new tensor: there torch keeps freed memory itself, and knows which stream still reads it.  So it is in
    what `torch.compile` traces, which makes views of the buffer anew, and not always of the shape that was asked for.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    size = prod(shape) * dtype.itemsize
    held = vars(_local).get(use)
    if held is None or held.numel() < size:
        held = _local.__dict__[use] = None  # free the smaller one before the larger is made
        with torch.inference_mode(False):   # a tensor born in inference mode could not be used outside it
            held = _local.__dict__[use] = torch.empty(size, dtype=torch.uint8, device="cpu")
    made: Tensor = held[:size].view(dtype).view(shape)
    return made


def release() -> None:
    """Give this thread's buffers back; the next `borrow` makes a new one."""
    vars(_local).clear()


def held_bytes() -> int:
    """Size of this thread's buffers."""
    return sum(held.numel() for held in vars(_local).values())
