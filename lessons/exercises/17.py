"""Exercise 17.  Write the functions, then run:  minilora check 17"""
from torch import Tensor


def unpack_by_pairs(packed: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Dequantize NF4 with one lookup a byte, in a table of 256 pairs of levels.

    Args: packed: (n / 2,) uint8, the first weight of each byte in its high nibble. absmax: (n / blocksize,) float32; blocksize
        is even.
    Returns: (n,) float32.
    """
    raise NotImplementedError


def even_odd_product(packed: Tensor, absmax: Tensor, x: Tensor) -> Tensor:
    """W x, with the weights never put in order: high nibbles meet the even elements of x, low nibbles the odd ones.

    Args: packed: (out, in / 2) uint8. absmax: (out, in / 64) float32, of blocks of 64 weights. x: (in,) float32.
    Returns: (out,) float32.
    """
    raise NotImplementedError


def word_codes(words: Tensor) -> Tensor:
    """The eight codes in each 32-bit word, in the order of the weights, as a thread on a GPU takes them out: by shifts.

    Args: words: (n,) int64 from 0 to 2³² − 1, four packed bytes each, the first of them in the word's last eight bits.
    Returns: (n, 8) int64 from 0 to 15.
    """
    raise NotImplementedError
