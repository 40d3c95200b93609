"""What `minilora evaluate --out DIR` wrote: metrics.json and predictions.csv.

Which evaluation is a run's: the one that is named; else the only one inside the run folder; else the only one that says, by its
hash, that it is of the run's adapter; else the only one beside the folder, where no other run lies that it could be of.
Anything else is left to the user, and the page says so.

Note text is patient data.  Notes are kept only if they are asked for, and an answer that is no known label may repeat one, so
it is never kept at all: it becomes `OTHER`.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilora.adapters import WEIGHTS_FILE
from minilora.clinical import ClosePair
from minilora.data.formats import records
from minilora.errors import DataError
from minilora.evaluate import OTHER
from minilora.files import file_sha256
from minilora.metrics import Floats, Ints, normalize_label, number_labels
from minilora.report.checked import checked_interval, checked_object, checked_rate, checked_rows, read_json
from minilora.report.held import Held, read_held
from minilora.report.runfiles import RunFiles, finite
from minilora.runs import CONFIG_FILE

SCORES_FILE, PREDICTIONS_FILE = "metrics.json", "predictions.csv"
RATES = ("exact_match", "macro_f1", "weighted_f1", "cosine")


@dataclass(frozen=True)
class ScoreFiles:
    """An evaluation that was read.

    Attributes:
        scores: each of `RATES` that it has. intervals: (low, high) of some. baselines: by name, what they score.
        cosines: mean cosine by normalized label, where known. close_pairs: as `evaluate` wrote them.
        names: known labels, by code; the last is `OTHER`. reference, prediction: (n,) codes. references: labels that occur.
        probability: (n,) of the answers; None unless every row has one.
        notes: (n,) of the rows, None unless they were asked for. held: what the answers were held against.
    """

    folder: Path
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    baselines: dict[str, dict[str, Any]]
    cosines: dict[str, float]
    close_pairs: list[ClosePair]
    names: list[str]
    reference: Ints
    prediction: Ints
    probability: Floats | None
    notes: list[str] | None
    held: Held

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.reference)

    @property
    def right(self) -> NDArray[np.bool_]:
        """(n,) whether the answer is the reference."""
        return self.reference == self.prediction


def _holds_evaluation(folder: Path) -> bool:
    return (folder / SCORES_FILE).is_file() and (folder / PREDICTIONS_FILE).is_file()


def find_evaluation(run: Path) -> tuple[Path | None, str]:
    """The evaluation that is certainly of this run, and otherwise what to tell the reader."""
    def folders(parent: Path) -> list[Path]:
        try:
            return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:         # a parent that may not be listed holds none for us
            return []

    def named(path: Path) -> Path:
        return run.parent / path.name if run.name not in ("", "..") else path

    inside = [path for path in folders(run) if _holds_evaluation(path)]
    if len(inside) == 1:
        return inside[0], ""
    adapter = run / WEIGHTS_FILE
    own = file_sha256(adapter) if adapter.is_file() else None
    near = [path for path in folders(run.resolve().parent) if path != run.resolve()]
    beside = [path for path in near if _holds_evaluation(path)]
    for group in (inside, beside):
        certain = [path for path in group if own is not None and _adapter_of(path) == own]
        if len(certain) == 1:
            return certain[0] if group is inside else named(certain[0]), ""
    if inside:
        return None, (f"There are {len(inside)} evaluations in the run folder ({', '.join(path.name for path in inside)}); "
                      "name one with --evaluation.")
    possible = [path for path in beside if own is None or _adapter_of(path) in (own, None)]
    if len(possible) == 1 and len(beside) == 1 and not any((path / CONFIG_FILE).is_file() for path in near):
        return named(possible[0]), ""
    if possible:
        return None, ("There are evaluations beside the run folder that may be of another run; name this run's with "
                      "--evaluation.")
    return None, ""


def _adapter_of(folder: Path) -> str | None:
    """The hash of the adapter that an evaluation says it is of."""
    try:
        scored = read_json(folder / SCORES_FILE).get("scored")
    except DataError:
        return None
    adapter = scored.get("adapter") if isinstance(scored, dict) else None
    return adapter if isinstance(adapter, str) else None


def read_evaluation(folder: Path, run: RunFiles, keep_notes: bool) -> ScoreFiles:
    """Read an evaluation of a run, and check that its two files say the same.

    Raises: DataError: a file is missing, malformed, or of another evaluation.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the one that minilora evaluate wrote (--out)")
    missing = next((name for name in (SCORES_FILE, PREDICTIONS_FILE) if not (folder / name).is_file()), None)
    if missing:
        raise DataError(f"{folder} holds no {missing}; name the folder that minilora evaluate wrote (--out)")
    path = folder / SCORES_FILE
    values = read_json(path)
    scores = {name: checked_rate(values[name], f"{path}: {name}") for name in RATES if name in values}
    absent = next((name for name in ("exact_match", "macro_f1", "cosine") if name not in scores), None)
    if absent or not isinstance(values.get("n"), int):
        raise DataError(f"{path} lacks {absent or 'n'}; write it again with minilora evaluate --overwrite")
    intervals = {name: checked_interval(pair, f"{path}: interval of {name}")
                 for name, pair in checked_object(values.get("intervals", {}), path, "intervals").items() if name in RATES}
    baselines = {name: {key: checked_rate(rate, f"{path}: {key} of {name}") if key in RATES else rate
                        for key, rate in checked_object(entry, path, name).items()}
                 for name, entry in checked_object(values.get("baselines", {}), path, "baselines").items()}
    cosines = {normalize_label(str(row["label"])): checked_rate(row["cosine"], f"{path}: cosine of a label")
               for row in checked_rows(values, "per_label", ("label", "cosine"), path)}
    pairs = [ClosePair(str(row["a"]), str(row["b"]), checked_rate(row["cosine"], f"{path}: cosine of a close pair"),
                       str(row["difference"]), int(finite(row["confused"]) or 0))
             for row in checked_rows(values, "close_pairs", ("a", "b", "cosine", "difference", "confused"), path)]

    rows = _read_predictions(folder / PREDICTIONS_FILE, run, keep_notes)
    names, codes = number_labels([*rows.references, *run.labels])
    known = {normalize_label(name): code for code, name in enumerate(names)}
    prediction = np.array([known.get(normalize_label(text), len(names)) for text in rows.predictions], dtype=np.int64)
    reference = codes[: len(rows.references)]
    if values["n"] != len(reference) or abs(float((reference == prediction).mean()) - scores["exact_match"]) > 1e-6:
        raise DataError(f"{folder}: {SCORES_FILE} and {PREDICTIONS_FILE} do not belong together ({values['n']:,} rows against "
                        f"{len(reference):,}, or another exact match); write both again with minilora evaluate --overwrite")
    return ScoreFiles(folder, scores, intervals, baselines, cosines, pairs, [*names, OTHER], reference, prediction,
                      rows.probability, rows.notes, read_held(values, path))


@dataclass(frozen=True)
class _Predictions:
    references: list[str]
    predictions: list[str]
    probability: Floats | None
    notes: list[str] | None


def _read_predictions(path: Path, run: RunFiles, keep_notes: bool) -> _Predictions:
    references: list[str] = []
    predictions: list[str] = []
    chances: list[float | None] = []
    notes: list[str] = []
    label = note = ""
    for line, cells in records(path, "csv"):
        if not references:
            label = _column(path, cells, (run.config.label_column, "label"), "labels")
            note = _column(path, cells, (run.config.input_column, "input"), "notes") if keep_notes else ""
            for name in ("prediction", "probability"):
                _column(path, cells, (name,), f"{name} of each row")
        if not cells[label].strip():
            raise DataError(f"{path} row {len(references) + 1} (line {line}) has no label in column {label!r}; write the file "
                            "again with minilora evaluate --overwrite")
        references.append(cells[label])
        predictions.append(cells["prediction"])
        chances.append(_chance(cells["probability"], f"{path} row {len(references)} (line {line})"))
        if keep_notes:
            notes.append(cells[note])
    known = [chance for chance in chances if chance is not None]
    return _Predictions(references, predictions, np.array(known) if len(known) == len(chances) else None,
                        notes if keep_notes else None)


def _column(path: Path, cells: dict[str, Any], names: Sequence[str], what: str) -> str:
    found = next((name for name in names if name in cells), None)
    if found is None:
        raise DataError(f"{path}: no column {names[0]!r} with the {what}; write the file again with minilora evaluate, on a "
                        "table with the columns of the training table")
    return found


def _chance(cell: str, where: str) -> float | None:
    if not cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1 + 1e-5:      # NaN fails too; the exp of a rounded log may exceed 1
        raise DataError(f"{where}: the probability is no number between 0 and 1; write the file again with minilora evaluate "
                        "--overwrite")
    return min(value, 1.0)
