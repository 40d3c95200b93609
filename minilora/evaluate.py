"""How good are predicted labels, how sure is that, and what would a guess have scored?

Exact match and F1 say how often the answer is right, cosine similarity of embeddings how far off it reads.  Cosine
flatters: "CT Abdomen W Contrast" and "CT Abdomen WO Contrast" are nearly the same text and clinically opposite.  So it
stands beside two baselines that know nothing of the notes (the references shuffled, and always the most frequent label),
and beside the pairs of labels that it calls close although their names say something different.

Two labels are the same answer when `metrics.normalize_label` makes them equal.  Scores hold no note, and what
a model wrote freely, which may repeat one, is in no table here unless it is a known label.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from minilora.calibration import calibration_error
from minilora.clinical import ClosePair, clinical_difference, close_pairs
from minilora.data.table_writer import TableWriter, added_columns
from minilora.embed import Embedder
from minilora.errors import ConfigError, DataError
from minilora.files import write_json
from minilora.metrics import (
    Floats,
    Pairs,
    bootstrap_intervals,
    count_pairs,
    label_scores,
    normalize_label,
    number_labels,
    summarize,
    weighted_f1,
)

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
class Evaluation:
    """Scores of n predictions; every rate lies in [0, 1].

    Attributes:
        exact_match: share of predictions equal to their reference (`metrics.normalize_label`).
        macro_f1: mean F1 over the labels that occur among the references; weighted_f1: weighted by their number.
        cosine: mean cosine of prediction's and reference's embeddings; a negative one counts as 0, an empty answer as 0.
        intervals: 95 % bootstrap interval (low, high) of exact_match, macro_f1 and cosine.
        baselines: "shuffled" (a seeded permutation of the references) and "majority" (their most frequent label).
        per_label: every reference label, by name.
        close_pairs: see `clinical.close_pairs`; only reference labels.
        confusions: the most frequent errors. outside: predictions that are no reference label.
        mean_probability, calibration_error: of the given probabilities, None without (ten bins).
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

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as metrics.json holds them."""
        return dataclasses.asdict(self)


def evaluate(predictions: Sequence[str], references: Sequence[str], embedder: Embedder,
             probabilities: Sequence[float] | None = None, seed: int = 0, resamples: int = 1000,
             labels: Sequence[str] = ()) -> Evaluation:
    """Score predicted labels against the right ones.

    Args:
        predictions: n answers; "" is one that is always wrong. references: n right labels.
        embedder: n texts -> (n, d), see `embed`; called once, with each distinct label once.
        probabilities: of the predictions, each in [0, 1].
        seed: of bootstrap and shuffled baseline. resamples: of the bootstrap.
        labels: names beside the references that confusions may spell out, i.e. the set that answers were chosen from.

    Raises:
        DataError: nothing to score, unequal lengths, an empty reference, a probability outside [0, 1].
        ConfigError: resamples below 1, or an embedder whose answer isn't one finite vector a text.
    """
    n = len(references)
    if not n:
        raise DataError("there is nothing to evaluate: no rows; give a table with labelled rows")
    if len(predictions) != n or (probabilities is not None and len(probabilities) != n):
        also = f" and {len(probabilities)} probabilities" if probabilities is not None else ""
        raise DataError(f"{len(predictions)} predictions and {n} references{also} don't match; give one each a row")
    empty = next((index for index, label in enumerate(references) if not label.strip()), None)
    if empty is not None:
        raise DataError(f"reference {empty + 1} of {n} is empty; fill it in or remove its row")
    if resamples < 1:
        raise ConfigError(f"resamples must be at least 1, not {resamples}")
    names, codes = number_labels([*references, *predictions])
    reference, prediction = codes[:n], codes[n:]
    vectors, rng = _embed(embedder, names), np.random.default_rng(seed)
    pairs = count_pairs(reference, prediction, vectors)
    scores, rates = _first(summarize(pairs)), label_scores(pairs)
    intervals = bootstrap_intervals(pairs, resamples, rng)
    known = sorted(np.unique(reference).tolist(), key=lambda code: names[code])
    majority = max(known, key=lambda code: rates.n[code])      # of several the first by name: row order decides nothing
    shuffled = _first(summarize(count_pairs(reference, rng.permutation(reference), vectors)))
    constant = _first(summarize(count_pairs(reference, np.full_like(reference, majority), vectors)))
    baselines = {"shuffled": Baseline(label=None, **shuffled), "majority": Baseline(label=names[majority], **constant)}
    rows = [LabelRow(names[k], int(rates.n[k]), int(rates.predicted[k]), float(rates.precision[k]),
                     float(rates.recall[k]), float(rates.f1[k]), float(rates.cosine[k])) for k in known]
    mean_probability = error = None
    if probabilities is not None:
        given = np.asarray(probabilities, dtype=np.float64)
        # Trap: NaN fails every comparison, so ask for what must hold. The exp of a rounded log may exceed 1.
        if not ((given >= 0) & (given <= 1 + 1e-5)).all():
            raise DataError("a probability is not between 0 and 1; give probabilities, not logits or percentages")
        given = given.clip(0, 1)
        mean_probability, error = float(given.mean()), calibration_error(given, reference == prediction)
    allowed = {normalize_label(label) for label in labels}
    shown = {code for code, name in enumerate(names) if normalize_label(name) in allowed}.union(known)
    outside = int(pairs.count[~np.isin(pairs.prediction, known)].sum())
    return Evaluation(n, **scores, weighted_f1=weighted_f1(rates), intervals=intervals, baselines=baselines,
                      per_label=rows, close_pairs=close_pairs(known, names, vectors, pairs, LISTED),
                      confusions=_confusions(pairs, names, shown), outside=outside, mean_probability=mean_probability,
                      calibration_error=error, seed=seed, resamples=resamples)


def _first(scores: dict[str, Floats]) -> dict[str, float]:
    return {name: float(values[0]) for name, values in scores.items()}


def _embed(embedder: Embedder, names: list[str]) -> Floats:
    """(labels, d) float64 of length 1; zero for the empty answer."""
    vectors: Tensor = embedder(names)
    if vectors.dim() != 2 or len(vectors) != len(names) or not vectors.isfinite().all():
        raise ConfigError(f"the embedder gave a {tuple(vectors.shape)} tensor for {len(names)} texts; "
                          "it must give one finite vector a text")
    unit: Floats = F.normalize(vectors.detach().double().cpu(), dim=-1).numpy().copy()
    unit[[index for index, name in enumerate(names) if not name]] = 0
    return unit


def _confusions(pairs: Pairs, names: list[str], shown: set[int]) -> list[Confusion]:
    """The most frequent errors; answers outside `shown` count as one."""
    errors: dict[tuple[int, int], tuple[int, float]] = {}       # (reference, prediction or -1) -> rows, sum of cosines
    columns = (pairs.reference.tolist(), pairs.prediction.tolist(), pairs.count.tolist(), pairs.cosine.tolist())
    for a, b, count, cosine in zip(*columns, strict=True):
        if a != b:
            key = (a, b if b in shown else -1)
            rows, total = errors.get(key, (0, 0.0))
            errors[key] = (rows + count, total + count * cosine)
    found = [Confusion(names[a], names[b] if b >= 0 else OTHER, rows, total / rows,
                       clinical_difference(names[a], names[b]) if b >= 0 else None)
             for (a, b), (rows, total) in errors.items()]
    return sorted(found, key=lambda error: (-error.n, error.reference, error.prediction))[:LISTED]


def save_evaluation(evaluation: Evaluation, folder: str | Path, rows: Sequence[Mapping[str, str]], predictions: Sequence[str],
                    probabilities: Sequence[float | None] | None = None) -> None:
    """Write metrics.json and predictions.csv, the latter for its owner only (it holds the notes).

    Args: rows: the input's cells by column. predictions, probabilities: of each row; without a probability its cell is empty.
    Raises:
        DataError: unequal lengths, or an input column named prediction or probability.
        OutputError: the folder cannot be written.
    """
    chances = list(probabilities) if probabilities is not None else [None] * len(rows)
    if not len(rows) == len(predictions) == len(chances):
        raise DataError(f"{len(rows)} rows, {len(predictions)} predictions and {len(chances)} probabilities don't match; "
                        "give one each a row")
    folder, found = Path(folder), list(dict.fromkeys(column for row in rows for column in row))
    columns = added_columns("the input", found, ("prediction", "probability"))
    with TableWriter(folder / "predictions.csv", columns, overwrite=True) as writer:
        for row, prediction, chance in zip(rows, predictions, chances, strict=True):
            writer.write({**row, "prediction": prediction, "probability": chance})
    write_json(folder / "metrics.json", evaluation.to_dict())


def format_table(evaluation: Evaluation, worst: int = 5) -> str:
    """A few lines for a terminal: scores with intervals and baselines, the hardest labels, pairs that cosine calls close.

    Args: worst: rows of each list.
    """
    head = f"{f'{evaluation.n:,} rows':<12}{'score':>7}  {'95 % interval':<14}"
    lines = [head + "".join(f"{name:>10}" for name in evaluation.baselines)]
    for name, key in (("exact match", "exact_match"), ("macro F1", "macro_f1"), ("cosine", "cosine")):
        low, high = evaluation.intervals[key]
        lines.append(f"{name:<12}{getattr(evaluation, key):>7.3f}  [{low:.3f}, {high:.3f}]"
                     + "".join(f"{getattr(baseline, key):>10.3f}" for baseline in evaluation.baselines.values()))
    lines.append(f"{'weighted F1':<12}{evaluation.weighted_f1:>7.3f}")
    if evaluation.mean_probability is not None and evaluation.calibration_error is not None:
        lines.append(f"mean probability {evaluation.mean_probability:.3f}, "
                     f"calibration error {evaluation.calibration_error:.3f}")
    if evaluation.outside:
        lines.append(f"{evaluation.outside:,} answers are no reference label")
    wrong = [row for row in evaluation.per_label if row.f1 < 1]
    if wrong:
        lines += ["", f"{'hardest labels':<40}{'n':>5}{'precision':>11}{'recall':>8}{'F1':>7}{'cosine':>8}"]
        lines += [f"{row.label[:39]:<40}{row.n:>5}{row.precision:>11.2f}{row.recall:>8.2f}{row.f1:>7.2f}{row.cosine:>8.2f}"
                  for row in sorted(wrong, key=lambda row: (row.f1, -row.n, row.label))[:worst]]
    if evaluation.confusions:
        lines += ["", "most frequent errors (times, cosine)"]
        lines += [f"{error.n:>5} {error.cosine:.3f}  {error.reference} -> {error.prediction}"
                  + (f"  {error.difference}" if error.difference else "") for error in evaluation.confusions[:worst]]
    if evaluation.close_pairs:
        lines += ["", "close by cosine, clinically different (cosine, times confused)"]
        lines += [f"{pair.cosine:.3f} {pair.confused:>5}  {pair.a} | {pair.b}  {pair.difference}"
                  for pair in evaluation.close_pairs[:worst]]
    return "\n".join(lines)
