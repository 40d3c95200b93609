"""`data check`: every count by hand on a small table, and not a word of a note in what it says."""
from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minilora import load_tokenizer
from minilora.cli import main
from minilora.data.tables import training_examples
from minilora.errors import DataError
from minilora.llama.tokenizer import read_tokenizer
from minilora.table_check import BINS, TableCheck, check_table, format_check, warn_of_shared_notes
from tests.models import byte_tokenizer
from tests.notes import SECRET, write_csv

ROWS = [(f"{SECRET} fell on the left knee", "XR Knee"), (f"{SECRET} fell on the left KNEE", "xr  knee"),
        (f"{SECRET} fell on the left knee!", "CT Brain"), (f"{SECRET} has had a headache for two days", "CT Brain"),
        (f"{SECRET} has had a headache for two weeks", "CT Brain"), ("", "CT Brain"), (f"Mr. {SECRET}, seen 3/4/2024", ""),
        (f"MRN 1234567, {'pain ' * 30}", "CT Brain")]


def check(path: Path, rows: Sequence[Sequence[str]], label: str | None = None,
          columns: Sequence[str] = ("note", "label")) -> TableCheck:
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return check_table(write_csv(path / "t.csv", rows, columns), columns[0], label, read_tokenizer(path / "tokenizer.json"))


def test_counts_by_hand(tmp_path: Path) -> None:
    found = check(tmp_path, ROWS)
    assert found.n == 8 and [(column.name, column.empty, column.distinct) for column in found.columns] == [
        ("note", 1, 7), ("label", 1, 3)]
    assert (found.empty_notes, found.empty_labels, found.spellings) == (1, 1, 1)
    # Rows 2 and 3 have row 1's words; row 5 shares 6 of the 8 pairs of words that it and row 4 have together.
    assert (found.same_notes, found.near_notes) == (2, 1)
    assert found.labels == {"CT Brain": 5, "XR Knee": 1, "xr  knee": 1}
    assert found.identifiers == {"dates": 1, "record numbers": 1, "names after titles": 1}
    lengths = sorted(len(note) for note, _ in ROWS)              # a token a byte
    assert found.tokens == (0, *(lengths[4:5]), lengths[-1], lengths[-1]) and sum(found.histogram) == 8
    for low, high, n in zip((-1, *BINS), BINS, found.histogram, strict=False):
        assert n == sum(low < length <= high for length in lengths), high


def test_a_note_with_two_labels_is_a_conflict_and_another_spelling_of_one_is_not(tmp_path: Path) -> None:
    rows = [("a b c", "X"), ("A b  c", "Y"), ("d e", "X"), ("d e", "x"), ("", "X"), ("", "Y"), ("f", ""), ("f", "X")]
    assert check(tmp_path, rows).conflicting == 2


def test_no_note_and_no_part_of_one_is_shown(tmp_path: Path) -> None:
    found = check(tmp_path, ROWS)
    for text in (format_check(found), json.dumps(found.to_dict())):
        assert SECRET not in text and "knee" not in text.replace("XR Knee", "").replace("xr  knee", "")
        assert "2024" not in text and "1234567" not in text


def test_a_column_of_notes_that_is_named_as_labels_is_not_shown(tmp_path: Path) -> None:
    rows = [(str(number), f"{SECRET} {number}") for number in range(9)]
    found = check(tmp_path, rows, "text", ("id", "text"))
    assert found.labels is None and SECRET not in format_check(found)
    headless = check(tmp_path, rows[1:], None, (f"{SECRET} has had a headache for two days, on warfarin", "CT Brain"))
    assert SECRET not in format_check(headless), "a first line without a header is somebody's note"


def test_what_it_says_names_the_rare_and_the_majority(tmp_path: Path) -> None:
    rows = [(f"word{i} and word{i + 1}", "CT") for i in range(30)]
    text = format_check(check(tmp_path, [*rows, ("more", "MR"), ("less", "US")]))
    assert "3 labels, from 30 rows to 1; always answering the most frequent would be right in 93.8%" in text
    assert "2 labels have fewer than 10 rows" in text and "nothing here stops training" in text
    assert "no note stands twice" in text and "no proof that nobody is named" in text
    stops = format_check(check(tmp_path, ROWS))
    assert "training would stop: 1 empty notes, 1 rows without a label, 1 labels that differ by case" in stops


def test_a_table_without_labels_is_looked_over_all_the_same(tmp_path: Path) -> None:
    found = check(tmp_path, [("a",), ("b",)], None, ("note",))
    assert found.labels is None and found.conflicting == 0 and "--label-column names their column" in format_check(found)
    assert "no row has a label" in format_check(check(tmp_path, [("a", ""), ("b", " ")]))
    with pytest.raises(DataError, match="no column 'protocol'; there are: 'note'"):
        check(tmp_path, [("a",)], "protocol", ("note",))


def test_the_command_prints_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_csv(tmp_path / "t.csv", ROWS)
    assert main(["data", "check", str(data), "--json", "found.json"]) == 0
    assert "training would stop" in capsys.readouterr().out
    assert json.loads(Path("found.json").read_text())["same_notes"] == 2
    assert main(["data", "elsewhere", str(data)]) == 2
    assert "data check FILE" in capsys.readouterr().err
    assert main(["data", "check", "none.csv"]) == 2
    assert main(["data", "check", str(data), "--json", "found.json"]) == 2 and "--overwrite" in capsys.readouterr().err
    assert main(["data", "./check", "--n", "100"]) == 0, "a folder called check"
    assert (tmp_path / "check" / "train.csv").is_file()


def test_check_without_its_file_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--n", "100"]):
        assert main(["data", "check", *more]) == 2 and "minilora data check FILE" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


A, B = {"note": f"{SECRET} a", "label": "CT"}, {"note": f"{SECRET} b", "label": "MR"}
REFUSED: dict[str, list[dict[str, Any]]] = {
    "one label": [A, {**B, "label": "CT"}], "one row": [A], "a line break in a label": [A, B, {**A, "label": "CT\nBrain"}],
    "a control character in a label": [A, B, {**A, "label": "CT\x1b[2J"}],
    "a label of more than 200 characters": [A, B, {**A, "label": "x" * 201}],
    "a list for a label": [A, B, {**A, "label": ["CT"]}], "a list for a note": [A, B, {**A, "note": ["a"]}],
    "true for a label": [A, B, {**A, "label": True}],
    "an empty note": [A, B, {**A, "note": " "}], "no label": [A, B, {**A, "label": ""}],
    "labels that differ by case": [A, B, A, B, A, B, {**A, "label": "ct"}],
    "too many labels": [{**A, "label": f"label {n}"} for n in range(10_001)],
}


@pytest.mark.parametrize("named", [["--label-column", "label"], []], ids=["named", "found"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_training_refuses_is_said_to_stop_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str,
                                                  named: list[str]) -> None:
    data = tmp_path / "t.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in REFUSED[case]))
    with pytest.raises(DataError) as refused:
        training_examples(data, "note", "label")
    code = main(["data", "check", str(data), "--input-column", "note", *named])
    said = capsys.readouterr()
    if case == "a list for a note":         # such a table cannot be looked over, either
        assert code == 2 and str(refused.value) in said.err
        return
    assert code == 0 and "nothing here stops" not in said.out and SECRET not in said.out and "\x1b" not in said.out
    assert f"training would stop: {refused.value}" in said.out or f"  it would say: {refused.value}" in said.out


def test_a_label_that_leaves_no_room_for_a_note_is_said_to_stop_training(tmp_path: Path,
                                                                         capsys: pytest.CaptureFixture[str]) -> None:
    data = write_csv(tmp_path / "t.csv", [(SECRET, "y" * 150), (SECRET, "CT")])
    for length, says in (("64", "training would stop: max_length 64 leaves no room"), ("512", "nothing here stops training\n")):
        assert main(["data", "check", str(data), "--max-length", length]) == 0 and says in capsys.readouterr().out


def test_labels_that_may_be_notes_are_not_quoted_where_they_stop_training(tmp_path: Path) -> None:
    rows = [("1", f"{SECRET} fell"), ("2", f"{SECRET} FELL"), ("3", f"{SECRET} coughs")]
    said = format_check(check(tmp_path, rows, "text", ("id", "text")))
    assert "training would stop: 1 labels that differ" in said and "it would say: " in said and SECRET not in said
    with pytest.raises(DataError, match="named for both"):
        check(tmp_path, rows, "text", ("text", "id"))
    assert "stops training, once a column of labels is named" in format_check(check(tmp_path, [("a",)], None, ("note",)))


def test_notes_that_a_validation_table_shares_with_the_training_table_are_counted(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", [(f"{SECRET} fell on the left knee", "X"), ("cough, fever", "Y"), ("", "Y")])
    val = write_csv(tmp_path / "val.csv", [(f"{SECRET} FELL on the left knee!", "X"), ("cough", "Y"), ("", "Y"),
                                           (f"{SECRET} fell on the left knee", "X")])
    with pytest.warns(UserWarning, match=r"val\.csv: 2 of 4 notes stand in the training table .*train\.csv as well") as said:
        warn_of_shared_notes(train, val, "input")
    assert SECRET not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_shared_notes(train, write_csv(tmp_path / "other.csv", [("cough", "Y"), ("", "X")]), "input")


def test_a_language_that_the_tokenizer_cuts_into_scraps_is_told_with_what_helps(tmp_path: Path) -> None:
    """By hand: a token a byte and one for the space, so "abc" and "de" take four and three."""
    found = check(tmp_path, [("abc 12 de.", "X"), ("abc", "Y")])
    assert found.tokens_a_word == pytest.approx((4 + 3 + 4) / 3) and "3.7 tokens" in format_check(found)
    assert "--new-tokens" in format_check(found)
    english = check_table(write_csv(tmp_path / "e.csv", [("fall, knee pain", "X")], ("note", "label")), "note", None,
                          load_tokenizer("tiny"))
    assert 1 <= english.tokens_a_word < 2 and "--new-tokens" not in format_check(english)
