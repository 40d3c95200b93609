"""Small tables of notes for tests of the whole way from a table to predictions."""
from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

SECRET = "Quasimodo"        # stands in every note; must come out nowhere but in predictions
LABELS = ["C-Spine(Bone)", "CT Abdomen W Contrast", "CT Brain", "MR Knee, left"]


def notes(n: int, labels: Sequence[str] = LABELS) -> list[tuple[str, str]]:
    """(note, label) pairs of unequal length, the labels in turn."""
    return [(f"{SECRET} {index}: {'pain, ' * (index % 5)}r/o fracture", labels[index % len(labels)]) for index in range(n)]


def write_csv(path: Path, rows: Sequence[Sequence[str]], columns: Sequence[str] = ("input", "label")) -> Path:
    """A table as a spreadsheet program saves it."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path
