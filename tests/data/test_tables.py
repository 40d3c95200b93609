"""Tables: what is read is what was written, and each kind of bad input ends with one line that quotes no note."""
from __future__ import annotations

import csv
import json
import math
import os
import stat
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilora.data import formats
from minilora.data.tables import (
    TableWriter,
    added_columns,
    iter_table,
    label_set,
    read_columns,
    read_labels,
    read_table,
    training_examples,
    write_labels,
)
from minilora.errors import DataError, OutputError

SECRET = "Mrs Secret"        # stands in every note of the bad files; no message may contain it
GOOD = f"note,label\n{SECRET} a,CT\n{SECRET} b,MR\n"


def rows_of(path: Path, label: str | None = "label") -> list[tuple[str, str | None]]:
    return [(row.text, row.label) for row in iter_table(path, "note", label)]


def failure(path: Path, error: type[Exception] = DataError) -> str:
    """Train on `path`, which must fail; return the message after the checks that hold for every message."""
    with pytest.raises(error) as caught:
        training_examples(path, "note", "label")
    message = str(caught.value)
    assert "\n" not in message, "an error is one line"
    assert SECRET not in message, "a note must not be quoted"
    assert path.name in message, "the file must be named"
    return message


BAD_CSV = {
    "empty file": (b"", ["is empty"]),
    "only a byte order mark": (b"\xef\xbb\xbf", ["is empty"]),
    "only blank lines": (b"\n\n", ["is empty"]),
    "header only": (b"note,label\n", ["header but no rows"]),
    "wrong column": (GOOD.replace("note", "Notes"), ["no column 'note'", "'Notes', 'label'", "did you mean 'Notes'?"]),
    "wrong label column": (GOOD.replace("label", "protocol"), ["no column 'label'", "there are: 'note', 'protocol'"]),
    "semicolons": (GOOD.replace(",", ";"), ["no column 'note'", "separated by ';'", "commas"]),
    "no header": (f"{SECRET}{' and so on' * 9},CT\n{SECRET},MR\n", ["no column 'note'", "is the header line missing?"]),
    "duplicate column": (f"note,label,note\n{SECRET},CT,x\n", ["duplicate column 'note'"]),
    "ragged row, too long": (GOOD + f"{SECRET}, with a comma,CT\n", ["row 3 (line 4)", "3 cells, the header 2"]),
    "ragged row, too short": (f"note,label\n\"{SECRET}\n\",CT\n{SECRET}\n", ["row 2 (line 4)", "1 cells"]),
    "row without label": (GOOD + f"{SECRET} c,  \n", ["row 3 (line 4)", "no label in column 'label'"]),
    "empty note": ("note,label\nfine,CT\n \x07 ,MR\n", ["row 2 (line 3)", "empty note in column 'note'"]),
    "newline in label": (GOOD + f"{SECRET},\"CT\nBrain\"\n", ["row 3 (line 4)", "line break"]),
    "a note as label": (GOOD + f"x,{SECRET}{' and so on' * 30}\n", ["row 3", "310 characters", "the label column?"]),
    "not UTF-8": (GOOD.encode() + b"caf\xe9,CT\n", [f"not UTF-8 at byte {len(GOOD) + 3} (line 4)",
                                                    "iconv -f WINDOWS-1252 -t UTF-8 bad.csv > utf8-bad.csv"]),
    "UTF-16": (GOOD.encode("utf-16"), ["not UTF-8", "byte 0", "iconv -f UTF-16"]),
    "cut in a character": (GOOD.encode() + b"x\xc3", ["not UTF-8", f"byte {len(GOOD) + 1} (line 4)"]),
    "NUL byte": (GOOD + f"{SECRET}\0,CT\n", ["line 4", "NUL byte"]),
    "unclosed quote": (GOOD + f"\"{SECRET},CT\nx,MR\n", ["row 3 (line 4)", "quotes are wrong"]),
    "lone quote": (GOOD + f"\"{SECRET} 5\" tube\",CT\n", ["row 3 (line 4)", "a quote is written twice"]),
    "labels differ by case": (GOOD + f"{SECRET},Ct\n", ["'CT' (row 1)", "'Ct' (row 3)", "only by case or spacing"]),
    "labels differ by spacing": (GOOD + f"{SECRET},C  T\n", ["'CT' (row 1)", "'C  T' (row 3)"]),
    "labels differ by accents' encoding": (GOOD + "x,Ra\u0308\ny,R\u00e4\n", ["(row 3)", "(row 4)"]),
    "one label": (f"note,label\n{SECRET},CT\n{SECRET},CT \n", ["only one label", "all 2 rows", "at least two"]),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_bad_csv_ends_with_one_line(tmp_path: Path, case: str):
    content, words = BAD_CSV[case]
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = failure(path)
    assert [word for word in words if word not in message] == [], message


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = [{"note": f"{SECRET} a", "label": "CT"}, {"note": f"{SECRET} b", "label": "MR"}]
BAD_JSONL = {
    "empty file": ("\n", ["is empty"]),
    "not an object": (jsonl(*ROWS, [SECRET]), ["row 3", "not a JSON object"]),
    "not JSON": (jsonl(*ROWS) + f"{{'note': '{SECRET}'}}\n", ["row 3", "not JSON", "character 2"]),
    "cut": (jsonl(*ROWS)[:-8], ["row 2", "not JSON"]),
    "list as note": (jsonl(*ROWS, {"note": [SECRET], "label": "CT"}), ["row 3", "'note'", "not a string or number"]),
    "boolean as label": (jsonl(*ROWS, {"note": SECRET, "label": True}), ["row 3", "'label'", "not a string or number"]),
    "null as label": (jsonl(*ROWS, {"note": SECRET, "label": None}), ["row 3", "no label"]),
    "label absent": (jsonl(*ROWS, {"note": SECRET}), ["row 3", "no label"]),
    "wrong column": (jsonl({"text": SECRET, "label": "CT"}), ["no column 'note'", "'text', 'label'"]),
    "duplicate key": (jsonl(*ROWS) + f'{{"note": "{SECRET}", "note": "x"}}\n', ["row 3", "duplicate column 'note'"]),
    "nested too deep": (jsonl(*ROWS) + "[" * 200_000 + "\n", ["row 3", "nested too deep"]),
    "a column nested too deep": (jsonl(*ROWS) + f'{{"note": "x", "label": "CT", "more": {"[" * 300 + "]" * 300}}}\n',
                                 ["row 3", "nested too deep"]),
    "NUL byte": (jsonl(*ROWS) + f'{{"note": "{SECRET}\0"}}\n', ["line 3", "NUL byte"]),
}


@pytest.mark.parametrize("case", BAD_JSONL)
def test_a_bad_jsonl_ends_with_one_line(tmp_path: Path, case: str):
    content, words = BAD_JSONL[case]
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    message = failure(path)
    assert [word for word in words if word not in message] == [], message


@given(st.integers(2**20 - 8, 2**20 + 8), st.integers(0, 3))
def test_the_byte_that_is_not_utf8_is_found_across_chunks(tmp_path_factory, offset, shift):
    path = tmp_path_factory.getbasetemp() / "chunks.csv"
    # 3-byte characters, so that the 1 MiB chunks of the scan end inside one
    content = b"n" * shift + "\u20ac".encode() * (offset // 3) + b"\xff\n" + b"x" * 100
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"byte {content.index(255)} .line 1."):
        list(iter_table(path, "note"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_folder_of_parts_as_spark_writes_one_is_a_table_and_parts_may_be_empty(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / f"notes{suffix}"
    folder.mkdir()
    for part, texts in ((2, ["c"]), (0, ["a", "b"]), (1, [])):
        with TableWriter(folder / f"part-{part:05d}{suffix}", ["note"]) as writer:
            for text in texts:
                writer.write({"note": text})
    (folder / "_SUCCESS").write_text("")
    assert [(row.number, row.text) for row in read_table(folder, "note").rows] == [(1, "a"), (2, "b"), (3, "c")]
    assert read_columns(folder) == ["note"]
    for part in (0, 2):
        (folder / f"part-{part:05d}{suffix}").unlink()
    assert "has no rows" in failure(folder)


def test_missing_files_folders_and_suffixes_are_named(tmp_path: Path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "notes.xlsx").write_text("x")
    assert "no such file" in failure(tmp_path / "gone.csv")
    assert "is a folder" in failure(tmp_path / "folder.csv")
    assert "unknown suffix '.xlsx' for a table; supported: .csv, .jsonl, .ndjson, .parquet" in failure(
        tmp_path / "notes.xlsx")


def test_one_column_cannot_be_note_and_label(tmp_path: Path):
    with pytest.raises(DataError, match="both notes and labels"):
        list(iter_table(tmp_path / "any.csv", "note", "note"))


def test_more_than_ten_thousand_labels_are_refused(tmp_path: Path):
    path = tmp_path / "many.csv"
    path.write_text("note,label\n" + "".join(f"{SECRET},label {n}\n" for n in range(10_001)))
    message = failure(path)
    assert "row 10001" in message and "more than 10,000 different labels" in message


def test_a_cell_past_the_limit_is_refused_and_the_csv_module_left_as_it_was(tmp_path: Path, monkeypatch):
    path = tmp_path / "big.csv"
    path.write_text(f"note,label\n{'x' * 200_000},CT\n{'y' * 200_000},MR\n")
    before = csv.field_size_limit()
    assert len(training_examples(path, "note", "label")[0][0]) == 200_000
    monkeypatch.setattr(formats, "CELL_LIMIT", 150_000)
    message = failure(path)
    assert "row 1 (line 2)" in message and "150,000 characters" in message
    assert csv.field_size_limit() == before


def test_hard_csv_reads_as_meant(tmp_path: Path):
    path = tmp_path / "hard.csv"
    path.write_bytes('\ufeff"note", label ,id\r\n"a, ""b""\r\nc",CT (Bone),1\r\n\r\nMüller 5" tube,  "MR, W/O",2\r\n'
                     .replace('  "MR, W/O"', '"MR, W/O  "').encode())
    rows = list(iter_table(path, "note", "label"))
    assert [(row.text, row.label, row.number, row.line) for row in rows] == [
        ('a, "b"\r\nc', "CT (Bone)", 1, 2), ('Müller 5" tube', "MR, W/O", 2, 5)]
    assert rows[1].values == {"note": 'Müller 5" tube', "label": "MR, W/O  ", "id": "2"}
    assert read_columns(path) == ["note", "label", "id"]


def test_carriage_returns_alone_end_lines(tmp_path: Path):
    path = tmp_path / "mac.csv"
    path.write_bytes(b"note,label\ra,CT\rb,MR\r")
    assert rows_of(path) == [("a", "CT"), ("b", "MR")]


def test_jsonl_numbers_stay_as_written_and_columns_are_all_keys(tmp_path: Path):
    path = tmp_path / "notes.ndjson"
    path.write_text('\ufeff{"note": 1.0, "label": 12345678901234567890123}\n\n'
                    '{"note": "half \\ud83d", "label": "é", "extra": [true, "ü"], "gone": null, "nan": NaN}\n')
    table = read_table(path, "note", "label")
    assert [(row.text, row.label) for row in table.rows] == [("1.0", "12345678901234567890123"), ("half \ufffd", "é")]
    assert table.rows[1].values["extra"] == '[true, "ü"]'
    assert table.rows[1].values["gone"] == table.rows[1].values["nan"] == ""
    assert table.columns == read_columns(path) == ["note", "label", "extra", "gone", "nan"]


def test_numbers_within_lists_and_objects_are_numbers_as_they_were_written(tmp_path: Path):
    path = tmp_path / "notes.jsonl"
    cell = '{"egfr": 24.0, "id": 12345678901234567890123, "all": [1e3, "2", -0, true, null, {"é": []}]}'
    path.write_text(f'{{"note": "a", "label": "CT", "more": {cell}}}\n')
    assert read_table(path, "note", "label").rows[0].values["more"] == cell


def test_nan_inside_a_parquet_list_is_null_in_its_json(tmp_path: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "notes.parquet"
    parquet.write_table(pyarrow.table({"note": ["a"], "x": [[0.5, float("nan"), None]], "y": [{"k": [1]}]}), path)
    assert read_table(path, "note").rows[0].values == {"note": "a", "x": "[0.5, null, null]", "y": '{"k": [1]}'}


def test_format_overrides_the_suffix(tmp_path: Path):
    path = tmp_path / "export.txt"
    path.write_text(GOOD)
    assert [row.label for row in iter_table(path, "note", "label", format="csv")] == ["CT", "MR"]
    with pytest.raises(DataError, match="unknown format 'xml'"):
        read_columns(path, format="xml")


def test_training_examples_carry_row_numbers_and_stripped_labels(tmp_path: Path):
    path = tmp_path / "train.csv"
    path.write_text("label,note\n CT ,a\nMR,b\n")
    assert training_examples(path, "note", "label") == [("a", "CT", 1), ("b", "MR", 2)]


def test_a_validation_file_may_have_one_label(tmp_path: Path):
    path = tmp_path / "val.csv"
    path.write_text("label,note\nCT,a\n")
    assert training_examples(path, "note", "label", min_labels=1) == [("a", "CT", 1)]


def test_prediction_reads_rows_without_labels_and_empty_notes(tmp_path: Path):
    path = tmp_path / "predict.csv"
    path.write_text("id,note\n1,a\n2,\n")
    assert [(row.text, row.label) for row in iter_table(path, "note")] == [("a", None), ("", None)]


# surrogates can't be encoded, NUL is refused; everything else is a legal cell
cells = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=8))
def test_any_unicode_comes_back_as_it_was_written(tmp_path_factory, suffix, rows):
    path = tmp_path_factory.mktemp("trip") / f"trip{suffix}"
    with TableWriter(path, ["note", "x"]) as writer:
        for note, other in rows:
            writer.write({"note": note, "x": other})
    assert [(row.text, row.values["x"]) for row in iter_table(path, "note")] == rows


@given(rows=st.lists(cells, min_size=1, max_size=8))
def test_a_csv_of_the_standard_module_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("trip") / "trip.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["note", "n"], *([cell, n] for n, cell in enumerate(rows))])
    assert [row.text for row in iter_table(path, "note")] == rows


def test_thirty_thousand_rows_are_read_whole(tmp_path: Path):
    path = tmp_path / "large.csv"
    path.write_text("note,label\n" + "".join(f"\"note {n}, with\nlines\",L{n % 200}\n" for n in range(30_000)))
    examples = training_examples(path, "note", "label")
    assert examples[-1] == ("note 29999, with\nlines", "L199", 30_000)
    assert len(label_set(label for _, label, _ in examples)) == 200


# ---- Parquet ---------------------------------------------------------------------------------------------------------

def test_parquet_is_read_and_written(tmp_path: Path):
    pytest.importorskip("pyarrow", reason="pyarrow is in the extra [spark]")
    path = tmp_path / "notes.parquet"
    with TableWriter(path, ["note", "label", "probability"]) as writer:
        for n in range(2500):
            writer.write({"note": f"ä {n}", "label": "CT" if n % 2 else "MR", "probability": None if n == 1 else n / 4})
    rows = list(iter_table(path, "note", "label"))
    assert len(rows) == 2500 and rows[-1].number == 2500 and rows[-1].text == "ä 2499"
    assert [row.values["probability"] for row in rows[:3]] == ["0.0", "", "0.5"]
    assert read_columns(path) == ["note", "label", "probability"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(("columns", "words"), [
    ({"note": [SECRET, SECRET], "label": ["CT", None]}, ["row 2", "no label"]),
    ({"note": [SECRET, SECRET], "label": ["CT", ""]}, ["row 2", "no label"]),
    ({"note": [[SECRET], [SECRET]], "label": ["CT", "MR"]}, ["row 1", "not a string or number"]),
    ({"text": [SECRET], "label": ["CT"]}, ["no column 'note'", "'text', 'label'"]),
    ({"note": [], "label": []}, ["no rows"]),
])
def test_a_bad_parquet_ends_with_one_line(tmp_path: Path, columns, words):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is in the extra [spark]")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "bad.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    message = failure(path)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("kind", ["date", "time zone", "object"])
def test_a_parquet_column_that_python_cannot_hold_ends_with_one_line(tmp_path: Path, kind: str):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is in the extra [spark]")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = {"date": lambda: pyarrow.array([1 << 30], pyarrow.int32()).cast(pyarrow.date32()),
              "time zone": lambda: pyarrow.array([1], pyarrow.timestamp("us", tz="Mars/Olympus")),
              "object": lambda: pyarrow.StructArray.from_arrays([pyarrow.array([1])] * 2, names=["a", "a"])}[kind]()
    path = tmp_path / "bad.parquet"
    parquet.write_table(pyarrow.table({"note": [SECRET], "label": ["CT"], "seen": column}), path)
    message = failure(path)
    assert "column 'seen'" in message and "write the column as text" in message, message


def test_a_file_that_is_not_parquet_ends_with_one_line(tmp_path: Path):
    pytest.importorskip("pyarrow", reason="pyarrow is in the extra [spark]")
    path = tmp_path / "fake.parquet"
    path.write_text(GOOD)
    assert "not a Parquet file, or truncated" in failure(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch):
    def absent(name: str):
        raise ImportError(name)

    monkeypatch.setattr(formats.importlib, "import_module", absent)
    (tmp_path / "notes.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'minilora\[spark\]'"):
        list(iter_table(tmp_path / "notes.parquet", "note"))
    with pytest.raises(DataError, match=r"pip install 'minilora\[spark\]'"), TableWriter(tmp_path / "o.parquet", ["a"]):
        pass
    assert os.listdir(tmp_path) == ["notes.parquet"]


# ---- writing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, suffix: str):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is in the extra [spark]")
    with pytest.raises(KeyError), TableWriter(tmp_path / f"out{suffix}", ["note"]) as writer:
        writer.write({"note": "a"})
        raise KeyError("boom")
    assert os.listdir(tmp_path) == []


def test_the_output_appears_whole_and_private(tmp_path: Path):
    path = tmp_path / "out.csv"
    with TableWriter(path, ["note", "probability", "error"]) as writer:
        writer.write({"note": "a, b", "probability": 0.25, "error": None})
        assert not path.exists()
    assert path.read_bytes() == b'note,probability,error\n"a, b",0.25,\n'
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_output_that_exists_is_kept_unless_overwritten(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    with pytest.raises(OutputError, match="exists already"), TableWriter(path, ["note"]):
        pass
    assert path.read_text() == "precious"
    with TableWriter(path, ["note", "p"], overwrite=True) as writer:
        writer.write({"note": "ü", "p": math.pi})
    assert path.read_text() == f'{{"note": "ü", "p": {math.pi}}}\n'


def test_bad_outputs_are_refused(tmp_path: Path):
    with pytest.raises(OutputError, match=r"unknown suffix '.txt'.*supported: .csv"):
        TableWriter(tmp_path / "out.txt", ["note"])
    with pytest.raises(OutputError, match="cannot write"), TableWriter(tmp_path / "no" / "out.csv", ["note"]):
        pass
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(OutputError, match="is a folder"), TableWriter(tmp_path / "dir.csv", ["note"], overwrite=True):
        pass
    late = pytest.raises(DataError, match="column 'late', which was not announced")
    with late, TableWriter(tmp_path / "out.csv", ["note"]) as writer:
        writer.write({"note": "a", "late": "b"})
    assert os.listdir(tmp_path) == ["dir.csv"]


def test_columns_that_clash_with_the_output_are_refused():
    assert added_columns("in.csv", ["note"]) == ["note", "prediction", "probability", "error"]
    with pytest.raises(DataError, match=r"in.csv: column 'error' is one that the output adds; rename it"):
        added_columns("in.csv", ["note", "error"])


# ---- labels.txt ------------------------------------------------------------------------------------------------------

label_lists = st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=30)
                       .map(str.strip).filter(bool), min_size=1)


@given(label_lists)
@example(["\ufeffCT"])              # its mark is the label's own, though it stands where a file's would
def test_labels_come_back_as_they_were_written(tmp_path_factory, labels):
    path = tmp_path_factory.mktemp("labels") / "labels.txt"
    write_labels(path, label_set(labels))
    assert read_labels(path) == sorted(set(labels))


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is empty"), (b"CT\n\nMR\n", "line 2 is empty"), (b"CT\r\nMR\r\nCT\r\n", "line 3 is a duplicate of line 1"),
    (b"CT\n\xff\n", "not UTF-8 at byte 3 (line 2)"), (None, "no such file"), (b"x" * 201, "201 characters")])
def test_a_bad_label_file_ends_with_one_line(tmp_path: Path, content, words):
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_labels(path)
    assert words in str(caught.value) and "labels.txt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [["a", ""], ["a", "a"], [" a"], ["a\nb"]])
def test_bad_labels_are_not_written(tmp_path: Path, labels):
    with pytest.raises(DataError):
        write_labels(tmp_path / "labels.txt", labels)
    assert os.listdir(tmp_path) == []


def test_label_set_is_sorted_and_stripped():
    assert label_set(["MR ", "CT, W/O (Bone)", "MR", "CT"]) == ["CT", "CT, W/O (Bone)", "MR"]
