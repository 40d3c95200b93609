"""Does a probability mean what it says, and what is gained by not answering?

Reliability: rows are sorted into B bins of equal width by probability; in bin b of n_b rows the mean probability should be
the share of right answers,

    ECE = Σ_b (n_b / n) · |accuracy_b − mean probability_b|              (Guo et al., arXiv 1706.04599, equations 2 and 3)

Coverage: whoever answers only the surest rows answers fewer and errs less.  Rows of equal probability cannot be told apart,
so the curve has a point where a run of equals ends and none within it (Geifman & El-Yaniv, arXiv 1705.08500, section 2).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minilora.metrics import Floats, Ints

BINS = 10
COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)     # shares of rows that a table of the curve answers


@dataclass(frozen=True)
class Reliability:
    """What was said and what came true, by bin: (B,) each; both rates of an empty bin are 0.

    Attributes: n: rows. probability: their mean probability. accuracy: share of them that is right.
    """

    n: Ints
    probability: Floats
    accuracy: Floats


@dataclass(frozen=True)
class Coverage:
    """What answering only rows of at least a threshold's probability gives: (K,) each, thresholds falling.

    Attributes: threshold: of probability. share: of rows that are answered. accuracy: among them.
    """

    threshold: Floats
    share: Floats
    accuracy: Floats


def reliability(probability: Floats, right: NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """Sort rows into bins [b/B, (b+1)/B), the last closed.

    Args: probability: (n,) float64 in [0, 1]. right: (n,) bool.
    """
    which = np.minimum((probability * bins).astype(np.int64), bins - 1)
    n = np.bincount(which, minlength=bins)
    mean = [np.bincount(which, values, bins) / np.maximum(n, 1) for values in (probability, right.astype(np.float64))]
    return Reliability(n.astype(np.int64), mean[0], mean[1])


def calibration_error(probability: Floats, right: NDArray[np.bool_], bins: int = BINS) -> float:
    """Expected calibration error: mean |accuracy − mean probability| over the bins, weighted by rows.

    Args: as `reliability`, one row at least.
    Source: Guo et al., arXiv 1706.04599, equation 3.
    """
    found = reliability(probability, right, bins)
    return float((found.n * np.abs(found.accuracy - found.probability)).sum() / len(probability))


def coverage(probability: Floats, right: NDArray[np.bool_]) -> Coverage:
    """The accuracy among the surest rows, for every share of them that a threshold can pick.

    Args: as `reliability`, one row at least.
    Guarantee: the last point answers every row; its accuracy is that of all.
    """
    order = np.argsort(-probability, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(probability[order]) != 0, True))       # where a run of equals ends
    answered = ends + 1
    return Coverage(probability[order][ends], answered / len(probability), np.cumsum(right[order])[ends] / answered)


def picked(curve: Coverage, shares: Sequence[float] = COVERAGES) -> list[int]:
    """The curve's points for a table: for each share the first that answers as much, the largest share first."""
    return sorted({int(np.flatnonzero(curve.share >= share - 1e-12)[0]) for share in shares}, reverse=True)
