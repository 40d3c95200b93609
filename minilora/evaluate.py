"""How good are predicted labels, how sure is that, and what would a guess have scored?

Exact match and F1 say how often the answer is right, cosine similarity of embeddings how far off it reads.  Cosine
flatters: "CT Abdomen W Contrast" and "CT Abdomen WO Contrast" are nearly the same text and clinically opposite.  So it
stands beside two baselines that know nothing of the notes (the references shuffled, and always the most frequent label),
and beside the pairs of labels that it calls close although their names say something different.

Two labels are the same answer when `metrics.normalize_label` makes them equal.  Scores hold no note, and what
a model wrote freely, which may repeat one, is in no table here unless it is a known label.

Lesson 15 explains it.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from minilora.calibration import calibration_error, coverage, picked, reliability
from minilora.clinical import clinical_difference, close_pairs, weigh_errors
from minilora.compare import compare_answers, p_said
from minilora.data.table_writer import TableWriter, added_columns
from minilora.duplicates import THRESHOLD, Twins
from minilora.embed import Embedder
from minilora.errors import ConfigError, DataError
from minilora.evaluation import (
    LISTED,
    OTHER,
    Baseline,
    Confusion,
    ConfusionMatrix,
    CosineHistogram,
    CoveragePoint,
    Evaluation,
    LabelRow,
    NearDuplicates,
    ReliabilityBin,
)
from minilora.files import write_json
from minilora.metrics import (
    Floats,
    Pairs,
    bootstrap_intervals,
    cosine_histogram,
    count_pairs,
    label_scores,
    normalize_label,
    number_labels,
    said_of_few_rows,
    summarize,
    top_k,
    weighted_f1,
)

RUNNER_UP = ("runner_up", "runner_up_probability")

__all__ = ["OTHER", "Baseline", "Evaluation", "evaluate", "format_table", "save_evaluation"]


def evaluate(predictions: Sequence[str], references: Sequence[str], embedder: Embedder,
             probabilities: Sequence[float] | None = None, seed: int = 0, resamples: int = 1000,
             labels: Sequence[str] = (), ranked: Sequence[Sequence[str]] | None = None,
             others: Mapping[str, Sequence[str]] | None = None, twins: Twins | None = None) -> Evaluation:
    """Score predicted labels against the right ones.

    Args:
        predictions: n answers; "" is one that is always wrong. references: n right labels.
        embedder: n texts -> (n, d), see `embed`; called once, with each distinct label once.
        probabilities: of the predictions, each in [0, 1].
        seed: of bootstrap and shuffled baseline. resamples: of the bootstrap.
        labels: names beside the references that confusions may spell out, i.e. the set that answers were chosen from.
        ranked: of each row the most probable labels, the answer first.
        others: what other methods answered to the same rows, by name: scored as baselines, and compared with row by row.
        twins: how close each row comes to the training table (`duplicates.find_twins`).

    Raises:
        DataError: nothing to score, unequal lengths, an empty reference, a probability outside [0, 1].
        ConfigError: resamples below 1, a seed below 0, or an embedder whose answer isn't one finite vector a text.
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
    if resamples < 1 or seed < 0:
        raise ConfigError(f"resamples must be at least 1 and seed at least 0, not {resamples} and {seed}")
    others = others or {}
    uneven = next((name for name, answers in others.items() if len(answers) != n), None)
    if uneven is not None or (ranked is not None and len(ranked) != n) or (twins is not None and len(twins.similarity) != n):
        raise DataError(f"{uneven or 'the ranking, or what is near the training table,'} has not one entry for each of the {n} "
                        "rows; give one each a row")
    names, codes = number_labels([*references, *predictions, *(label for answers in others.values() for label in answers)])
    reference, prediction, *more = np.split(codes, len(codes) // n)
    vectors, rng = _embed(embedder, names), np.random.default_rng(seed)
    pairs = count_pairs(reference, prediction, vectors)
    scores, rates = _first(summarize(pairs)), label_scores(pairs)
    intervals = bootstrap_intervals(pairs, resamples, rng)
    known = sorted(np.unique(reference).tolist(), key=lambda code: names[code])
    majority = max(known, key=lambda code: rates.n[code])      # of several the first by name: row order decides nothing
    shuffled = _first(summarize(count_pairs(reference, rng.permutation(reference), vectors)))
    constant = _first(summarize(count_pairs(reference, np.full_like(reference, majority), vectors)))
    baselines = {"shuffled": Baseline(label=None, **shuffled), "majority": Baseline(label=names[majority], **constant)}
    right = reference == prediction
    for name, answers in zip(others, more, strict=True):
        baselines[name] = Baseline(label=None, **_first(summarize(count_pairs(reference, answers, vectors))))
    comparisons = {name: compare_answers(right, reference == answers, seed, resamples)
                   for name, answers in zip(others, more, strict=True)}
    rows = [LabelRow(names[k], int(rates.n[k]), int(rates.predicted[k]), float(rates.precision[k]),
                     float(rates.recall[k]), float(rates.f1[k]), float(rates.cosine[k])) for k in known]
    given = _probabilities(probabilities) if probabilities is not None else None
    bins, points = _curves(given, right) if given is not None else ([], [])
    allowed = {normalize_label(label) for label in labels}
    shown = {code for code, name in enumerate(names) if normalize_label(name) in allowed}.union(known)
    outside = int(pairs.count[~np.isin(pairs.prediction, known)].sum())
    rows_by_cosine, wrong_by_cosine = cosine_histogram(pairs)
    return Evaluation(n, scores["exact_match"], scores["macro_f1"], weighted_f1(rates), scores["cosine"], intervals, baselines,
                      per_label=rows, close_pairs=close_pairs(known, names, vectors, pairs, LISTED),
                      confusions=_confusions(pairs, names, shown), outside=outside,
                      mean_probability=float(given.mean()) if given is not None else None,
                      calibration_error=calibration_error(given, right) if given is not None else None, seed=seed,
                      resamples=resamples, clinical=weigh_errors(pairs, names, shown, rng, resamples),
                      cosine_histogram=CosineHistogram(rows_by_cosine.tolist(), wrong_by_cosine.tolist()),
                      confusion_matrix=_confusion_matrix(pairs, names, shown),
                      top_k=top_k(ranked, references) if ranked is not None else {}, reliability=bins, coverage=points,
                      comparisons=comparisons, near_duplicates=_near_duplicates(twins, right) if twins is not None else None)


def _probabilities(values: Sequence[float]) -> Floats:
    given = np.asarray(values, dtype=np.float64)
    # Trap: NaN fails every comparison, so ask for what must hold. The exp of a rounded log may exceed 1.
    if not ((given >= 0) & (given <= 1 + 1e-5)).all():
        raise DataError("a probability is not between 0 and 1; give probabilities, not logits or percentages")
    return np.asarray(given.clip(0, 1))


def _curves(given: Floats, right: NDArray[np.bool_]) -> tuple[list[ReliabilityBin], list[CoveragePoint]]:
    """The reliability curve, and the points of the coverage curve that a table shows."""
    found, curve = reliability(given, right), coverage(given, right)
    columns = (found.n.tolist(), found.probability.tolist(), found.accuracy.tolist())
    return [ReliabilityBin(*values) for values in zip(*columns, strict=True)], [
        CoveragePoint(float(curve.threshold[at]), float(curve.share[at]), float(curve.accuracy[at])) for at in picked(curve)]


def _confusion_matrix(pairs: Pairs, names: list[str], shown: set[int]) -> ConfusionMatrix:
    codes = sorted({code for code in (*pairs.reference.tolist(), *pairs.prediction.tolist()) if code in shown},
                   key=lambda code: names[code])
    places = {code: place for place, code in enumerate(codes)}
    cells: dict[tuple[int, int], int] = {}
    for a, b, count in zip(pairs.reference.tolist(), pairs.prediction.tolist(), pairs.count.tolist(), strict=True):
        cell = (places[a], places.get(b, len(codes)))
        cells[cell] = cells.get(cell, 0) + count
    return ConfusionMatrix([*(names[code] for code in codes), OTHER], [(*cell, cells[cell]) for cell in sorted(cells)])


def _near_duplicates(twins: Twins, right: NDArray[np.bool_]) -> NearDuplicates:
    alone = right[twins.similarity == 0]
    return NearDuplicates(twins.same, twins.near, THRESHOLD, len(alone), float(alone.mean()) if len(alone) else None)


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
                    probabilities: Sequence[float | None] | None = None,
                    runners_up: Sequence[tuple[str | None, float | None]] | None = None) -> None:
    """Write metrics.json and predictions.csv, the latter for its owner only (it holds the notes).

    Args:
        rows: the input's cells by column. predictions, probabilities: of each row; without a probability its cell is empty.
        runners_up: the second best label and its probability; default no columns for them.

    Raises:
        DataError: unequal lengths, or an input column named as one that is added.
        OutputError: the folder cannot be written.
    """
    chances = list(probabilities) if probabilities is not None else [None] * len(rows)
    seconds: list[dict[str, str | float | None]] = [{} for _ in rows]
    if runners_up is not None:
        seconds = [dict(zip(RUNNER_UP, second, strict=True)) for second in runners_up]
    if not len(rows) == len(predictions) == len(chances) == len(seconds):
        raise DataError(f"{len(rows)} rows, {len(predictions)} predictions, {len(chances)} probabilities and {len(seconds)} "
                        "runners-up don't match; give one each a row")
    folder, found = Path(folder), list(dict.fromkeys(column for row in rows for column in row))
    columns = added_columns("the input", found, ("prediction", "probability", *(RUNNER_UP if runners_up is not None else ())))
    with TableWriter(folder / "predictions.csv", columns, overwrite=True) as writer:
        for row, prediction, chance, second in zip(rows, predictions, chances, seconds, strict=True):
            writer.write({**row, "prediction": prediction, "probability": chance, **second})
    write_json(folder / "metrics.json", evaluation.to_dict())


def _width(name: str) -> int:
    return max(10, len(name) + 2)


def _beside(evaluation: Evaluation) -> list[str]:
    """Errors weighed, rows that the training table holds, and whether other methods are better."""
    low, high = evaluation.clinical.interval
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(evaluation.clinical.kinds.items(), key=lambda entry: -entry[1]))
    lines = [f"{'clinical cost':<13}{evaluation.clinical.cost:>6.3f}  [{low:.3f}, {high:.3f}]  {kinds}".rstrip()]
    twins = evaluation.near_duplicates
    if twins is not None:
        without = f"; exact match without them {twins.exact_match_without:.3f}" if twins.exact_match_without is not None else ""
        lines.append(f"{twins.same:,} notes stand in the training table, {twins.near:,} nearly"
                     + (without if twins.same + twins.near else ""))
    for name, found in evaluation.comparisons.items():
        low, high = found.interval
        lines.append(f"against {name}: {100 * found.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], alone right "
                     f"in {found.only_ours:,} against {found.only_other:,}, McNemar {p_said(found.p_value)}: "
                     f"{found.verdict()}")
    return lines


def format_table(evaluation: Evaluation, worst: int = 5) -> str:
    """A few lines for a terminal: scores with intervals and baselines, the hardest labels, pairs that cosine calls close.

    Args: worst: rows of each list.
    """
    head = f"{f'{evaluation.n:,} rows':<12}{'score':>7}  {'95 % interval':<14}"
    lines = [head + "".join(f"{name:>{_width(name)}}" for name in evaluation.baselines)]
    for name, key in (("exact match", "exact_match"), ("macro F1", "macro_f1"), ("cosine", "cosine")):
        low, high = evaluation.intervals[key]
        lines.append(f"{name:<12}{getattr(evaluation, key):>7.3f}  [{low:.3f}, {high:.3f}]"
                     + "".join(f"{getattr(guess, key):>{_width(guess_name)}.3f}"
                               for guess_name, guess in evaluation.baselines.items()))
    lines.append(f"{'weighted F1':<12}{evaluation.weighted_f1:>7.3f}")
    lines += [f"{f'in the top {k}':<12}{share:>7.3f}" for k, share in evaluation.top_k.items() if k != "1"]
    lines += [few] if (few := said_of_few_rows(evaluation.n)) else []
    lines += _beside(evaluation)
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
