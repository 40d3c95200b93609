"""Scores of predicted labels as pure functions of counts, and their bootstrap intervals.

All scores but cosine follow from how often each pair (reference, prediction) occurs, and cosine from the pair's own
cosine, so rows are counted once and everything else happens on the distinct pairs u = 1 … U:

    exact match = Σ_{u: equal} n_u / n      cosine = Σ_u n_u cos_u / n
    F1 of label k = 2 TP_k / (references k + predictions k),  macro-F1 = its mean over the labels among the references

The bootstrap draws n rows with replacement.  The counts of pairs in such a draw are multinomial(n, n_u / n), so a
thousand draws are one (1000, U) matrix and no row is touched again (Efron & Tibshirani 1993, chapter 13: percentile
intervals).  What it cannot know: of n right answers out of n it makes the interval [1, 1], though the true rate may well
be 1 − 3/n, and with few rows it is too narrow anyhow (`said_of_few_rows`).

Lesson 15 explains it.
"""
from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
RESAMPLED_NUMBERS = 4_000_000       # of counts in memory at once: 32 MB
FEW_ROWS = 200                      # fewer make intervals that are too narrow


def normalize_label(label: str) -> str:
    """The form in which two labels are compared: case folded, in Unicode's NFC, white space runs one space, none around.

    Nothing else: "W/O Contrast" and "WO Contrast", "C-Spine" and "C Spine" are different answers.
    """
    # Trap: folding takes some letters apart (the Greek ΐ), and puts together none that came apart.
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", label).casefold()).split())


@dataclass(frozen=True)
class Pairs:
    """The distinct (reference, prediction) pairs of a table: codes, how often, and their cosine similarity in [0, 1].

    Attributes: reference, prediction, count: (U,) int64; cosine: (U,) float64; classes: labels numbered 0 … classes − 1.
    """

    reference: Ints
    prediction: Ints
    count: Ints
    cosine: Floats
    classes: int


def number_labels(texts: Sequence[str]) -> tuple[list[str], Ints]:
    """Number texts by their normalized form, in order of appearance.

    Returns: the first spelling of each number; (n,) int64 numbers.
    """
    numbers: dict[str, int] = {}
    names: list[str] = []
    codes = np.empty(len(texts), dtype=np.int64)
    for index, text in enumerate(texts):
        codes[index] = numbers.setdefault(normalize_label(text), len(names))
        if codes[index] == len(names):
            names.append(" ".join(text.split()))
    return names, codes


def count_pairs(reference: Ints, prediction: Ints, vectors: Floats) -> Pairs:
    """Count the distinct pairs of (n,) codes; a negative cosine counts as 0.

    Args: vectors: (classes, d) float64 of length 1, by code; zero for an empty answer.
    """
    classes = len(vectors)
    keys, count = np.unique(reference * classes + prediction, return_counts=True)
    a, b = keys // classes, keys % classes
    cosine = np.einsum("ud,ud->u", vectors[a], vectors[b]).clip(0, 1)
    return Pairs(a, b, count.astype(np.int64), np.where(a == b, 1.0, cosine), classes)


@dataclass(frozen=True)
class LabelScores:
    """Scores of each label: (classes,) float64; a rate whose denominator is 0 is 0."""

    n: Floats
    predicted: Floats
    right: Floats
    precision: Floats
    recall: Floats
    f1: Floats
    cosine: Floats


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def label_scores(pairs: Pairs) -> LabelScores:
    """Precision, recall, F1 and mean cosine of each label."""
    weights = pairs.count.astype(np.float64)
    equal = pairs.reference == pairs.prediction

    def total(codes: Ints, values: Floats) -> Floats:
        return np.bincount(codes, values, pairs.classes).astype(np.float64)

    n, predicted = total(pairs.reference, weights), total(pairs.prediction, weights)
    right = total(pairs.reference, weights * equal)
    return LabelScores(n, predicted, right, _ratio(right, predicted), _ratio(right, n), _ratio(2 * right, n + predicted),
                       _ratio(total(pairs.reference, weights * pairs.cosine), n))


def weighted_f1(scores: LabelScores) -> float:
    """Mean F1, each label weighted by its references (scikit-learn's ``average="weighted"``)."""
    return float((scores.f1 * scores.n).sum() / scores.n.sum())


def summarize(pairs: Pairs, counts: NDArray[np.integer] | None = None) -> dict[str, Floats]:
    """exact_match, macro_f1 and cosine of R tables that have the same pairs in other numbers.

    Args: counts: (R, U) of each pair in each table; default the pairs' own, R = 1.
    Returns: (R,) float64 for each score.
    """
    counts = pairs.count[None] if counts is None else counts
    n = counts.sum(1)
    equal = pairs.reference == pairs.prediction

    def by_label(codes: Ints, values: NDArray[np.integer]) -> Floats:
        # Columns of one label side by side, each run summed in one go; labels without a pair stay 0.
        order = np.argsort(codes, kind="stable")
        present, starts = np.unique(codes[order], return_index=True)
        sums = np.zeros((len(values), pairs.classes))
        sums[:, present] = np.add.reduceat(values[:, order], starts, axis=1)
        return sums

    references, predictions = by_label(pairs.reference, counts), by_label(pairs.prediction, counts)
    f1 = _ratio(2 * by_label(pairs.reference, counts * equal), references + predictions)
    # Macro over the labels among a table's own references: an answer outside them counts as a miss, not as a label.
    return {"exact_match": (counts * equal).sum(1) / n, "macro_f1": f1.sum(1, where=references > 0) / (references > 0).sum(1),
            "cosine": counts @ pairs.cosine / n}


def said_of_few_rows(n: int) -> str | None:
    """What a reader of intervals over n rows has to know, or None where there are enough.

    Intervals of exact match that say 95 % hold a true rate of 0.9 in two of five tables of 5 rows, one of 0.98 in a third of
    those of 20, and one of 0.9 in 94 % of those of 200 (tests/test_evaluate.py).
    """
    return (f"{n:,} rows are few: intervals resampled from them are too narrow, the more so the nearer a score is to 0 or 1"
            if n < FEW_ROWS else None)


def bootstrap_intervals(pairs: Pairs, resamples: int, rng: np.random.Generator,
                        level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Percentile intervals of exact_match, macro_f1 and cosine, by resampling rows.

    Args: resamples: draws, 1 or more. level: share of them inside the interval.
    """
    n = int(pairs.count.sum())
    draws: dict[str, list[Floats]] = {}
    at_once = max(1, RESAMPLED_NUMBERS // len(pairs.count))
    for start in range(0, resamples, at_once):
        counts = rng.multinomial(n, pairs.count / n, size=min(at_once, resamples - start))          # (R, U)
        for name, values in summarize(pairs, counts).items():
            draws.setdefault(name, []).append(values)
    edges = (50 * (1 - level), 50 * (1 + level))
    found = {name: np.percentile(np.concatenate(values), edges).clip(0, 1) for name, values in draws.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def top_k(ranked: Sequence[Sequence[str]], references: Sequence[str], most: Sequence[int] = (1, 2, 3, 5)) -> dict[str, float]:
    """Share of rows whose reference is among the k most probable labels, by k as text (JSON has no other keys).

    Args: ranked: of each row its labels, the most probable first; what a row lacks is a miss. most: values of k.
    Returns: as far as some row has k labels.
    """
    longest = max(map(len, ranked), default=0)
    places = []
    for labels, reference in zip(ranked, references, strict=True):
        wanted = normalize_label(reference)
        places.append(next((place for place, label in enumerate(labels) if normalize_label(label) == wanted), longest))
    return {str(k): sum(place < k for place in places) / len(places) for k in most if k <= longest}


def cosine_histogram(pairs: Pairs, bins: int = 20) -> tuple[Ints, Ints]:
    """Rows by the cosine of answer and reference in bins of equal width over [0, 1]: (bins,) of all, and of the wrong ones."""
    # Rounded: the cosine of two equal vectors may come out a hair below 1, and bins are closed above only at 1.
    which = np.minimum((pairs.cosine.round(9) * bins).astype(np.int64), bins - 1)
    wrong = pairs.count * (pairs.reference != pairs.prediction)
    return (np.bincount(which, pairs.count, bins).astype(np.int64), np.bincount(which, wrong, bins).astype(np.int64))
