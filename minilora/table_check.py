"""A table looked over before anybody trains on it: what would stop training, what would spoil it, whom it may name.

Four things make a good score mean little: a note that stands twice (once in training, once in the test), a note with two
labels (one of them is wrong, and no model can be right on both), a label with three rows, and a note that is cut because it is
longer than what the model reads.  Here they are counted.  No note and no part of one is ever shown.
"""
from __future__ import annotations

import dataclasses
import unicodedata
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.data.formats import shown
from minilora.data.prompts import DEFAULT_TEMPLATE, clean_note, encode_example, load_template, longest_label
from minilora.data.tables import MAX_LABEL_LENGTH, Row, iter_table, training_examples
from minilora.duplicates import find_twins, shingles
from minilora.errors import ConfigError, DataError
from minilora.identifiers import identifier_kinds
from minilora.llama.new_tokens import of_language, tokens_a_word
from minilora.llama.tokenizer import Tokenizer

RARE = 10               # rows below which a label is called rare
LISTED = 10             # labels that are listed
BINS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)     # tokens up to which a note counts to a bin
WIDTH = 40              # of a bar on the terminal


@dataclass(frozen=True)
class Column:
    """A column: its name, rows in which it is empty, and different values among the others."""

    name: str
    empty: int
    distinct: int


@dataclass(frozen=True)
class TableCheck:
    """What was found in n rows; "rows" are counts of rows unless something else is said.

    Attributes:
        empty_notes, empty_labels: rows without one. spellings: labels that differ from another by case or spacing alone.
        same_notes: rows whose note stood in an earlier row, word for word; near_notes: or nearly (`duplicates`).
        conflicting: rows whose note has another label elsewhere. labels: rows by label, the most frequent first; None without
            a label column, or where its values are no labels.
        tokens: 0th, 50th, 95th and 100th percentile of a note's tokens; histogram: rows up to each of `BINS`, the rest last.
        tokens_a_word: of letters, on average. identifiers: rows that seem to hold one, by kind.
        labelled: whether there is a label column. stops: what training says of the table where it refuses it.
    """

    n: int
    columns: list[Column]
    empty_notes: int
    empty_labels: int
    spellings: int
    same_notes: int
    near_notes: int
    conflicting: int
    labels: dict[str, int] | None
    tokens: tuple[int, int, int, int]
    histogram: list[int]
    tokens_a_word: float
    identifiers: dict[str, int]
    labelled: bool = True
    stops: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self) | {"bins": list(BINS)}


def _folded(label: str) -> str:
    return "".join(unicodedata.normalize("NFC", label).casefold().split())       # as `data.tables.training_examples` compares


def check_table(path: str | Path, input_column: str, label_column: str | None, tokenizer: Tokenizer, max_length: int = 512
                ) -> TableCheck:
    """Look a table over.

    Args:
        label_column: default "label", if there is such a column. tokenizer: whose tokens are counted, without BOS.
        max_length: tokens of prompt and label together, as in training.

    Raises: DataError: the table cannot be read, lacks a column that was named, or one is named for both.
    """
    if label_column == input_column:
        training_examples(path, input_column, label_column)     # says why not
    rows = list(iter_table(path, input_column))
    columns = list(dict.fromkeys(name for row in rows for name in row.values))
    if label_column is not None and label_column not in columns:
        raise DataError(f"{path}: no column {label_column!r}; there are: {', '.join(map(shown, columns[:20]))}")
    named = label_column or ("label" if "label" in columns and input_column != "label" else None)
    values = {name: Counter(row.values.get(name, "").strip() for row in rows) for name in columns}
    described = [Column(shown(name)[1:-1], values[name][""], len(values[name]) - ("" in values[name])) for name in columns]
    notes = [" ".join(clean_note(row.text).casefold().split()) for row in rows]
    twins = find_twins(notes)
    lengths = np.array([len(tokenizer.encode(row.text, bos=False)) for row in rows])
    identifiers = Counter(kind for row in rows for kind in identifier_kinds(row.text))
    spread = np.percentile(lengths, [0, 50, 95, 100], method="higher").astype(int).tolist()
    labels = dict(values[named].most_common()) if named is not None else {}
    empty_labels = labels.pop("", 0)
    # Values that nearly all differ, or are as long as notes, are no labels: they may be text that must not be shown.
    sensible = named is not None and 2 * len(labels) <= len(rows) and all(len(label) <= MAX_LABEL_LENGTH for label in labels)
    return TableCheck(
        len(rows), described, sum(not note for note in notes), empty_labels, len(labels) - len({_folded(it) for it in labels}),
        twins.same, twins.near, _conflicting(rows, notes, named) if named is not None else 0, labels if sensible else None,
        (spread[0], spread[1], spread[2], spread[3]),
        np.bincount(np.searchsorted(BINS, lengths), minlength=len(BINS) + 1).tolist(),
        tokens_a_word(tokenizer, (row.text for row in rows)),
        {kind: identifiers[kind] for kind in sorted(identifiers, key=lambda kind: -identifiers[kind])},
        named is not None, _stops(path, input_column, named, tokenizer, max_length, sensible) if named is not None else None)


def _stops(path: str | Path, input_column: str, label_column: str, tokenizer: Tokenizer, max_length: int, show_labels: bool
           ) -> str | None:
    """What training says of the table, or None: it is asked itself, so that it finds nothing that is not found here."""
    try:
        examples = training_examples(path, input_column, label_column)
        note, label, row = max(examples, key=lambda example: len(example[0]))       # needs most room
        encode_example(tokenizer, load_template(DEFAULT_TEMPLATE), note, label, max_length, row=row,
                       reserve=longest_label(tokenizer, {label for _, label, _ in examples}))
    except (DataError, ConfigError) as error:
        quotes = "differ only by" in str(error)
        return str(error) if show_labels or not quotes else f"{path}: labels differ only by case or spacing; write them one way"
    return None


def warn_of_shared_notes(data: str | Path, val: str | Path, input_column: str) -> None:
    """Say how many notes of a validation table stand in the training table: their loss tells nothing.

    The training table is read row by row.  Two notes are the same as in `duplicates.Twins.same`.

    Warns: UserWarning: there are such notes.
    """
    notes = Counter(shingles(row.text) for row in iter_table(val, input_column))
    found = {words for row in iter_table(data, input_column) if (words := shingles(row.text)) and words in notes}
    if found:
        warnings.warn(f"{val}: {sum(notes[words] for words in found):,} of {notes.total():,} notes stand in the training table "
                      f"{data} as well: of these the validation loss says what was learnt by heart; split by note",
                      stacklevel=2)


def _conflicting(rows: list[Row], notes: list[str], label_column: str) -> int:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for row, note in zip(rows, notes, strict=True):
        label = _folded(row.values.get(label_column, ""))
        if note and label:
            found[note].append(label)
    return sum(len(labels) for labels in found.values() if len(set(labels)) > 1)


def format_check(found: TableCheck, max_length: int = 512) -> str:
    """Lines for a terminal: what stops training first, then the rest.

    Args: max_length: tokens of prompt and label together, as in training.
    """
    lines = [f"{found.n:,} rows", *(f"  {column.name}: {column.distinct:,} different values, {column.empty:,} empty"
                                    for column in found.columns)]
    stops = [f"{n:,} {what}" for n, what in ((found.empty_notes, "empty notes"), (found.empty_labels, "rows without a label"),
                                            (found.spellings, "labels that differ by case or spacing alone")) if n]
    said = [found.stops] if found.stops is not None else []
    if stops or said:
        lines += ["", f"training would stop: {', '.join(stops or said)}", *(f"  it would say: {it}" for it in said if stops)]
    else:
        lines += ["", "nothing here stops training" + ("" if found.labelled else ", once a column of labels is named")]
    lines += [f"{found.same_notes:,} notes stand in an earlier row, {found.near_notes:,} nearly: split by note, or a test only "
              "asks what was learnt by heart"] if found.same_notes + found.near_notes else ["no note stands twice"]
    if found.conflicting:
        lines.append(f"{found.conflicting:,} rows have a note that has another label elsewhere: no model can be right on all")
    lines += ["", *_labels(found)]
    low, median, high, most = found.tokens
    lines += ["", f"tokens of a note: {low} to {most}, half up to {median}, 95 % up to {high}"
              + (f"; with prompt and label at most {max_length} are read (--max-length)" if most > max_length // 2 else "")]
    if language := of_language(found.tokens_a_word):
        lines.append(language)
    edges, top = [0, *BINS], max(found.histogram, default=0)
    for number, n in enumerate(found.histogram):
        if n:
            span = f"{edges[number]}–{edges[number + 1]}" if number < len(BINS) else f"over {BINS[-1]}"
            lines.append(f"  {span:>12} {'█' * max(1, round(WIDTH * n / top))} {n:,}")
    lines += ["", "likely identifiers, in rows: " + ", ".join(f"{kind} {n:,}" for kind, n in found.identifiers.items())
              if found.identifiers else "no likely identifiers (dates, phone and record numbers, mail, names after titles)"]
    if not found.identifiers:
        lines.append("names without a title, places and rare facts are not looked for: this is no proof that nobody is named")
    return "\n".join(lines)


def _printable(label: str) -> str:
    """What moves a terminal's cursor comes out as it is written in Python."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in label)


def _labels(found: TableCheck) -> list[str]:
    if found.labels is None:
        return ["no labels to look at (--label-column names their column; one value to a row is no label)"]
    counts = list(found.labels.items())
    if not counts:
        return ["no row has a label"]
    rare = [(label, n) for label, n in counts if n < RARE]
    share = counts[0][1] / sum(n for _, n in counts)
    lines = [f"{len(counts):,} labels, from {counts[0][1]:,} rows to {counts[-1][1]:,}; always answering the most frequent "
             f"would be right in {share:.1%}"]
    if rare:
        lines.append(f"{len(rare):,} labels have fewer than {RARE} rows: hardly learnt, and a test of them says little")
        lines += [f"  {n:>4} {_printable(label[:60])}" for label, n in rare[::-1][:LISTED]]
        lines += [f"       and {len(rare) - LISTED:,} more"] if len(rare) > LISTED else []
    return lines
