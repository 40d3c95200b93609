"""Order notes in a language that no model has read, under codes that say nothing: the hardest case for a small base.

    python scripts/foreign_notes.py OUT [--n 15500 --labels 30 --seed 0]
    python scripts/foreign_notes.py OUT --codes-for TABLE [...]      notes of a table under codes, split at random

Each writes train.csv, val.csv and test.csv, with columns note and label.

Made-up words of two or three syllables, as frequent as words are (Zipf).  A label has ten words of its own, one of which it
shares with a neighbour; a note holds one to three of them among words that decide nothing.  One note in ten names a second
label's words as well, behind a word that says no, or as what was there before: which of the two counts is in the order of
words.  One word in forty has a typing error.  Labels are as unequal as orders are, from 15 % to 1.4 %.
"""
from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

ONSETS = ("b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "kr", "pr", "st", "tr", "zh")
CORES = ("a", "a", "e", "e", "i", "i", "o", "o", "u", "u", "ai", "ou", "ä")
CODAS = ("", "", "", "", "n", "r", "s", "l", "k", "m")
WORDS, OWN, SHARED = 3_000, 10, 1       # of the language; of a label; of these, a neighbour's as well
TWO_LABELS, TYPING_ERRORS = 1 / 10, 1 / 40
LETTERS = "abdefghijklmnoprstuvz"


def words(rng: np.random.Generator, n: int) -> list[str]:
    """Different made-up words; the first, which are the most frequent, are short."""
    found: dict[str, None] = {}
    while len(found) < n:
        syllables = 1 + int(rng.integers(0, 2)) if len(found) < 60 else int(rng.integers(2, 4))
        found["".join(str(rng.choice(part)) for _ in range(syllables) for part in (ONSETS, CORES, CODAS))] = None
    return list(found)


def codes(rng: np.random.Generator, n: int) -> list[str]:
    """Different codes such as Q7-41."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[f"{chr(65 + int(rng.integers(26)))}{rng.integers(10)}-{rng.integers(10, 100)}"] = None
    return list(found)


def misspelt(rng: np.random.Generator, word: str) -> str:
    """One letter lost, doubled, exchanged with the next or replaced."""
    at = int(rng.integers(len(word)))
    return [word[:at] + word[at + 1 :], word[: at + 1] + word[at:], word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
            word[:at] + LETTERS[int(rng.integers(len(LETTERS)))] + word[at + 1 :]][int(rng.integers(4))] or word


def shares(labels: int) -> np.ndarray:
    """How unequal labels are: the sum is 1."""
    share: np.ndarray = 1 / (np.arange(labels) + 1.0) ** 0.7
    return share / share.sum()


def write_notes(n: int, labels: int, seed: int) -> list[tuple[str, str]]:
    """n different notes with their labels."""
    rng = np.random.default_rng(seed)
    vocabulary = words(rng, WORDS)
    no, before, after = vocabulary[10], vocabulary[11], vocabulary[12]       # "no", "used to be", "now"
    frequency = 1 / (np.arange(WORDS) + 2.7)                                 # Zipf, as Mandelbrot wrote it
    frequency /= frequency.sum()
    order = rng.permutation(np.arange(60, WORDS))
    own = [[vocabulary[int(at)] for at in order[label * OWN : (label + 1) * OWN]] for label in range(labels)]
    own = [mine + own[(label + 1) % labels][:SHARED] for label, mine in enumerate(own)]
    kept = {word for mine in own for word in mine} | {no, before, after}
    filler = np.array([word not in kept for word in vocabulary])
    frequency = frequency * filler / (frequency * filler).sum()
    share = shares(labels)
    names = codes(rng, labels)

    def mentions(label: int) -> list[str]:
        return [str(word) for word in rng.choice(own[label], int(rng.integers(1, 4)), replace=False)]

    found: dict[str, str] = {}
    while len(found) < n:
        label = int(rng.choice(labels, p=share))
        text = [vocabulary[int(at)] for at in rng.choice(WORDS, int(rng.integers(5, 18)), p=frequency)]
        parts = [mentions(label)]
        if rng.random() < TWO_LABELS:
            other = int(rng.choice(labels, p=share))
            parts = [[no, *mentions(other)], *parts] if rng.random() < 0.5 else [[before, *mentions(other)], [after, *parts[0]]]
            if rng.random() < 0.5:
                parts.reverse()
        places = sorted(int(at) for at in rng.integers(0, len(text) + 1, len(parts)))
        for at, part in list(zip(places, parts, strict=True))[::-1]:
            text[at:at] = part
        text = [misspelt(rng, word) if len(word) > 3 and rng.random() < TYPING_ERRORS else word for word in text]
        found.setdefault(" ".join(text), names[label])
    return list(found.items())


def under_codes(path: Path, n: int, labels: int, seed: int) -> list[tuple[str, str]]:
    """At most n notes of a table, a code for each label: the most frequent labels, as unequal as those of `write_notes`."""
    rng = np.random.default_rng(seed)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(row["note"], row["label"]) for row in csv.DictReader(file)]
    rows = [rows[int(at)] for at in rng.permutation(len(rows))]
    by_label = {label: [row for row in rows if row[1] == label] for label in sorted({label for _, label in rows})}
    most = sorted(by_label, key=lambda label: -len(by_label[label]))[:labels]
    share = shares(len(most))
    names = codes(rng, len(most))
    total = min(n, *(int(len(by_label[label]) / part) for label, part in zip(most, share, strict=True)))
    kept = [(note, name) for label, name, part in zip(most, names, share, strict=True)
            for note, _ in by_label[label][: round(total * part)]]
    return [kept[int(at)] for at in rng.permutation(len(kept))]


def main() -> None:
    """Write train.csv, val.csv and test.csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--n", type=int, default=15_500, help="notes of train, val and test together (80/10/10)")
    parser.add_argument("--labels", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codes-for", type=Path, metavar="TABLE", help="take the notes of this table (note, label)")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = under_codes(asked.codes_for, asked.n, asked.labels, asked.seed) if asked.codes_for else \
        write_notes(asked.n, asked.labels, asked.seed)
    tenth = len(rows) // 10
    for name, part in (("train", rows[2 * tenth :]), ("val", rows[:tenth]), ("test", rows[tenth : 2 * tenth])):
        with (asked.out / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("note", "label"), *part])


if __name__ == "__main__":
    main()
