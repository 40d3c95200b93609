"""Exercise 10.  Write the functions, then run:  minilora check 10"""
from torch import Tensor


def training_example(prompt: list[int], label: list[int], end: int) -> tuple[list[int], list[int]]:
    """One training example from token ids.

    Args: prompt: BOS included. label: the answer's tokens. end: the end token.
    Returns: input_ids, and labels of the same length: the token itself where it carries loss, -100 where it does not.
        Position t of the labels stands for the same token as position t of input_ids: the loss does the shifting.
    """
    raise NotImplementedError


def collate(examples: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rectangle of examples of unequal length.

    Args: examples: (input_ids, labels) each. pad_id: what fills the gaps; it may be the id of the end token.
    Returns: input_ids, attention_mask (1 = real token) and labels (-100 = no loss), (examples, longest) int64 each.
    """
    raise NotImplementedError
