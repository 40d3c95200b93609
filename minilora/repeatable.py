"""The same bits every time on a GPU, where torch would add up in whatever order its blocks finish: attention's backward.

Determinism is a promise of `train`: one seed, one machine, one adapter.  On a CPU it costs nothing and is always so.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Inside, what runs on a GPU takes algorithms that repeat their bits; an operation that has none raises RuntimeError."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # else torch refuses products, which repeat in one stream
    deterministic: Any = torch.utils.deterministic
    filling = deterministic.fill_uninitialized_memory
    before = torch.get_deterministic_debug_mode()
    # Not `use_deterministic_algorithms`: that imports torch's compiler.  Trap: where torch is only to warn, attention still
    # takes what does not repeat.
    torch.set_deterministic_debug_mode("error")
    deterministic.fill_uninitialized_memory = False     # a check for programs that read what nobody wrote
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        deterministic.fill_uninitialized_memory = filling
