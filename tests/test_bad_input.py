"""What each bad table gets: docs/bad-input.md is checked line by line, on the command line.

    python -m tests.test_bad_input > docs/bad-input.md          writes it anew
"""
from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from minilora.cli import main
from minilora.data.tables import training_examples
from tests.models import write_model

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "bad-input.md"
SECRET = "Mrs Quasimodo of Notre Dame fell from the tower and has pain"      # longer than a column's name may be
A, B = f"{SECRET} a", f"{SECRET} b"
GOOD = f"note,label\n{A},CT\n{B},MR\n"
PAIRS = [(A, "CT"), (B, "MR")]
LONG = "pain, " * 175_000            # a megabyte


@dataclass(frozen=True)
class Case:
    """A table; what it reads as, or None where it is refused; what is said of that."""

    content: str | bytes
    reads: list[tuple[str, str]] | None = None
    meaning: str = ""
    suffix: str = ".csv"
    flags: tuple[str, ...] = ()


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = [{"note": A, "label": "CT"}, {"note": B, "label": "MR"}]
CASES: dict[str, Case] = {
    # The file
    "no such file": Case("", suffix=""),
    "a suffix that is no table's": Case(GOOD, suffix=".xlsx"),
    "an empty file": Case(""),
    "nothing but a byte order mark": Case(b"\xef\xbb\xbf"),
    "nothing but blank lines": Case("\n\n"),
    "a header and no rows": Case("note,label\n"),
    # Encodings
    "Latin-1": Case(GOOD.encode() + "café,CT\n".encode("latin-1")),
    "UTF-16": Case(GOOD.encode("utf-16")),
    "cut in the middle of a character": Case(GOOD.encode() + b"x\xc3"),
    "a NUL byte": Case(GOOD + f"{SECRET}\0,CT\n"),
    "a byte order mark": Case("\ufeff" + GOOD, PAIRS, "the mark is dropped"),
    "CRLF line ends": Case(GOOD.replace("\n", "\r\n"), PAIRS, "as with LF"),
    "CR line ends": Case(GOOD.replace("\n", "\r"), PAIRS, "as with LF"),
    "half of a surrogate pair in JSON": Case(jsonl({"note": f"{SECRET} \ud83d", "label": "CT"}, ROWS[1]),
                                             [(f"{SECRET} \ufffd", "CT"), (B, "MR")], "it becomes U+FFFD", ".jsonl"),
    # Columns
    "no such note column": Case(GOOD.replace("note", "Notes")),
    "no such label column": Case(GOOD.replace("label", "protocol")),
    "one column for both": Case(GOOD, flags=("--label-column", "note")),
    "a column twice": Case(f"note,label,note\n{A},CT,x\n"),
    "semicolons for commas": Case(GOOD.replace(",", ";")),
    "no header line": Case(f"{A},CT\n{B},MR\n"),
    "other columns": Case(f"id,note,label\n1,{A},CT\n2,{B},MR\n", PAIRS, "left alone"),
    # Rows
    "a row with too many cells": Case(GOOD + f"{SECRET}, with a comma,CT\n"),
    "a row with too few cells": Case(GOOD + f"{SECRET}\n"),
    "a quote that is never closed": Case(GOOD + f"\"{SECRET},CT\nx,MR\n"),
    "a quote inside a quoted cell": Case(GOOD + f"\"{SECRET} 5\" tube\",CT\n"),
    "blank lines between rows": Case(GOOD.replace("\n", "\n\n"), PAIRS, "skipped"),
    "line breaks and commas in quoted cells": Case(f'note,label\n"{A},\nb",CT\n{B},"MR, left"\n',
                                                   [(f"{A},\nb", "CT"), (B, "MR, left")], "part of the cell"),
    "a line that is no JSON": Case(jsonl(*ROWS) + f"{{'note': '{SECRET}'}}\n", suffix=".jsonl"),
    "a line that is no object": Case(jsonl(*ROWS, [SECRET]), suffix=".jsonl"),
    "a key twice": Case(jsonl(*ROWS) + f'{{"note": "{SECRET}", "note": "x"}}\n', suffix=".jsonl"),
    "JSON nested without end": Case(jsonl(*ROWS) + "[" * 200_000 + "\n", suffix=".jsonl"),
    # Notes
    "an empty note": Case("note,label\nfine,CT\n,MR\n"),
    "a note of control characters": Case("note,label\nfine,CT\n \x07 ,MR\n"),
    "a list for a note": Case(jsonl(*ROWS, {"note": [SECRET], "label": "CT"}), suffix=".jsonl"),
    "a number for a note": Case(jsonl({"note": 1.0, "label": "CT"}, ROWS[1]), [("1.0", "CT"), (B, "MR")],
                                "as it is written", ".jsonl"),
    "a note longer than the context": Case(GOOD + f'"{LONG[:6000]}",CT\n', [*PAIRS, (LONG[:6000], "CT")],
                                           "of the tokens that fit the first two thirds and the last third are kept"),
    "a cell of a megabyte": Case(GOOD + f'"{LONG}",CT\n', [*PAIRS, (LONG, "CT")], "the same"),
    "a cell of more than 16 million characters": Case(GOOD + f'"{"x" * (16 << 20)}y",CT\n'),
    "a note that spells the end token": Case(f"note,label\n</s> {A},CT\n{B},MR\n", [(f"</s> {A}", "CT"), (B, "MR")],
                                             "plain text to the model, never the token"),
    # Labels
    "a row without a label": Case(GOOD + f"{SECRET},  \n"),
    "null for a label": Case(jsonl(*ROWS, {"note": SECRET, "label": None}), suffix=".jsonl"),
    "true for a label": Case(jsonl(*ROWS, {"note": SECRET, "label": True}), suffix=".jsonl"),
    "a label of two lines": Case(GOOD + f"{SECRET},\"CT\nBrain\"\n"),
    "a label of more than 200 characters": Case(GOOD + f"x,{SECRET * 4}\n"),
    "a label that leaves no room for a note": Case(GOOD + f"x,{'y' * 150}\n", flags=("--max-length", "64")),
    "blanks around a label": Case(GOOD.replace("CT", "  CT "), PAIRS, "they are dropped"),
    "labels that differ by case": Case(GOOD + f"{SECRET},Ct\n"),
    "labels that differ by blanks inside": Case(GOOD + f"{SECRET},C  T\n"),
    "labels that differ by how an accent is encoded": Case(GOOD + "x,Ra\u0308\ny,R\u00e4\n"),
    "one label only": Case(f"note,label\n{A},CT\n{B},CT\n"),
    "one label, with a blank behind it in some rows": Case(f"note,label\n{A},CT\n{B},CT \n"),
    "10,000 labels": Case("note,label\n" + "".join(f"n,label {n}\n" for n in range(10_000)),
                          [("n", f"label {n}") for n in range(10_000)], "each is one to choose"),
    "more than 10,000 labels": Case("note,label\n" + "".join(f"{SECRET},label {n}\n" for n in range(10_001))),
}


def outcome(case: Case, folder: Path, model: Path) -> tuple[int, str]:
    """The exit code of `minilora train`, and what it said, with FILE for the table."""
    table = folder / f"table{case.suffix}" if case.suffix else folder / "gone.csv"
    if case.suffix:
        table.write_bytes(case.content if isinstance(case.content, bytes) else case.content.encode("utf-8", "surrogatepass"))
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        code = main(["train", "--model", str(model), "--data", str(table), "--out", str(folder / "run"), "--input-column",
                     "note", "--max-steps", "1", "--batch-size", "2", "--max-length", "256", "--r", "2", "--device", "cpu",
                     "--dtype", "float32", "--quiet", *case.flags])
    return code, said.getvalue().replace(str(table), "FILE").replace(table.name, "FILE").removeprefix("minilora: ").strip()


def described(case: Case, code: int, said: str) -> str:
    """What the document says of a case."""
    line = said.removeprefix("warning: ")
    if code:
        return f"refused: {line}"
    return f"read: {case.meaning}" + (f"; warns: {line}" if line else "")


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def documented() -> dict[str, str]:
    rows = re.findall(r"^\| (.+?) \| ((?:read|refused): .+) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", CASES)
def test_a_table_gets_what_the_document_says(tmp_path: Path, model: Path, name: str) -> None:
    case = CASES[name]
    before = sorted(os.listdir(tmp_path))
    code, said = outcome(case, tmp_path, model)
    assert code == (0 if case.reads is not None else 2), said
    assert "\n" not in said and SECRET not in said and "Traceback" not in said
    assert escaped(described(case, code, said)) == documented().get(name)
    if case.reads is None:
        assert sorted(set(os.listdir(tmp_path)) - set(before)) in ([f"table{case.suffix}"], []), "something was written"
    else:
        found = training_examples(next(tmp_path.glob("table.*")), "note", "label")
        assert [(note, label) for note, label, _ in found] == case.reads


def test_the_document_says_nothing_else() -> None:
    assert list(documented()) == list(CASES)


HEAD = """# What bad tables get

Every line is a table that was given to `minilora train` (`tests/test_bad_input.py`, which also writes this page). What is
refused ends with that one line and exit code 2, before the weights are loaded and with nothing written; no line quotes a note.
FILE stands for the table's path.

"""
TAIL = """
`minilora predict` reads rows without labels by the same rules; a row whose note is empty is answered with `empty note` in the
column `error`, and the others go on.
"""


def write(out: Callable[[str], object], folder: Path) -> None:
    """The document, from what happens."""
    model = write_model(folder / "model")
    out(HEAD + "| the table has | what happens |\n| --- | --- |\n")
    for number, (name, case) in enumerate(CASES.items()):
        place = folder / str(number)
        place.mkdir()
        out(f"| {name} | {escaped(described(case, *outcome(case, place, model)))} |\n")
    out(TAIL)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write(sys.stdout.write, Path(temporary))
