"""Block-wise absmax quantization against any codebook.

One outlier ruins the scale of everything that shares it.  Cut into blocks, a tensor has many scales and an outlier spoils
only its own block (QLoRA section 2, "Block-wise k-bit Quantization"; 8-bit optimizers, arXiv 2110.02861,
section 2.1).  The price is one constant a block: 32 / S bits per element.

Lesson 04 explains it.
"""
from __future__ import annotations

import torch
from torch import Tensor

from minilora.errors import QuantizationError
from minilora.kernels import cpu, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)      # the last is rounded to the first


def flat(x: Tensor, blocksize: int) -> Tensor:
    """The tensor flattened, after refusing what is no tensor of numbers.

    Raises:
        QuantizationError: not a float32, bfloat16, float16 or float64 tensor, sparse, empty, on the meta device, or
            `blocksize` below 1.
    """
    if isinstance(blocksize, bool) or not isinstance(blocksize, int) or blocksize < 1:
        raise QuantizationError(f"blocksize must be a positive whole number of elements, not {blocksize!r}")
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        found = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise QuantizationError(f"only float32, bfloat16 and float16 tensors can be quantized, not {found}")
    if x.layout != torch.strided or x.is_meta:
        raise QuantizationError(f"a {'meta' if x.is_meta else 'sparse'} tensor of shape {tuple(x.shape)} cannot be quantized: "
                                "its values do not lie in memory one by one")
    if x.numel() == 0:
        raise QuantizationError(f"an empty tensor of shape {tuple(x.shape)} cannot be quantized")
    return x.detach().contiguous().view(-1)


def flat_finite(x: Tensor, blocksize: int) -> Tensor:
    """The tensor flattened, after refusing what no block constant can scale.

    Raises: QuantizationError: as `flat`; or NaN, infinite, a float64 that float32 cannot hold.
    """
    flat_n = flat(x, blocksize)
    for chunk in flat_n.split(reference.CHUNK):
        # Trap: a float64 of 1e300 is finite, and infinite in the float32 that blocks are scaled in.
        values = chunk.float() if chunk.dtype == torch.float64 else chunk
        # Why not isfinite alone: both ends (NaN comes through either) take one pass without memory, many times faster.
        if not all(bool(end.isfinite()) for end in values.aminmax()):
            first = int((~torch.isfinite(values)).nonzero()[0])
            raise QuantizationError(f"a tensor of shape {tuple(x.shape)} holds {float(chunk[first])}: only finite values "
                                    "can be quantized")
    return flat_n


def quantize_blockwise(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize a tensor of any shape against a sorted codebook.

    Args:
        x: any shape, float32, bfloat16 or float16. code: (K,) float32, K <= 256, sorted within [-1, 1].
        blocksize: elements per block of the flattened tensor.

    Returns: codes (n,) uint8 and absmax (ceil(n / blocksize),) float32.
    Raises: QuantizationError (see `flat_finite`).
    """
    flat_n = flat(x, blocksize)
    kernel = cpu.kernel() if flat_n.device.type == "cpu" and flat_n.dtype == torch.float32 else None
    made = kernel.quantize_bytes(flat_n, code, blocksize) if isinstance(kernel, cpu.Kernel) else None
    # Without a kernel, or with a number that is not finite, which `flat_finite` names.
    return reference.quantize_blocks(flat_finite(x, blocksize), code.to(x.device), blocksize) if made is None else made


def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """Inverse up to rounding: (n,) uint8 codes and (blocks,) float32 absmax -> (n,) float32."""
    return reference.dequantize_blocks(codes, absmax, code.to(codes.device), blocksize)
