"""`data check`: every count by hand on a small table, and not a word of a note in what it says."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from minilora import load_tokenizer
from minilora.cli import main
from minilora.errors import DataError
from minilora.llama.tokenizer import read_tokenizer
from minilora.table_check import BINS, TableCheck, check_table, format_check
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
    assert main(["data", "check", "--n", "100"]) == 0 and (tmp_path / "check" / "train.csv").is_file(), "a folder called check"


def test_a_language_that_the_tokenizer_cuts_into_scraps_is_told_with_what_helps(tmp_path: Path) -> None:
    """By hand: a token a byte and one for the space, so "abc" and "de" take four and three."""
    found = check(tmp_path, [("abc 12 de.", "X"), ("abc", "Y")])
    assert found.tokens_a_word == pytest.approx((4 + 3 + 4) / 3) and "3.7 tokens" in format_check(found)
    assert "--new-tokens" in format_check(found)
    english = check_table(write_csv(tmp_path / "e.csv", [("fall, knee pain", "X")], ("note", "label")), "note", None,
                          load_tokenizer("tiny"))
    assert 1 <= english.tokens_a_word < 2 and "--new-tokens" not in format_check(english)
