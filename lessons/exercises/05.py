"""Exercise 05.  Write the functions, then run:  minilora check 5"""
from torch import Tensor


def nf4_levels() -> Tensor:
    """The sixteen levels of NF4 from normal quantiles: (16,) float32, sorted, from -1 to 1, with an exact zero.

    scipy.stats.norm.ppf, or statistics.NormalDist().inv_cdf, gives a quantile.
    """
    raise NotImplementedError


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first of a pair in the high four bits; an odd count is filled up with code 7.

    Args: codes: (n,) uint8, each below 16.
    Returns: (ceil(n / 2),) uint8.
    """
    raise NotImplementedError


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first n codes of packed bytes: (ceil(n / 2),) uint8 -> (n,) uint8."""
    raise NotImplementedError
