"""Block-wise absmax quantization against any codebook.

One outlier ruins the scale of everything that shares it.  Cut into blocks, a tensor has many scales and an outlier spoils
only its own block (QLoRA section 2, "Block-wise k-bit Quantization"; 8-bit optimizers section 1.2).  The price is one
constant a block: 32 / S bits per element.
"""
from __future__ import annotations

import torch
from torch import Tensor

from minilora.errors import QuantizationError
from minilora.kernels import reference


def flat_finite(x: Tensor, blocksize: int) -> Tensor:
    """The tensor flattened, after refusing what no block constant can scale.

    Raises:
        QuantizationError: not floating point, empty, on the meta device, NaN or infinite, or `blocksize` below 1.
    """
    if isinstance(blocksize, bool) or not isinstance(blocksize, int) or blocksize < 1:
        raise QuantizationError(f"blocksize must be a positive whole number of elements, not {blocksize!r}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise QuantizationError(f"only floating-point tensors can be quantized, not {getattr(x, 'dtype', type(x).__name__)}")
    if x.numel() == 0:
        raise QuantizationError(f"an empty tensor of shape {tuple(x.shape)} cannot be quantized")
    flat_n = x.detach().contiguous().view(-1)
    for chunk in flat_n.split(reference.CHUNK):
        finite = torch.isfinite(chunk)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
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
    return reference.quantize_blocks(flat_finite(x, blocksize), code.to(x.device), blocksize)


def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """Inverse up to rounding: (n,) uint8 codes and (blocks,) float32 absmax -> (n,) float32."""
    return reference.dequantize_blocks(codes, absmax, code.to(codes.device), blocksize)
