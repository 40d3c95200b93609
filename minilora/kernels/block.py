"""The vector code of `block_cpu.cpp`, called with tensors: what a block of a Llama does besides its linears.

`kernel()` is the compiled library, or None where there is none: without AVX-512, without a compiler (said once), or where
``MINILORA_KERNELS=reference`` asks for none.  Then the caller takes torch's operations.
"""
from __future__ import annotations

import ctypes
import os
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from minilora.kernels.build import NATIVE, BuildError, load

SOURCE = Path(__file__).with_name("block_cpu.cpp")
HEAD_DIMS = (64, 128)               # those that the attention is compiled for: whole tiles of 64


class _View(ctypes.Structure):
    """`struct View` of block_cpu.cpp."""

    _fields_ = (("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64))


class _Attention(ctypes.Structure):
    """`struct Attention` of block_cpu.cpp."""

    _fields_ = (*((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "length")), ("scale", ctypes.c_float),
                *((name, _View) for name in ("q", "k", "v", "o", "d_o", "d_q", "d_k", "d_v")), ("log_sum", ctypes.c_void_p))


def _view(x: Tensor, shape: tuple[int, ...]) -> _View:
    """Where the elements lie; C code believes what it is told, so what it can't read stops here."""
    if x.dtype != torch.bfloat16 or x.shape != shape or x.stride(-1) != 1 or x.device.type != "cpu":
        raise ValueError(f"the kernel takes bfloat16 {shape} with adjacent columns on the CPU, not {x.dtype} {tuple(x.shape)} "
                         f"with strides {x.stride()} on {x.device}")
    return _View(x.data_ptr(), *x.stride()[:3])


def _empty(batch: int, heads: int, length: int, head_dim: int) -> Tensor:
    """(B, H, T, d) that lies as (B, T, H, d), as projections want it."""
    return torch.empty(batch, length, heads, head_dim, dtype=torch.bfloat16).transpose(1, 2)


def takes_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `Kernel.attention` is made for these."""
    return (q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[-1] in HEAD_DIMS
            and q.shape[2] == k.shape[2] and q.numel() > 0)


class Kernel:
    """The compiled library.

    Args: machine: compiler flags for the instruction set.
    Raises: BuildError: it cannot be made (see `build.load`).
    """

    def __init__(self, machine: tuple[str, ...] = NATIVE) -> None:
        library = load(SOURCE, machine)
        self.works = bool(library.block_machine())              # compiled for AVX-512
        if self.works:
            self._forward, self._backward = library.block_attention, library.block_attention_backward
            for function in (self._forward, self._backward):
                function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int], None

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """softmax(q·kᵀ / √d)·v, each position over those up to its own.

        Args: q: (B, H, T, d) bfloat16. k, v: (B, Hkv, T, d), each read by H / Hkv heads of q.  d is 64 or 128 and lies side by
            side; other strides are any.
        Returns: (B, H, T, d) bfloat16, lying as (B, T, H, d), and log2 Σ exp of each row, (B, H, T) float32.
        Guarantee: computed in float32 and rounded once; a head's result depends on no other, nor on threads
            (tests/kernels/test_block.py).
        """
        o, log_sum = _empty(*q.shape), torch.empty(q.shape[:3])
        call = self._call(q, k, v, o, log_sum)
        self._forward(ctypes.byref(call), q.shape[3], torch.get_num_threads())
        return o, log_sum

    def attention_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
                           log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v.

        Args: grad: of o, (B, H, T, d) bfloat16. o, log_sum: what `attention` gave.
        Returns: three bfloat16 tensors of the shapes of q, k, v, lying as (B, T, H, d).
        Guarantee: summed in float32 and rounded once, over the heads of a group in their order; the rows' sums
            Σ grad · o take o as it was rounded, as torch's kernel does (tests/kernels/test_block.py).
        """
        found = _empty(*q.shape), _empty(*k.shape), _empty(*v.shape)
        call = self._call(q, k, v, o, log_sum)
        call.d_o = _view(grad if grad.stride(-1) == 1 else grad.contiguous(), tuple(q.shape))
        call.d_q, call.d_k, call.d_v = (_view(x, tuple(x.shape)) for x in found)
        self._backward(ctypes.byref(call), q.shape[3], torch.get_num_threads())
        return found

    @staticmethod
    def _call(q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor) -> _Attention:
        batch, heads, length, head_dim = q.shape
        kv_heads = k.shape[1]
        if head_dim not in HEAD_DIMS or heads % kv_heads:
            raise ValueError(f"the kernel takes heads of {HEAD_DIMS}, query heads a multiple of key/value heads, not {heads} "
                             f"of {head_dim} and {kv_heads}")
        if log_sum.shape != q.shape[:3] or log_sum.dtype != torch.float32 or not log_sum.is_contiguous():
            raise ValueError(f"log_sum must be contiguous float32 {tuple(q.shape[:3])}, not {log_sum.dtype} "
                             f"{tuple(log_sum.shape)}")
        shared = (batch, kv_heads, length, head_dim)
        return _Attention(batch, heads, kv_heads, length, head_dim ** -0.5, _view(q, tuple(q.shape)), _view(k, shared),
                          _view(v, shared), _view(o, tuple(q.shape)), log_sum=log_sum.data_ptr())


_lock = threading.Lock()
_tried: list[Kernel | None] = []


def kernel() -> Kernel | None:
    """The library for this machine, made at the first call, or None.

    Where none can be compiled a warning says why, once; with ``MINILORA_KERNELS=reference``, or without AVX-512, none is
    wanted, and nothing is said.
    """
    if not _tried:
        with _lock:
            if not _tried:
                _tried.append(_make())
    return _tried[0]


def _make() -> Kernel | None:
    if os.environ.get("MINILORA_KERNELS") == "reference":
        return None
    try:
        made = Kernel()
    except BuildError as error:
        warnings.warn(f"attention, norms and SwiGLU take torch's operations: {error}", RuntimeWarning, stacklevel=4)
        return None
    return made if made.works else None
