"""Exercise 02.  Write the functions, then run:  minilora check 2"""
from torch import Tensor


def trained_numbers(in_features: int, out_features: int, r: int) -> int:
    """How many numbers LoRA trains beside one linear layer.

    Args: in_features, out_features: of the layer, whose weight is (out, in). r: rank of the update B A.
    """
    raise NotImplementedError


def low_rank(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of a matrix: left @ right is as near to it as rank r comes.

    Args: weight: (out, in) float32. r: at most the smaller side.
    Returns: left (out, r) and right (r, in).  How the strength is split between them is up to you.
    """
    raise NotImplementedError
