"""Tables of notes and labels: which cell is the note, which the label, and whether one can train on them.

A table is somebody's export: other column names, labels with stray blanks, a row without a label at line 20,000.
Whatever cannot be read without guessing ends with one `DataError` line that names the file, the row and the remedy.
Rows count from 1 below the header; CSV adds the line, which differs where a cell holds line breaks.  Notes are patient
data: no message quotes a cell that may hold one.
"""
from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minilora.data.formats import NAME_LIMIT, cell_text, records, shown, table_format, text_lines
from minilora.data.prompts import clean_note
from minilora.data.table_writer import TableWriter, added_columns
from minilora.errors import DataError
from minilora.files import write_text

__all__ = ["Row", "Table", "TableWriter", "added_columns", "iter_table", "label_set", "read_columns", "read_labels",
           "read_table", "training_examples", "write_labels"]

MAX_LABELS = 10_000
MAX_LABEL_LENGTH = 200       # characters; what is longer is a note in the wrong column
_LABEL_BREAK = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Row:
    """A data row: `number` from 1, `values` by column as text, `text` the note, `label` stripped, `line` in a CSV."""

    number: int
    values: dict[str, str]
    text: str
    label: str | None = None
    line: int | None = None


@dataclass(frozen=True)
class Table:
    """A table in memory; `columns` in order of first appearance (rows of JSONL may lack some)."""

    columns: list[str]
    rows: list[Row]


def read_table(path: str | Path, input_column: str, label_column: str | None = None,
               format: str | None = None) -> Table:
    """Read a whole table; arguments and errors as in `iter_table`."""
    rows = list(iter_table(path, input_column, label_column, format))
    return Table(list(dict.fromkeys(column for row in rows for column in row.values)), rows)


def read_columns(path: str | Path, format: str | None = None) -> list[str]:
    """Return a table's columns: header, Parquet schema, or all keys of a JSONL file, which is read through for them."""
    path = Path(path)
    kind = table_format(path, format)
    if kind == "jsonl":
        return list(dict.fromkeys(key for _, values in records(path, kind) for key in values))
    return list(next(records(path, kind))[1])


def iter_table(path: str | Path, input_column: str, label_column: str | None = None,
               format: str | None = None) -> Iterator[Row]:
    """Yield the rows of a CSV, JSONL or Parquet file in constant memory.

    Null and NaN read as empty cells.  With `label_column` every row must have a label, of one line.

    Args:
        path: the file; its suffix names the format unless `format` ("csv", "jsonl", "parquet") does.
        input_column: the column of notes.
        label_column: the column of labels, or None (prediction).

    Raises:
        DataError: anything that keeps a row from being read as it was meant, with file and row.
    """
    path = Path(path)
    kind = table_format(path, format)
    if input_column == label_column:
        raise DataError(f"{path}: column {input_column!r} is named for both notes and labels; name two columns")
    named = [name for name in (input_column, label_column) if name is not None]
    for number, (line, values) in enumerate(records(path, kind), start=1):
        where = f"{path} row {number} (line {line})" if kind == "csv" else f"{path} row {number}"
        for name in named:
            if number == 1 and name not in values:
                raise _no_column(path, name, list(values))
            value = values.get(name, "")
            if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int, float))):
                raise DataError(f"{where}: column {name!r} holds a value that is not a string or number; write it as "
                                "text")
        texts = {key: value if isinstance(value, str) else cell_text(value) for key, value in values.items()}
        label = None if label_column is None else texts.get(label_column, "").strip()
        if label is not None:
            _check_label(label, where, str(label_column))
        yield Row(number, texts, texts.get(input_column, ""), label, line if kind == "csv" else None)


def _check_label(label: str, where: str, column: str) -> None:
    if not label:
        raise DataError(f"{where} has no label in column {column!r}; fill it in or remove the row")
    if _LABEL_BREAK.search(label):
        raise DataError(f"{where}: the label contains a line break or control character; write it on one line")
    if len(label) > MAX_LABEL_LENGTH:
        raise DataError(f"{where}: the label has {len(label)} characters, more than {MAX_LABEL_LENGTH}; is {column!r} "
                        "the label column?")


def _no_column(path: Path, name: str, columns: list[str]) -> DataError:
    listed = ", ".join(shown(column) for column in columns[:20]) + (", ..." if len(columns) > 20 else "")
    folded = {column.casefold(): column for column in reversed(columns)}
    close = difflib.get_close_matches(name.strip().casefold(), list(folded), n=1)
    hint = f"; did you mean {shown(folded[close[0]])}?" if close else ""
    mark = next((mark for mark in ";\t|" if mark in columns[0]), None)
    if len(columns) == 1 and mark:
        hint = f"; the cells seem to be separated by {mark!r}: save the file with commas"
    elif any(len(column) > NAME_LIMIT for column in columns):
        hint = "; is the header line missing?"
    return DataError(f"{path}: no column {name!r}; there are: {listed}{hint}")


def training_examples(path: str | Path, input_column: str, label_column: str, format: str | None = None, *,
                      min_labels: int = 2) -> list[tuple[str, str, int]]:
    """Return (note, label, row number) of every row, after the checks that need the whole table.

    Args:
        path, input_column, label_column, format: as `iter_table`.
        min_labels: distinct labels needed: 2 to train; a validation file may do with 1.

    Raises:
        DataError: as `iter_table`; also an empty note, labels that differ only by case or spacing, a single distinct
            label, more than 10,000 of them.
    """
    examples: list[tuple[str, str, int]] = []
    first: dict[str, int] = {}                    # label -> the first row that has it
    for row in iter_table(path, input_column, label_column, format):
        where = f"{path} row {row.number}" + (f" (line {row.line})" if row.line else "")
        if not clean_note(row.text):
            raise DataError(f"{where} has an empty note in column {input_column!r}; fill it in or remove the row")
        label = row.label or ""
        first.setdefault(label, row.number)
        if len(first) > MAX_LABELS:
            raise DataError(f"{where}: more than {MAX_LABELS:,} different labels; is {label_column!r} the label "
                            "column?")
        examples.append((row.text, label, row.number))
    folded: dict[str, str] = {}
    for label, number in first.items():
        # "CT Brain", "ct brain" and "CT  Brain" are one answer; as three they would split its examples and its score.
        twin = folded.setdefault("".join(unicodedata.normalize("NFC", label).casefold().split()), label)
        if twin != label:
            raise DataError(f"{path}: labels {twin!r} (row {first[twin]}) and {label!r} (row {number}) differ only by "
                            "case or spacing; write them one way")
    if len(first) < min_labels:
        raise DataError(f"{path}: only one label in column {label_column!r}, the same in all {len(examples)} rows; "
                        "training needs at least two")
    return examples


def label_set(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels, stripped and sorted by code point."""
    return sorted({label.strip() for label in labels})


def read_labels(path: str | Path) -> list[str]:
    """Read labels.txt: UTF-8, a label a line, none empty, none twice; in the file's order.

    Raises:
        DataError: no such file, an empty file or line, a duplicate, not UTF-8.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file of labels")
    first: dict[str, int] = {}
    for number, line in enumerate(text_lines(path), start=1):
        label = line.strip()
        if not label:
            raise DataError(f"{path} line {number} is empty; write one label a line")
        _check_label(label, f"{path} line {number}", "label")
        if label in first:
            raise DataError(f"{path} line {number} is a duplicate of line {first[label]}; remove one")
        first[label] = number
    if not first:
        raise DataError(f"{path} is empty; write one label a line")
    return list(first)


def write_labels(path: str | Path, labels: Sequence[str]) -> None:
    """Write labels.txt, atomically; `read_labels` gives the same list back.

    Raises:
        DataError: a label is empty, a duplicate, has blanks around it or a line break in it.
    """
    seen: set[str] = set()
    for number, label in enumerate(labels, start=1):
        _check_label(label.strip(), f"{path} label {number}", "label")
        if label != label.strip() or label in seen:
            raise DataError(f"{path} label {number} has blanks around it or is a duplicate; pass what label_set gives")
        seen.add(label)
    # Trap: a mark at the very beginning of a file is none of its text; where a label begins with one, it takes two.
    mark = "\ufeff" if labels and labels[0].startswith("\ufeff") else ""
    write_text(path, mark + "".join(label + "\n" for label in labels))
