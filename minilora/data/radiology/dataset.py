"""Splits that share no note and no phrasing family, and their CSV files."""
from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from random import Random

from minilora.data.radiology.cases import Case
from minilora.data.radiology.draw import draw_case
from minilora.data.radiology.families import families
from minilora.data.radiology.notes import write_note
from minilora.data.radiology.protocols import PROTOCOLS
from minilora.data.radiology.rules import protocol_for
from minilora.errors import ConfigError
from minilora.files import Kind, new_folder

SPLITS = ("train", "val", "test")
SMALLEST, LARGEST = 100, 10_000_000
KIND = Kind("train.csv", ("train.csv", "val.csv", "test.csv", "labels.txt"))
CAPITALS = 0.15     # share of the training notes that come as some ordering systems send them: in capitals throughout


@dataclass(frozen=True)
class Example:
    """One row, and what it was made from: the case, the rules that changed its default protocol, the phrasing family."""

    note: str
    label: str
    case: Case
    rules: tuple[str, ...]
    family: str


def labels() -> list[str]:
    """Every protocol name, sorted."""
    return sorted(PROTOCOLS)


def generate(n: int = 10_000, seed: int = 0) -> dict[str, list[Example]]:
    """Draw `n` notes in all: 80 % train, 10 % val, 10 % test; no note text occurs twice.

    Args:
        n: from 100 to ten million. seed: the same seed and n give the same notes.

    Raises: ConfigError: n too small or too large, or seed negative.
    """
    if not SMALLEST <= n <= LARGEST or seed < 0:
        raise ConfigError(f"the set needs n from {SMALLEST} to {LARGEST:,} and a seed of at least 0, not n={n}, seed={seed}")
    sizes = {"val": n // 10, "test": n // 10}
    sizes["train"] = n - sum(sizes.values())
    seen: set[str] = set()
    made: dict[str, list[Example]] = {}
    for split in SPLITS:
        random = Random(f"minilora radiology {split} {seed}")       # a string is hashed by SHA-512: stable everywhere
        rows: list[Example] = []
        while len(rows) < sizes[split]:
            case, family = draw_case(random), random.choice(families(split))
            note = write_note(case, family, random)
            if split == "train" and random.random() < CAPITALS:
                note = note.upper()
            key = " ".join(note.casefold().split())
            if key in seen:
                continue
            seen.add(key)
            protocol, fired = protocol_for(case)
            rows.append(Example(note, protocol, case, fired, family.id))
        made[split] = rows
    return made


def write_dataset(out: str | Path, n: int = 10_000, seed: int = 0, overwrite: bool = False) -> dict[str, int]:
    """Write train.csv, val.csv and test.csv (columns note, label; UTF-8; owner-only) into a new folder.

    Returns: rows of each split.
    Raises: ConfigError (see `generate`), OutputError: the folder exists and `overwrite` is False, or it is no such set.
    """
    made = generate(n, seed)
    with new_folder(out, overwrite, kind=KIND) as folder:
        for split, rows in made.items():
            path = folder / f"{split}.csv"
            path.touch(mode=0o600)
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(("note", "label"))
                writer.writerows((row.note, row.label) for row in rows)
    return {split: len(rows) for split, rows in made.items()}
