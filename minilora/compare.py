"""Is one predictor better than another, or was it luck?  Two sets of answers to the same rows.

Rows that both get right or both get wrong say nothing of which is better.  Of the rest let b be those that only the first
has right, c those that only the other has.  If the two were equally good, each such row would be a fair coin:

    p = min(1, 2 · Σ_{i ≤ min(b, c)} C(b + c, i) / 2^(b + c))               McNemar's test in its exact form

It asks far less of the data than two intervals that must not overlap, since hard rows are hard for both (McNemar 1947,
Psychometrika 12; Dietterich 1998, Neural Computation 10, section 3.1).  It knows rows, not training runs: another seed of
the same training may differ by as much.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minilora.data.formats import cell_text, records, shown, table_format
from minilora.errors import DataError
from minilora.metrics import normalize_label

PREDICTIONS_FILE = "predictions.csv"
SURE = 0.05             # p below which a difference is called one


@dataclass(frozen=True)
class Comparison:
    """Ours against another's answers to the same n rows.

    Attributes:
        exact_match, other: of ours and of the other. difference: ours minus the other's, with its 95 % interval (bootstrap).
        only_ours, only_other: rows that one of them alone has right. p_value: McNemar's, exact.
    """

    n: int
    exact_match: float
    other: float
    difference: float
    interval: tuple[float, float]
    only_ours: int
    only_other: int
    p_value: float

    def verdict(self) -> str:
        """Which is better, in a word: "better", "worse" or "not told apart"."""
        if self.p_value >= SURE:
            return "not told apart"
        return "better" if self.difference > 0 else "worse"


def mcnemar(only_ours: int, only_other: int) -> float:
    """The exact two-sided p-value of McNemar's test.

    Guarantee: equal to scipy's binomial test (tests/test_compare.py); whole numbers until the last division.
    """
    n, fewer = only_ours + only_other, min(only_ours, only_other)
    term = total = 1
    for i in range(fewer):
        term = term * (n - i) // (i + 1)        # C(n, i + 1)
        total += term
    return min(1.0, 2 * total / 2 ** n)


def compare_answers(ours: NDArray[np.bool_], other: NDArray[np.bool_], seed: int = 0, resamples: int = 1000) -> Comparison:
    """Compare by which rows are right.

    Args: ours, other: (n,) bool, n at least 1. seed, resamples: of the interval of the difference.
    Raises: DataError: unequal lengths, or no rows.
    """
    n = len(ours)
    if not n or len(other) != n:
        raise DataError(f"{n} and {len(other)} answers cannot be compared; give both on the same rows, at least one")
    first, second = int((ours & ~other).sum()), int((other & ~ours).sum())
    # Only three things can happen to a row, so a resample is three numbers (metrics.bootstrap_intervals).
    draws = np.random.default_rng(seed).multinomial(n, [first / n, second / n, (n - first - second) / n], size=resamples)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / n, [2.5, 97.5])
    return Comparison(n, float(ours.mean()), float(other.mean()), (first - second) / n, (float(low), float(high)), first,
                      second, mcnemar(first, second))


def predictions_file(path: str | Path) -> Path:
    """The table of predictions that a path means: itself, be it a file or a folder that Spark wrote, that of an evaluation's
    folder, or of the only one in a run folder.

    Raises: DataError: none there, or several.
    """
    path = Path(path)
    if not path.is_dir() or any(path.glob("part-*")):
        return path
    if (path / PREDICTIONS_FILE).is_file():
        return path / PREDICTIONS_FILE
    inside = sorted(path.glob(f"*/{PREDICTIONS_FILE}"))
    if len(inside) != 1:
        raise DataError(f"{path} holds {len(inside) or 'no'} {PREDICTIONS_FILE}; name the folder that minilora evaluate wrote "
                        "(--out), or a table with a column prediction")
    return inside[0]


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a table of predictions, all cells as text.

    Raises: DataError: it cannot be read, or has no column prediction.
    """
    file = predictions_file(path)
    rows = [{key: value if isinstance(value, str) else cell_text(value) for key, value in values.items()}
            for _, values in records(file, table_format(file, None))]
    if any("prediction" not in row for row in rows):
        raise DataError(f"{file}: no column 'prediction'; name what minilora evaluate or predict wrote")
    return rows


def aligned_predictions(path: str | Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[str]:
    """Another's predictions of the same rows in the same order.

    Args: rows: ours. columns: those that must hold the same in both, where the other has them; it must have one.
    Raises: DataError: as `read_rows`; another number of rows, or a row that differs.
    """
    file, other = predictions_file(path), read_rows(path)
    shared = [column for column in columns if column in other[0]]
    if not shared:
        raise DataError(f"{file} has none of the columns {', '.join(map(shown, columns))}, so its rows cannot be told; compare "
                        "predictions of one table")
    if len(other) != len(rows):
        raise DataError(f"{file} has {len(other):,} rows and the other table {len(rows):,}; compare predictions of one table")
    for number, (theirs, mine) in enumerate(zip(other, rows, strict=True), start=1):
        differs = next((column for column in shared if theirs.get(column, "") != mine.get(column, "")), None)
        if differs is not None:
            raise DataError(f"{file} row {number} differs from the other table's in column {shown(differs)}; compare "
                            "predictions of one table, in one order")
    return [row["prediction"] for row in other]


def right_answers(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.bool_]:
    """(n,) whether each prediction equals its reference (`metrics.normalize_label`)."""
    return np.array([normalize_label(answer) == normalize_label(reference)
                     for answer, reference in zip(predictions, references, strict=True)], dtype=bool)


def compare_files(ours: str | Path, other: str | Path, label_column: str, seed: int = 0) -> Comparison:
    """Compare two tables of predictions, or the folders that hold them.

    Raises: DataError: as `aligned_predictions`; a row without a label.
    """
    rows = read_rows(ours)
    added = ("prediction", "probability", "error", "runner_up", "runner_up_probability")
    unlabelled = next((number for number, row in enumerate(rows, start=1) if not row.get(label_column, "").strip()), None)
    if unlabelled is not None:
        raise DataError(f"{predictions_file(ours)} row {unlabelled} has no label in column {label_column!r}; name the column "
                        "with --label-column")
    theirs = aligned_predictions(other, rows, [column for column in rows[0] if column not in added])
    references = [row[label_column] for row in rows]
    mine = right_answers([row["prediction"] for row in rows], references)
    return compare_answers(mine, right_answers(theirs, references), seed)


def p_text(value: float) -> str:
    """A p-value as people write it: 0.031, 2e-07, < 1e-300."""
    return "< 1e-300" if value < 1e-300 else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def p_said(value: float) -> str:
    """The same in a sentence: "p = 0.031"."""
    return f"p {'' if value < 1e-300 else '= '}{p_text(value)}"


def format_comparison(found: Comparison, ours: str, other: str) -> str:
    """A few lines for a terminal."""
    low, high = found.interval
    width = max(len(ours), len(other))
    word = {"better": f"{ours} is better", "worse": f"{other} is better", "not told apart": "they cannot be told apart"}
    return "\n".join([
        f"{found.n:,} rows",
        f"{ours:<{width}}  exact {found.exact_match:6.1%}   alone right in {found.only_ours:,}",
        f"{other:<{width}}  exact {found.other:6.1%}   alone right in {found.only_other:,}",
        f"difference {100 * found.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]; McNemar's exact test: "
        f"{p_said(found.p_value)}, {word[found.verdict()]}"])
