"""The vector code of `nf4_cpu.cpp` and `nf4_product.cpp`, called with tensors.

`kernel()` is the compiled library, or None where there is none: then the caller takes `reference`, which gives the same bits.
Without a compiler that is so, and said once; ``MINILORA_KERNELS=reference`` asks for it.

Tables and buffers are handed in: this room knows no codebook.  Threads are torch's, as many as ``torch.get_num_threads()``.
Trap: what C++ writes into has its type and device named, or `new_empty` of a tensor that has them; torch's defaults are the
caller's to set, and code that is told an address believes it.
"""
from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minilora.kernels.build import NATIVE, at_first_call, load

SOURCES = Path(__file__).with_name("nf4_cpu.cpp"), Path(__file__).with_name("nf4_product.cpp")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Up to so many rows of x the fused product is faster than unpacking and torch's product, measured on two AMD EPYC cores with
# AVX-512; the other forms on the same machine, but bfloat16 with AVX2 on two that have no more, where torch's product is
# float32's (`layers.dense`): between 64 and 128 rows.  With more rows of bfloat16 both take as long.  In float32 torch's
# product takes twice as long, however many rows.
ANY = sys.maxsize
FUSED_ROWS = {"AVX-512 with bfloat16 products": {torch.bfloat16: 192, torch.float32: ANY},
              "AVX-512": {torch.bfloat16: 16, torch.float32: 128},
              "AVX2": {torch.bfloat16: 64, torch.float32: 64}}
# The same of the product with W transposed.
TRANSPOSED_ROWS = {"AVX-512 with bfloat16 products": {torch.bfloat16: 192, torch.float32: ANY},
                   "AVX-512": {torch.float32: 128}}
FUSED_ROWS_ELSEWHERE = {torch.bfloat16: 3, torch.float32: 4}


@dataclass(frozen=True)
class Constants:
    """Block constants as they are stored: `absmax` (blocks,) float32, or the other four (see `quant.nf4.NestedAbsmax`).

    Attributes: codes: (blocks,) uint8. dynamic: (256,) float32. nested: (ceil(blocks / blocksize),) float32.
    """

    absmax: Tensor | None = None
    codes: Tensor | None = None
    dynamic: Tensor | None = None
    nested: Tensor | None = None
    offset: float = 0.0
    blocksize: int = 256
    made: list[tuple[tuple[int, ...], _Packed]] = field(default_factory=list, repr=False, compare=False)    # `Kernel.weight`'s


class _Packed(ctypes.Structure):
    """`struct Packed` of nf4_blocks.h."""

    _fields_ = (("packed", ctypes.c_void_p), ("code", ctypes.c_void_p), ("n", ctypes.c_int64), ("blocksize", ctypes.c_int64),
                ("absmax", ctypes.c_void_p), ("nested_codes", ctypes.c_void_p), ("dynamic", ctypes.c_void_p),
                ("nested_absmax", ctypes.c_void_p), ("nested_blocksize", ctypes.c_int64), ("offset", ctypes.c_float))


def _address(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    """Where the elements lie; C code believes what it is told, so a wrong type or a gap between elements stops here."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"the kernel takes contiguous {dtype} on the CPU, not {tensor.dtype} {tuple(tensor.shape)} with "
                         f"strides {tensor.stride()} on {tensor.device}")
    return tensor.data_ptr()


class Kernel:
    """The compiled library.

    Args: machine: compiler flags for the instruction set.
    Raises: BuildError: it cannot be made (see `build.load`).
    """

    def __init__(self, machine: tuple[str, ...] = NATIVE) -> None:
        library = load(*SOURCES, machine=machine)
        pointer, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._unpack = library.nf4_unpack
        self._unpack.argtypes, self._unpack.restype = [pointer, integer, pointer, integer], None
        self._product = library.nf4_product
        self._product.argtypes = [pointer, number, number, pointer, number, integer, pointer, pointer, integer]
        self._product.restype = None
        self._transposed = library.nf4_product_transposed
        self._transposed.argtypes = [pointer, number, number, pointer, number, integer, pointer, integer]
        self._quantize = library.nf4_quantize
        self._quantize.argtypes = [pointer, integer, number, pointer, number, pointer, pointer, integer, integer]
        self._quantize_bytes = library.nf4_quantize_bytes
        self._quantize_bytes.argtypes = [pointer, number, pointer, number, number, pointer, pointer, integer]
        self._dense = library.dense_product
        self._dense.argtypes = [pointer, number, number, pointer, number, pointer, integer]
        self._dense.restype = None
        # `nf4_product` and `dense_product`, for code of another library that calls them.
        self.product_address = ctypes.cast(self._product, pointer).value
        self.dense_address = ctypes.cast(self._dense, pointer).value
        self.dense_rows: int = library.dense_rows()             # that `dense_product` takes at most; 0: none
        library.nf4_machine.restype = ctypes.c_char_p
        self.machine: str = library.nf4_machine().decode()      # "AVX-512", "AVX2", "NEON", "plain C++"
        self.fused_rows = FUSED_ROWS.get(self.machine, FUSED_ROWS_ELSEWHERE)
        self.transposed_rows: dict[torch.dtype, int] = TRANSPOSED_ROWS.get(self.machine, {})

    def dequantize(self, packed: Tensor, constants: Constants, code: Tensor, blocksize: int, out: Tensor) -> Tensor:
        """Unpack, look up, scale and round in one pass, the constants decoded on the way.

        Args:
            packed: (ceil(n / 2),) uint8. code: (16,) float32.
            out: n elements, contiguous, float32, bfloat16 or float16.

        Returns: out.
        Guarantee: the bits of `reference.dequantize_packed` (tests/kernels/test_equal_bits.py); NaN is NaN, of any payload.
        """
        weight = self.weight(packed, constants, code, blocksize, out.numel())
        self._unpack(ctypes.byref(weight), KINDS[out.dtype], _address(out, out.dtype), torch.get_num_threads())
        return out

    def product(self, x: Tensor, packed: Tensor, constants: Constants, code: Tensor, blocksize: int, out_features: int,
                bias: Tensor | None = None) -> Tensor:
        """``x Wᵀ + bias`` without W in memory.

        Args:
            x: (rows, in) float32 or bfloat16, contiguous. packed: the codes of W (out, in). bias: (out,) float32 or None.

        Returns: (rows, out) in x's type.  The weight is that of `dequantize` to x's type, or for one row to float32; products
            are summed in float32, and the result is rounded once.  (Instructions for bfloat16, where there are any and x has
            more rows than one, take numbers below 1.2e-38 for zero.)
        Guarantee: off the exact sum of those products by at most (in + 2) · 2⁻²⁴ · Σ|x w|, before the one rounding
            (tests/kernels/test_product.py).  A row's result depends neither on its neighbours' values nor on threads.
        """
        rows, in_features = x.shape
        if bias is not None and bias.numel() != out_features:
            raise ValueError(f"{bias.numel()} biases for {out_features} outputs")
        y = x.new_empty(rows, out_features)
        weight = self.weight(packed, constants, code, blocksize, out_features * in_features)
        self._product(ctypes.byref(weight), out_features, in_features, _address(x, x.dtype), rows, KINDS[x.dtype],
                      _address(bias, torch.float32), y.data_ptr(), torch.get_num_threads())
        return y

    def product_transposed(self, x: Tensor, packed: Tensor, constants: Constants, code: Tensor, blocksize: int,
                           in_features: int) -> Tensor | None:
        """``x W``, the way of a gradient: (rows, out) -> (rows, in); the rest as in `product`, with `out` terms to a sum.

        Returns: None without AVX-512, or where blocks straddle rows or are no multiple of 64: nothing was done.
        """
        rows, out_features = x.shape
        y = x.new_empty(rows, in_features)
        weight = self.weight(packed, constants, code, blocksize, out_features * in_features)
        done = self._transposed(ctypes.byref(weight), out_features, in_features, _address(x, x.dtype), rows, KINDS[x.dtype],
                                y.data_ptr(), torch.get_num_threads())
        return y if done else None

    def dense_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x Wᵀ`` for at most `dense_rows` rows of x and a dense W.

        Args: x: (rows, in), weight: (out, in), both bfloat16 and contiguous.
        Returns: (rows, out) bfloat16.
        Guarantee: as of `product`, to the same bound (tests/kernels/test_product.py).
        """
        (rows, in_features), out_features = x.shape, len(weight)
        if not 0 < rows <= self.dense_rows or weight.shape[1] != in_features:
            raise ValueError(f"the kernel takes 1 to {self.dense_rows} rows as wide as the weight, not {tuple(x.shape)} and "
                             f"{tuple(weight.shape)}")
        y = x.new_empty(rows, out_features)
        self._dense(_address(weight, torch.bfloat16), out_features, in_features, _address(x, torch.bfloat16), rows,
                    y.data_ptr(), torch.get_num_threads())
        return y

    def quantize(self, x_n: Tensor, code: Tensor, blocksize: int, padding: int) -> tuple[Tensor, Tensor] | None:
        """Block constants and packed codes of a flat tensor.

        Args:
            x_n: (n,) float32, bfloat16 or float16, contiguous. code: (16,) float32, sorted.
            padding: the code behind an odd count.

        Returns: packed (ceil(n / 2),) uint8 and absmax (blocks,) float32; None where x holds a NaN or an infinity.
        Guarantee: the bits of `reference.quantize_blocks` and `pack_nibbles` (tests/kernels/test_equal_bits.py).
        """
        n = x_n.numel()
        blocksize = min(blocksize, n)
        packed = x_n.new_empty((n + 1) // 2, dtype=torch.uint8)
        absmax = x_n.new_empty(-(-n // blocksize), dtype=torch.float32)
        finite = self._quantize(_address(x_n, x_n.dtype), KINDS[x_n.dtype], n, _address(code, torch.float32), blocksize,
                                absmax.data_ptr(), packed.data_ptr(), padding, torch.get_num_threads())
        return (packed, absmax) if finite else None

    def quantize_bytes(self, x_n: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor] | None:
        """Codes and block constants of a flat tensor, against a table of up to 256.

        Args:
            x_n: (n,) float32, contiguous. code: (K,) float32, sorted, K <= 256.

        Returns: codes (n,) uint8 and absmax (blocks,) float32; None where x holds a NaN or an infinity.
        Guarantee: the bits of `reference.quantize_blocks` (tests/kernels/test_equal_bits.py).
        """
        n = x_n.numel()
        blocksize = min(blocksize, n)
        codes, absmax = x_n.new_empty(n, dtype=torch.uint8), x_n.new_empty(-(-n // blocksize), dtype=torch.float32)
        finite = self._quantize_bytes(_address(x_n, torch.float32), n, _address(code, torch.float32), code.numel(), blocksize,
                                      absmax.data_ptr(), codes.data_ptr(), torch.get_num_threads())
        return (codes, absmax) if finite else None

    @staticmethod
    def weight(packed: Tensor, constants: Constants, code: Tensor, blocksize: int, n: int) -> _Packed:
        """`struct Packed` of nf4_blocks.h; the tensors must outlive its use."""
        # Checked and made once for a weight that stays where it is: a token in decoding asks for hundreds.
        lying = (n, blocksize, packed.numel(), *(0 if tensor is None else tensor.data_ptr() for tensor in (
            packed, code, constants.absmax, constants.codes, constants.dynamic, constants.nested)))
        if constants.made and constants.made[0][0] == lying:
            return constants.made[0][1]
        blocks = -(-n // blocksize)
        held = constants.codes if constants.absmax is None else constants.absmax
        if packed.numel() != (n + 1) // 2 or held is None or held.numel() != blocks:
            raise ValueError(f"{packed.numel()} bytes and {0 if held is None else held.numel()} constants for {n} weights in "
                             f"{blocks} blocks")
        # A block longer than the tensor is as long: C's 64 bits are not Python's integers.
        made = _Packed(_address(packed, torch.uint8), _address(code, torch.float32), n, min(blocksize, max(n, 1)),
                       _address(constants.absmax, torch.float32), _address(constants.codes, torch.uint8),
                       _address(constants.dynamic, torch.float32), _address(constants.nested, torch.float32),
                       min(constants.blocksize, max(blocks, 1)), constants.offset)
        constants.made[:] = [(lying, made)]
        return made


_tried: list[Kernel | None] = []


def kernel() -> Kernel | None:
    """The library for this machine, made at the first call, or None (`build.at_first_call`)."""
    return at_first_call(_tried, Kernel, "4-bit weights take the slow path in plain torch")
