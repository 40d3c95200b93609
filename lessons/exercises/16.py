"""Exercise 16.  Write the functions, then run:  minilora check 16"""
from torch import Tensor

from minilora import NF4Tensor


def merge_16bit(original: Tensor, base: NF4Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """The weight of the plain layer that computes what was trained.

    Args: original: (out, in) float32, the weight before it was quantized. base: the same in 4 bits, over which the adapter was
        trained. lora_a: (r, in). lora_b: (out, r).
    Returns: (out, in) float32.
    """
    raise NotImplementedError


def update_cosine(merged: Tensor, trained: Tensor, base: Tensor) -> float:
    """How much of what was learnt a merge keeps: the cosine between what merging and what training added to the base.

    Args: all (out, in): the merged weight, base + update as trained, and the dequantized base.
    """
    raise NotImplementedError
