"""A tensor that lies in a mapped file: have its pages read before they are needed, and let go of them behind that.

A page that the system holds already is mapped in a hundredth of the time that copying it takes, and at once by whoever computes
with it.  One that it doesn't hold is waited for: so the reading is begun while the tensor before is still computed with.
"""
from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import cache

from torch import Tensor

WILLNEED, DONTNEED = 3, 4               # the same numbers on every system that has the call


def read_early(tensor: Tensor) -> None:
    """Have the disk read what of a tensor isn't in the system's memory; returns when nearly all of it was asked for."""
    storage = tensor.untyped_storage()
    start = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(start, storage.data_ptr() + storage.nbytes() - start, WILLNEED)


def let_go(tensor: Tensor) -> None:
    """Take a tensor's pages out of this process's memory; a touch brings them back, as the file has them."""
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    _advise(start, (storage.data_ptr() + storage.nbytes() - start) // mmap.PAGESIZE * mmap.PAGESIZE, DONTNEED)


def _advise(start: int, length: int, advice: int) -> None:
    """A hint, which a system may not know."""
    madvise = _madvise()
    if madvise is not None and length > 0:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


@cache
def _madvise() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if os.name == "posix" else None
