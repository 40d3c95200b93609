"""Exercise 15.  Write the functions, then run:  minilora check 15"""
from collections.abc import Sequence


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of predictions that are their reference; case and runs of white space do not count."""
    raise NotImplementedError


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean of F1 over the labels that occur among the references, spelled as they are.

    F1 of a label: 2 hits / (its references + its predictions).
    """
    raise NotImplementedError
