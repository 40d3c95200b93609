"""Exercise 19.  Write the functions, then run:  minilora check 19"""
from collections.abc import Callable, Iterator

from torch import Tensor


def step_gradient(gradients: list[Tensor], label_tokens: list[int]) -> Tensor:
    """The gradient of the mean loss over all label tokens of a step, from those of its processes.

    Args: gradients: of each process, of the mean loss over its *own* label tokens. label_tokens: how many each has.
    """
    raise NotImplementedError


def all_reduce_bytes(numbers: int, processes: int) -> float:
    """The bytes that each process sends until all have the sum of a gradient of so many float32 numbers, by a ring."""
    raise NotImplementedError


def sharded_bytes(linear_weights: int, other_weights: int, processes: int) -> float:
    """The bytes of a QLoRA base in each of several processes that share it.

    Args: linear_weights: in NF4 with double quantization, blocks of 64 and 256, shared evenly. other_weights: embeddings, head
        and norms, in 16 bits, whole in each process.
    """
    raise NotImplementedError


def label_partition(batches: Iterator[list[str]], load: Callable[[], Callable[[str], str]]) -> Iterator[list[str]]:
    """What a Spark worker runs: yields the labels of each batch of notes.

    Args: batches: come one by one, and there may be none. load: gives the model, which takes a note and gives its label;
        calling `load` takes a minute.
    """
    raise NotImplementedError
