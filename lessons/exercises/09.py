"""Exercise 09.  Write the functions, then run:  minilora check 9"""
from collections.abc import Sequence


def tensor_places(file: bytes) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file lies.

    Args: file: the whole file (of a few bytes, here).
    Returns: for each key the position in the file of the tensor's first byte, and the one behind its last.
    """
    raise NotImplementedError


def streaming_peak(sizes: Sequence[int]) -> float:
    """The most bytes in memory at once, where each tensor is read in 16 bits, quantized, and dropped before the next is read.

    Args: sizes: bytes of the tensors in 16 bits, in the order in which they are read.  A weight takes 4.127 bits after.
    """
    raise NotImplementedError
