"""Calibration and coverage by their definitions: a row at a time."""
from __future__ import annotations

import math
from collections.abc import Sequence


def reliability(probabilities: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[tuple[int, float, float]]:
    """Of each of `bins` equal intervals of probability, the last closed: rows, their mean probability, the share that is right.

    Both rates of an empty interval are 0.
    """
    rows = list(zip(probabilities, right, strict=True))
    found = []
    for b in range(bins):
        inside = [(p, r) for p, r in rows if min(int(p * bins), bins - 1) == b]
        n = len(inside)
        found.append((n, math.fsum(p for p, _ in inside) / n if n else 0.0, sum(r for _, r in inside) / n if n else 0.0))
    return found


def calibration_error(probabilities: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """The mean of |share that is right - mean probability| over the intervals, weighted by rows."""
    return math.fsum(n * abs(share - mean) for n, mean, share in reliability(probabilities, right, bins)) / len(right)


def coverage(probabilities: Sequence[float], right: Sequence[bool]) -> list[tuple[float, float, float]]:
    """Of each probability that occurs, falling: itself, the share of rows of at least that, the share of these that is right.
    """
    found = []
    for threshold in sorted(set(probabilities), reverse=True):
        answered = [r for p, r in zip(probabilities, right, strict=True) if p >= threshold]
        found.append((threshold, len(answered) / len(right), sum(answered) / len(answered)))
    return found
