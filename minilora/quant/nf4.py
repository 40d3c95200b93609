"""NF4Tensor: a weight in 4.127 bits a number.

    packed   two 4-bit codes a byte                                                      4      bits per weight
    absmax   one float32 a block of 64: 0.5 bits; or, double-quantized,
             one 8-bit code a block                                                      0.125
             and one float32 per 256 blocks                                              0.00195

Double quantization (QLoRA section 3) quantizes the *block constants*, never the weights a second time.  The constants
are all positive, so their mean is subtracted first and a signed 8-bit map is used on what remains:

    absmax ≈ dynamic[codes] * nested_absmax + offset

bitsandbytes spreads the same algorithm over seven backends; this file and `kernels/reference.py` are all of it, and
tests/peers hold the two equal to the bit (its CPU build's own deviations are written down there).

Lessons 05 and 06 explain it.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch
from torch import Tensor

from minilora.errors import QuantizationError
from minilora.kernels import cpu, gpu, reference
from minilora.quant.blockwise import dequantize_blockwise, flat, flat_finite, quantize_blockwise
from minilora.quant.codebooks import DYNAMIC_8BIT, NF4_CODE, NF4_ZERO

NESTED_BLOCKSIZE = 256


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """Block constants, themselves quantized.

    Attributes:
        codes: (blocks,) uint8, indices into the signed 8-bit dynamic map.
        absmax: (ceil(blocks / blocksize),) float32. offset: the mean that was subtracted, a float32 value.
        blocksize: constants per nested block, 256.
    """

    codes: Tensor
    absmax: Tensor
    offset: float
    blocksize: int = NESTED_BLOCKSIZE

    def decode(self) -> Tensor:
        """The constants again: (blocks,) float32."""
        return dequantize_blockwise(self.codes, self.absmax, DYNAMIC_8BIT, self.blocksize) + self.offset

    @staticmethod
    def encode(absmax: Tensor) -> NestedAbsmax:
        """Quantize (blocks,) float32 constants: subtract their mean, then 8 bits, 256 to a block.

        Raises: QuantizationError: the constants' sum exceeds float32, so they have no mean there.
        """
        offset = absmax.mean()
        if not bool(torch.isfinite(offset)):
            raise QuantizationError(f"block constants up to {float(absmax.max()):.3g} have no mean in float32; quantize "
                                    "without double quantization")
        codes, nested_absmax = quantize_blockwise(absmax - offset, DYNAMIC_8BIT, NESTED_BLOCKSIZE)
        return NestedAbsmax(codes, nested_absmax, float(offset))


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A tensor in 4-bit NormalFloat.  Made by `quantize_nf4`, or from the parts of a checkpoint.

    Attributes:
        packed: (ceil(n / 2),) uint8, the first code of each pair in the high nibble.
        shape: of the tensor it stands for. dtype: the floating type it was made from, and `dequantize`'s default.
        blocksize: weights per block of the flattened tensor.
        stored_absmax: (blocks,) float32, or None where `nested` holds the constants.
        nested: the double-quantized constants, or None.

    Raises:
        QuantizationError: the parts don't fit each other.
    """

    packed: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    stored_absmax: Tensor | None = None
    nested: NestedAbsmax | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        if (self.stored_absmax is None) == (self.nested is None):
            raise QuantizationError("an NF4 tensor has either float32 absmax or nested absmax: give exactly one")
        if self.blocksize < 1 or self.packed.dtype != torch.uint8:
            raise QuantizationError(f"an NF4 tensor has uint8 codes and a blocksize of at least 1, found {self.packed.dtype} "
                                    f"and {self.blocksize}")
        n = prod(self.shape)
        blocks = -(-n // self.blocksize)
        constants = self.stored_absmax if self.nested is None else self.nested.codes
        expected = [("packed", self.packed, (n + 1) // 2), ("absmax", constants, blocks)]
        if self.nested is not None:
            expected.append(("nested absmax", self.nested.absmax, -(-blocks // self.nested.blocksize)))
        for name, part, count in expected:
            if part is None or part.numel() != count:
                found = "nothing" if part is None else f"{part.numel()}"
                raise QuantizationError(f"an NF4 tensor of shape {tuple(self.shape)} with blocks of {self.blocksize} needs "
                                        f"{count} {name} entries, found {found}")

    @property
    def absmax(self) -> Tensor:
        """(blocks,) float32 block constants, decoded if they are stored quantized."""
        if self.nested is not None:
            return self.nested.decode()
        if self.stored_absmax is None:      # __post_init__ rules this out; the type checker cannot see it
            raise QuantizationError("an NF4 tensor without block constants")
        return self.stored_absmax

    @property
    def device(self) -> torch.device:
        """Where the packed codes lie."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of storage, the constants included (the float32 offset too)."""
        if self.nested is not None:
            return self.packed.nbytes + self.nested.codes.nbytes + self.nested.absmax.nbytes + 4
        return self.packed.nbytes + self.absmax.nbytes

    @property
    def bits_per_param(self) -> float:
        """Storage per weight in bits, as the paper counts it: 4.5 plain, 4.127 double-quantized at block 64.

        Counts codes and constants of this tensor; the one offset a tensor (32 bits in all) is left out, as in the paper.
        """
        return 8 * (self.nbytes - (4 if self.nested is not None else 0)) / prod(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The tensor again: ``NF4_CODE[code] * absmax`` in float32, rounded once to the output type.

        Args:
            dtype: floating type of the result; default that of `out`, else the original's.
            out: contiguous buffer of `self.shape` on the same device to write into, as a change that autograd knows of.

        Returns: `out`, or a new tensor of `self.shape`.
        Raises: QuantizationError when `out` has another shape, device, layout or (if given) dtype, or is no buffer, or a
            type is no float.
        """
        if out is not None and (not isinstance(out, Tensor) or not out.is_leaf):
            raise QuantizationError("out must be a tensor that is written into, not the result of something differentiated")
        kind = dtype or (self.dtype if out is None else out.dtype)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise QuantizationError(f"4-bit weights come out in a floating type such as torch.bfloat16, not {kind!r}")
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        elif (out.shape != self.shape or not out.is_contiguous() or out.device != self.device
              or (dtype is not None and out.dtype != dtype)):
            raise QuantizationError(f"out must be a contiguous {dtype or 'floating'} tensor of shape {tuple(self.shape)} on "
                                    f"{self.device}, found {out.dtype} {tuple(out.shape)} on {out.device}")
        kernel = _kernel(self.device, out.dtype)
        if kernel is not None:
            kernel.dequantize(*self.for_kernel(), out)
        else:
            reference.dequantize_packed(self.packed.view(-1), self.absmax, _tables(self.device)[0], self.blocksize,
                                        out.detach().view(-1))
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)     # compiled code writes where autograd does not see it
        return out

    def fused_product(self, x: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor | None:
        """``x Ŵᵀ + b``, or transposed ``x Ŵ``, Ŵ being rebuilt in registers and never written to memory, where that is faster.

        Args:
            x: (rows, in), transposed (rows, out), floating. bias: (out,) or None; none with `transposed`.
                The tensor is a matrix (out, in).

        Returns: (rows, out), or (rows, in), in x's dtype; or None where there is no kernel for it, or `dequantize` and torch's
            product are faster.
        Guarantee: Ŵ is rounded to x's dtype as `dequantize` does, and for one row is float32; sums are taken in float32 and
            rounded once (tests/kernels/test_product.py and test_gpu.py state the bounds).
        """
        kernel = _kernel(self.device, x.dtype)
        if kernel is None or x.device != self.device or len(x) > (
                kernel.transposed_rows if transposed else kernel.fused_rows).get(x.dtype, 0):
            return None
        weight, x = self.for_kernel(), x.detach().contiguous()
        if transposed:
            return kernel.product_transposed(x, *weight, self.shape[1])
        return kernel.product(x, *weight, self.shape[0], None if bias is None else bias.detach().float().contiguous())

    def for_kernel(self) -> tuple[Tensor, cpu.Constants, Tensor, int]:
        """What every kernel takes of it: packed codes, constants as they are stored, the table, the block size."""
        made: tuple[Tensor, cpu.Constants, Tensor, int] | None = self.__dict__.get("_taken")
        if made is None:
            constants = self._constants()
            made = self.packed, constants, _tables(self.device)[0], self.blocksize
            stored = (self.stored_absmax,) if self.nested is None else (self.nested.codes, self.nested.absmax)
            if all(any(tensor is own for own in (constants.absmax, constants.codes, constants.nested)) for tensor in stored):
                self.__dict__["_taken"] = made      # the tensors themselves, no copies that would go stale
        return made

    def __getstate__(self) -> dict[str, object]:        # a copy lies elsewhere
        return {name: value for name, value in self.__dict__.items() if name != "_taken"}

    def _constants(self) -> cpu.Constants:
        if self.nested is None:
            return cpu.Constants(absmax=self.absmax.float().contiguous())
        return cpu.Constants(None, self.nested.codes.contiguous(), _tables(self.device)[1],
                             self.nested.absmax.float().contiguous(), self.nested.offset, self.nested.blocksize)

    def codes(self) -> Tensor:
        """(n,) uint8 indices into `NF4_CODE`, unpacked."""
        return reference.unpack_nibbles(self.packed.view(-1), prod(self.shape))

    def to(self, device: torch.device | str) -> NF4Tensor:
        """The same tensor on another device."""
        nested = self.nested and replace(self.nested, codes=self.nested.codes.to(device), absmax=self.nested.absmax.to(device))
        stored = self.stored_absmax.to(device) if self.stored_absmax is not None else None
        return replace(self, packed=self.packed.to(device), stored_absmax=stored, nested=nested)


def quantize_nf4(w: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Tensor:
    """Quantize a weight to 4-bit NormalFloat.

    Args:
        w: any shape, float32, bfloat16 or float16; 16-bit input gives the same bytes as its float32 upcast.
        blocksize: weights per block of the flattened tensor.
        double_quant: quantize the block constants to 8 bits as well.

    Returns: an `NF4Tensor` on w's device.
    Raises: QuantizationError: w is empty, not floating point, or holds NaN or infinities.
    Guarantee: packed bytes and absmax equal bitsandbytes' bit for bit (tests/peers/test_bitsandbytes.py);
        |w - ŵ| <= 0.1519036 · absmax where absmax is not itself quantized.
    Source: QLoRA section 3.
    """
    flat_n = flat(w, blocksize)
    kernel = _kernel(flat_n.device, flat_n.dtype)
    made = kernel.quantize(flat_n, NF4_CODE, blocksize, NF4_ZERO) if isinstance(kernel, cpu.Kernel) else None
    if made is None:        # no kernel for it, or a number that is not finite, which `flat_finite` names
        codes, absmax = reference.quantize_blocks(flat_finite(w, blocksize), NF4_CODE.to(w.device), blocksize)
        made = reference.pack_nibbles(codes, padding=NF4_ZERO), absmax
    packed, absmax = made
    nested = NestedAbsmax.encode(absmax) if double_quant else None
    return NF4Tensor(packed, w.shape, w.dtype, blocksize, None if double_quant else absmax, nested)


def _kernel(device: torch.device, dtype: torch.dtype) -> cpu.Kernel | gpu.Kernel | None:
    """The fast code for numbers of this type on this device, or None: then the reference does it."""
    if dtype not in cpu.KINDS:
        return None
    if device.type == "cuda":
        return gpu.kernel(device)
    return cpu.kernel() if device.type == "cpu" else None


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """`NF4_CODE` and `DYNAMIC_8BIT` on a device, brought there once: each copy from the host would be waited for."""
    with torch.inference_mode(False):       # a tensor born in inference mode could not be used outside it
        return NF4_CODE.to(device), DYNAMIC_8BIT.to(device)


def as_shape(shape: Sequence[int]) -> torch.Size:
    """A checked shape from untrusted numbers (a checkpoint's JSON).

    Raises: QuantizationError: an entry is not a positive whole number.
    """
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape):
        raise QuantizationError(f"a shape holds positive whole numbers, found {list(shape)!r}")
    return torch.Size(shape)
