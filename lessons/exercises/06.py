"""Exercise 06.  Write the functions, then run:  minilora check 6

`quantize_blockwise`, `dequantize_blockwise` (minilora.quant.blockwise) and `DYNAMIC_8BIT` (minilora.quant.codebooks) may be
imported: you wrote the first two in exercise 04.
"""
from torch import Tensor


def encode_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """Double quantization: the block constants in 8 bits.

    Args: absmax: (blocks,) float32, all positive.
    Returns: codes (blocks,) uint8 into the signed dynamic map; a float32 constant for every 256 of them; what was subtracted.
    """
    raise NotImplementedError


def decode_absmax(codes: Tensor, nested_absmax: Tensor, offset: float) -> Tensor:
    """The block constants again: (blocks,) float32, from what `encode_absmax` returns."""
    raise NotImplementedError


def bits_per_weight(blocksize: int, nested_blocksize: int) -> float:
    """Storage of a weight in bits: its 4-bit code, its share of an 8-bit constant, and of the float32 constant above that."""
    raise NotImplementedError
