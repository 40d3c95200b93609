"""Exercise 04.  Write the functions, then run:  minilora check 4"""
from torch import Tensor


def quantize_blocks(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise absmax quantization against a table of levels.

    A block is `blocksize` neighbours of the flattened tensor; the last may be shorter.  Each value, divided by its block's
    constant, takes the nearest level; one exactly between two takes the lower.

    Args: x: any shape, float32, no block all zero. code: (K,) float32 levels, sorted, from -1 to 1.
    Returns: codes (n,) uint8, indices of levels, and absmax (blocks,) float32.
    """
    raise NotImplementedError


def dequantize_blocks(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """The values that codes and constants stand for.

    Args: codes: (n,) uint8. absmax: (blocks,) float32. code: (K,) float32.
    Returns: (n,) float32.
    """
    raise NotImplementedError


def bits_per_weight(blocksize: int) -> float:
    """Storage of a weight in bits: its 4-bit code, and its share of the block's float32 constant."""
    raise NotImplementedError
