"""What an evaluation says: the numbers of metrics.json, each with its meaning.  `evaluate` works them out."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from minilora.clinical import ClinicalErrors, ClosePair
from minilora.compare import Comparison

LISTED = 20     # close pairs, and confusions, that are kept
OTHER = "(another answer)"


@dataclass(frozen=True)
class LabelRow:
    """One label: references, predictions, precision, recall, F1, mean cosine of the answers to its references."""

    label: str
    n: int
    predicted: int
    precision: float
    recall: float
    f1: float
    cosine: float


@dataclass(frozen=True)
class Confusion:
    """An error: what was right, what was answered, how often, how close cosine calls them, what differs clinically."""

    reference: str
    prediction: str
    n: int
    cosine: float
    difference: str | None


@dataclass(frozen=True)
class Baseline:
    """What an answer that ignores the note scores; `label` where it is always the same."""

    exact_match: float
    macro_f1: float
    cosine: float
    label: str | None = None


@dataclass(frozen=True)
class CosineHistogram:
    """Rows by the cosine of answer and reference, in bins of equal width from 0 to 1, the last closed.

    Attributes: rows: of all. wrong: of the wrong ones, which a mean hides: a cosine near 1 is no right answer.
    """

    rows: list[int]
    wrong: list[int]


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows whose probability lies in a bin: how many, their mean probability, and the share that is right."""

    n: int
    probability: float
    accuracy: float


@dataclass(frozen=True)
class CoveragePoint:
    """What is right if only rows of at least this probability are answered, and the share of rows that these are."""

    threshold: float
    share: float
    accuracy: float


@dataclass(frozen=True)
class ConfusionMatrix:
    """Who is taken for whom, without its zeros: of cell (i, j, n), labels[i] was right and labels[j] was answered n times.

    The last label is `OTHER`, which is never right and stands for whatever is no label.
    """

    labels: list[str]
    cells: list[tuple[int, int, int]]


@dataclass(frozen=True)
class NearDuplicates:
    """Scored notes that stand in the training table as well (`duplicates`), and the score without them.

    Attributes:
        same, near: notes that stand there word for word, and nearly. threshold: of their similarity.
        n_without: rows without them. exact_match_without: of these rows, None if none is left.
    """

    same: int
    near: int
    threshold: float
    n_without: int
    exact_match_without: float | None


@dataclass(frozen=True)
class Scored:
    """What was scored, on what, by what: hashes name files without telling where they lie or what stands in them.

    Attributes:
        model: as it was named; a folder by its last part. adapter: SHA-256 of adapter_model.safetensors, None without one.
        weights: hash of the model in memory (`fingerprint`). data, train: SHA-256 of the tables. embedder: of the cosines.
        labels: that could be answered; None where answers were written freely. version: of minilora.
        answers: SHA-256 of the table that the answers were taken from, None where the model was asked.
    """

    model: str
    adapter: str | None
    weights: str
    data: str
    embedder: str
    labels: int | None
    version: str
    train: str | None = None
    answers: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of n predictions; every rate lies in [0, 1].

    Attributes:
        exact_match: share of predictions equal to their reference (`metrics.normalize_label`).
        macro_f1: mean F1 over the labels that occur among the references; weighted_f1: weighted by their number.
        cosine: mean cosine of prediction's and reference's embeddings; a negative one counts as 0, an empty answer as 0.
        intervals: 95 % bootstrap interval (low, high) of exact_match, macro_f1 and cosine.
        baselines: "shuffled" (a seeded permutation of the references), "majority" (their most frequent label), and other
            methods that answered the same rows; comparisons: with each of those, row by row.
        per_label: every reference label, by name.
        close_pairs: see `clinical.close_pairs`; only reference labels.
        confusions: the most frequent errors. outside: predictions that are no reference label.
        mean_probability, calibration_error: of the given probabilities, None without (ten bins).
        reliability: the same by bin; coverage: at some shares of rows. Both empty without probabilities.
        top_k: share of rows whose reference is among the k most probable labels, by k; empty without a ranking.
        near_duplicates: None where no training table was given. scored: what it is the evaluation of, where that is known.
    """

    n: int
    exact_match: float
    macro_f1: float
    weighted_f1: float
    cosine: float
    intervals: dict[str, tuple[float, float]]
    baselines: dict[str, Baseline]
    per_label: list[LabelRow]
    close_pairs: list[ClosePair]
    confusions: list[Confusion]
    outside: int
    mean_probability: float | None
    calibration_error: float | None
    seed: int
    resamples: int
    clinical: ClinicalErrors
    cosine_histogram: CosineHistogram
    confusion_matrix: ConfusionMatrix
    top_k: dict[str, float] = field(default_factory=dict)
    reliability: list[ReliabilityBin] = field(default_factory=list)
    coverage: list[CoveragePoint] = field(default_factory=list)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    near_duplicates: NearDuplicates | None = None
    scored: Scored | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as metrics.json holds them."""
        return dataclasses.asdict(self)
