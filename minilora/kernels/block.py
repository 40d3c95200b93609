"""The vector code of `block_cpu.cpp` and `block_attention.cpp`, called with tensors: a block of a Llama besides its linears.

`kernel()` is the compiled library, or None where there is none: without AVX-512, without a compiler (said once), or where
``MINILORA_KERNELS=reference`` asks for none.  Then the caller takes torch's operations.
"""
from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from minilora.kernels.block_calls import Attention, Layer, Norm, Query, Rotation, SwiGLU, Token, Trees, address, empty, view
from minilora.kernels.build import NATIVE, at_first_call, load

SOURCES = Path(__file__).with_name("block_cpu.cpp"), Path(__file__).with_name("block_attention.cpp")
HEAD_DIMS = (64, 128)               # those that the attention is compiled for: whole tiles of 64
# Narrower rows and heads keep torch's bits: figures that are published hang on those of the small model that ships (256 and 512
# wide, heads of 32).  The stepwise forms give these bits too, forward only.
NARROWEST = 768
STEPWISE_HEADS = (32,)


def takes_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `Kernel.attention` is made for these."""
    return (q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[-1] in HEAD_DIMS
            and q.shape[2] == k.shape[2] and q.numel() > 0)


def takes_query(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `Kernel.query` is made for these."""
    return (q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[-1] in HEAD_DIMS
            and q.shape[2] == 1 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.numel() > 0)


def takes_trees(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `Kernel.trees` is made for heads of this kind."""
    return dtype == torch.bfloat16 and device.type == "cpu" and head_dim % 16 == 0


def takes_rotation(x: Tensor, cos: Tensor, sin: Tensor, stepwise: bool = False) -> bool:
    """Whether `Kernel.rotation` is made for these."""
    return (x.dtype == cos.dtype == sin.dtype == torch.bfloat16 and x.device.type == "cpu"
            and x.shape[-1] in (STEPWISE_HEADS if stepwise else HEAD_DIMS)
            and x.stride(-1) == 1 and cos.is_contiguous() and sin.is_contiguous() and x.numel() > 0)


def takes_rows(*tensors: Tensor, stepwise: bool = False) -> bool:
    """Whether `Kernel.swiglu` and `Kernel.norm` are made for tensors of such rows."""
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and (x.shape[-1] < NARROWEST) == stepwise
               and x.shape[-1] % (32 if stepwise else 16) == 0 and x.is_contiguous() and x.numel() > 0 for x in tensors)


class Kernel:
    """The compiled library.

    Args: machine: compiler flags for the instruction set.
    Raises: BuildError: it cannot be made (see `build.load`).
    """

    def __init__(self, machine: tuple[str, ...] = NATIVE) -> None:
        library = load(*SOURCES, machine=machine)
        self.works = bool(library.block_machine())              # compiled for AVX-512
        if self.works:
            self._forward, self._backward = library.block_attention, library.block_attention_backward
            for function in (self._forward, self._backward):
                function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int], None
            self._swiglu, self._norm, self._rotation = library.block_swiglu, library.block_norm, library.block_rotation
            self._rotation.argtypes, self._rotation.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], None
            self._swiglu.argtypes, self._swiglu.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], None
            self._norm.argtypes, self._norm.restype = [ctypes.c_void_p, ctypes.c_int], None
            self._token = library.block_token
            self._token.argtypes, self._token.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int], None
            self._trees, self._query = library.block_trees, library.block_query
            for function in (self._trees, self._query):
                function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int], None

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """softmax(q·kᵀ / √d)·v, each position over those up to its own.

        Args: q: (B, H, T, d) bfloat16. k, v: (B, Hkv, T, d), each read by H / Hkv heads of q.  d is 64 or 128 and lies side by
            side; other strides are any.
        Returns: (B, H, T, d) bfloat16, lying as (B, T, H, d), and log2 Σ exp of each row, (B, H, T) float32.
        Guarantee: computed in float32 and rounded once; a head's result depends on no other, nor on threads
            (tests/kernels/test_block.py).
        """
        o, log_sum = empty(*q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
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
        found = empty(*q.shape), empty(*k.shape), empty(*v.shape)
        call = self._call(q, k, v, o, log_sum)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()      # held until the call is over
        call.d_o = view(grad, tuple(q.shape))
        call.d_q, call.d_k, call.d_v = (view(x, tuple(x.shape)) for x in found)
        self._backward(ctypes.byref(call), q.shape[3], torch.get_num_threads())
        return found

    def query(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(q·kᵀ / √d)·v of one position a sequence.

        Args:
            q: (B, H, 1, d) bfloat16. k, v: (B, Hkv, S, d), each read by H / Hkv heads of q.  d is 64 or 128 and lies side by
                side; other strides are any. mask: bool (B or 1, 1, 1, S), True = may attend, or None for all.
        Returns: (B, H, 1, d) bfloat16.
        Guarantee: computed in float32 and rounded once; a head's result depends on no other, nor on threads
            (tests/kernels/test_query.py).
        """
        (batch, heads, _, head_dim), (_, kv_heads, length, _) = q.shape, k.shape
        if head_dim not in HEAD_DIMS or not kv_heads or heads % kv_heads or not length or \
                (mask is not None and mask.shape not in ((batch, 1, 1, length), (1, 1, 1, length))):
            raise ValueError(f"the kernel takes heads of {HEAD_DIMS}, query heads a multiple of key/value heads, and a mask of "
                             f"their keys, not {tuple(q.shape)} and {tuple(k.shape)}")
        o, shared = empty(*q.shape), (batch, kv_heads, length, head_dim)
        mask = None if mask is None else mask.contiguous()      # held until the call is over
        call = Query(view(q, (batch, heads, 1, head_dim)), view(k, shared), view(v, shared), view(o, tuple(q.shape)),
                     None if mask is None else address(mask, tuple(mask.shape), torch.bool), batch, heads, kv_heads, length,
                     head_dim, 0 if mask is None or len(mask) < batch else length, head_dim ** -0.5)
        self._query(ctypes.byref(call), torch.get_num_threads())
        return o

    def trees(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, starts: Tensor, asking: Tensor, positions: Tensor,
              visible: Tensor) -> Tensor:
        """softmax(q·kᵀ / √d)·v of sequences without padding, each with the same tree behind it.

        Args:
            q: (1, H, L, d) bfloat16. k, v: (1, Hkv, N, d), each read by H / Hkv heads of q.  d is a multiple of 16.
            keys: (S,) int32, rows of k and v that a sequence's queries may see, in order of position, its tree last; sequence
                after sequence. starts: (G + 1,) int64, where a sequence's keys start.
            asking: (G + 1,) int64, where a sequence's rows of q start. positions: (L,) int32, of each among its keys.
            visible: (K, K) bool, True = the row's node of the tree sees the column's.

        Returns: (1, H, L, d) bfloat16, lying as (1, L, H, d).
        Guarantee: sums in float32; the softmax's weights rounded to bfloat16, as torch's attention does, and the result; a
            sequence's results depend on no other, nor on threads (tests/kernels/test_trees.py).
        """
        (_, heads, length, head_dim), (_, kv_heads, rows, _), groups = q.shape, k.shape, len(starts) - 1
        shared, sizes, asked = (1, kv_heads, rows, head_dim), starts.diff(), asking.diff()
        if head_dim % 16 or heads % kv_heads or k.stride(1) % 2 or k.stride(2) % 2 or rows * k.stride(2) >= 2 ** 32:
            raise ValueError(f"the kernel takes heads of a multiple of 16, query heads a multiple of key/value heads, and keys "
                             f"that lie in pairs, not {heads} of {head_dim} and {kv_heads} with strides {k.stride()}")
        if (groups < 1 or starts[0] or starts[-1] != len(keys) or sizes.min() <= len(visible) or asking[0]
                or asking[-1] != length or asked.min() < 0 or keys.min() < 0 or keys.max() >= rows
                or positions.min() < 0 or bool((positions >= sizes.repeat_interleave(asked)).any())):
            raise ValueError(f"the kernel takes keys among {rows} rows, more than the tree's {len(visible)} a sequence, and "
                             "positions among a sequence's keys")
        o = empty(1, heads, length, head_dim)
        call = Trees(view(q, (1, heads, length, head_dim)), view(k, shared), view(v, shared), view(o, tuple(q.shape)),
                      address(keys, (len(keys),), torch.int32), address(starts, (groups + 1,), torch.int64),
                      address(asking, (groups + 1,), torch.int64), address(positions, (length,), torch.int32),
                      address(visible, 2 * (len(visible),), torch.bool), groups, heads, kv_heads, len(visible), head_dim,
                      head_dim ** -0.5)
        self._trees(ctypes.byref(call), torch.get_num_threads())
        return o

    def token(self, token: Token, layers: ctypes.Array[Layer]) -> None:
        """One token a sequence through all blocks; see `block_token.TokenStep`, which makes both."""
        self._token(ctypes.byref(token), ctypes.byref(layers), torch.get_num_threads())

    def rotation(self, x: Tensor, cos: Tensor, sin: Tensor, stepwise: bool = False) -> Tensor:
        """Each pair (i, i + d/2) of x rotated, rounded once; stepwise, each product and each sum, as torch's operations are.

        Args: x: (B, H, T, d) bfloat16, d side by side: 32, 64 or 128. cos, sin: (B or 1, 1, T, d) bfloat16, contiguous.
        Returns: (B, H, T, d), lying as (B, T, H, d).
        """
        batch, heads, length, head_dim = x.shape
        if head_dim not in HEAD_DIMS + STEPWISE_HEADS or cos.shape[0] not in (1, batch):
            raise ValueError(f"the kernel takes heads of {HEAD_DIMS} and cosines of {batch} sequences, or of all, not "
                             f"{tuple(x.shape)} and {tuple(cos.shape)}")
        y, shape, angles = empty(*x.shape), tuple(x.shape), (cos.shape[0], 1, length, head_dim)
        call = Rotation(view(x, shape), view(y, shape), address(cos, angles), address(sin, angles), heads, length,
                         head_dim, cos.shape[0] == 1, stepwise)
        self._rotation(ctypes.byref(call), batch, torch.get_num_threads())
        return y

    def swiglu(self, gate: Tensor, up: Tensor, stepwise: bool = False) -> Tensor:
        """silu(gate) · up in one pass, rounded once; stepwise, silu(gate) as well, to the bits of torch's operations.

        Args: gate, up: (..., inner) bfloat16, contiguous, inner a multiple of 16.
        """
        y, shape = torch.empty_like(gate), tuple(gate.shape)
        call = SwiGLU(address(gate, shape), address(up, shape), None, address(y, shape), stepwise=stepwise)
        self._elementwise(call, gate)
        return y

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up in one pass, rounded once; grad: of what `swiglu` gave, (..., inner)."""
        d_gate, d_up, shape = torch.empty_like(gate), torch.empty_like(up), tuple(gate.shape)
        grad = grad.contiguous()                                # held until the call is over
        call = SwiGLU(address(gate, shape), address(up, shape), address(grad, shape), None,
                       address(d_gate, shape), address(d_up, shape))
        self._elementwise(call, gate)
        return d_gate, d_up

    def _elementwise(self, call: SwiGLU, gate: Tensor) -> None:
        if gate.shape[-1] % 16:
            raise ValueError(f"the kernel takes rows of a multiple of 16, not {gate.shape[-1]}")
        self._swiglu(ctypes.byref(call), gate.numel(), torch.get_num_threads())

    def norm(self, x: Tensor, weight: Tensor, eps: float, stepwise: bool = False) -> tuple[Tensor, Tensor]:
        """x / √(mean(x²) + ε) · weight, rounded once; stepwise, before the weight as well, to the bits of torch's operations.

        Args: x: (..., size) bfloat16, contiguous, size a multiple of 16, stepwise of 32. weight: (size,) bfloat16.
        Returns: (..., size) bfloat16, and 1 / √(mean(x²) + ε), (..., 1) float32.
        """
        y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        call = self._rows(x, weight, inverse)
        call.y, call.eps, call.stepwise = address(y, tuple(x.shape)), eps, stepwise
        if stepwise and x.shape[-1] % 32:
            raise ValueError(f"the kernel takes rows of a multiple of 32, not {x.shape[-1]}")
        self._norm(ctypes.byref(call), torch.get_num_threads())
        return y, inverse

    def norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        """The gradient of x, rounded once; grad: of what `norm` gave, (..., size); inverse: what `norm` gave."""
        d_x, grad = torch.empty_like(x), grad.contiguous()
        call = self._rows(x, weight, inverse)
        call.d_y, call.d_x = address(grad, tuple(x.shape)), address(d_x, tuple(x.shape))
        self._norm(ctypes.byref(call), torch.get_num_threads())
        return d_x

    @staticmethod
    def _rows(x: Tensor, weight: Tensor, inverse: Tensor) -> Norm:
        size = x.shape[-1]
        if size % 16:
            raise ValueError(f"the kernel takes rows of a multiple of 16, not {size}")
        return Norm(address(x, tuple(x.shape)), address(weight, (size,)), rows=x.numel() // size, size=size,
                     inverse=address(inverse, (*x.shape[:-1], 1), torch.float32))

    @staticmethod
    def _call(q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor) -> Attention:
        batch, heads, length, head_dim = q.shape
        kv_heads = k.shape[1]
        if head_dim not in HEAD_DIMS or heads % kv_heads:
            raise ValueError(f"the kernel takes heads of {HEAD_DIMS}, query heads a multiple of key/value heads, not {heads} "
                             f"of {head_dim} and {kv_heads}")
        if log_sum.shape != q.shape[:3] or log_sum.dtype != torch.float32 or not log_sum.is_contiguous():
            raise ValueError(f"log_sum must be contiguous float32 {tuple(q.shape[:3])}, not {log_sum.dtype} "
                             f"{tuple(log_sum.shape)}")
        shared = (batch, kv_heads, length, head_dim)
        return Attention(batch, heads, kv_heads, length, head_dim ** -0.5, view(q, tuple(q.shape)), view(k, shared),
                          view(v, shared), view(o, tuple(q.shape)), log_sum=log_sum.data_ptr())


_tried: list[Kernel | None] = []


def kernel() -> Kernel | None:
    """The library for this machine, made at the first call, or None (`build.at_first_call`); silent without AVX-512."""
    return at_first_call(_tried, _working, "attention, norms and SwiGLU take torch's operations")


def _working() -> Kernel | None:
    made = Kernel()
    return made if made.works else None
