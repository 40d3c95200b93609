"""Two sets of answers to the same rows: McNemar's test against scipy and by hand, and tables that are not of the same rows."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.compare import compare_answers, compare_files, format_comparison, mcnemar, p_text, predictions_file
from minilora.errors import DataError
from tests.notes import SECRET, write_csv

COLUMNS = ("note", "label", "prediction")


def test_mcnemar_by_hand() -> None:
    # Five rows that only one has right, one of them ours: 2 · (C(5,0) + C(5,1)) / 2^5 = 12/32.
    assert mcnemar(1, 4) == mcnemar(4, 1) == 12 / 32
    assert mcnemar(0, 6) == 2 / 64 and mcnemar(3, 3) == mcnemar(0, 0) == 1


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_equals_scipys_binomial_test(only_ours: int, only_other: int) -> None:
    if only_ours + only_other:
        binomtest = pytest.importorskip("scipy.stats").binomtest
        assert mcnemar(only_ours, only_other) == pytest.approx(binomtest(only_ours, only_ours + only_other).pvalue, rel=1e-9)


def test_ten_thousand_rows_that_one_alone_has_right_have_a_p_value() -> None:
    assert mcnemar(10_000, 0) == 0.0 and p_text(mcnemar(10_000, 0)) == "< 1e-300"
    assert 0.9 < mcnemar(50_000, 50_010) <= 1


def test_a_comparison_by_hand() -> None:
    ours, other = np.array([True] * 6 + [False] * 4), np.array([True] * 3 + [False] * 6 + [True])
    found = compare_answers(ours, other)
    assert (found.n, found.exact_match, found.other, found.only_ours, found.only_other) == (10, 0.6, 0.4, 3, 1)
    assert found.difference == pytest.approx(0.2) and found.p_value == mcnemar(3, 1) == 10 / 16
    assert found.interval[0] <= 0.2 <= found.interval[1] and found.verdict() == "not told apart"
    back = compare_answers(other, ours)
    assert back.difference == -found.difference and back.p_value == found.p_value


def test_the_interval_of_the_difference_is_that_of_a_bootstrap_over_rows() -> None:
    rng = np.random.default_rng(0)
    ours, other = rng.random(400) < 0.8, rng.random(400) < 0.7
    drawn = []
    for _ in range(3000):
        rows = rng.integers(0, 400, 400)
        drawn.append(ours[rows].mean() - other[rows].mean())
    np.testing.assert_allclose(compare_answers(ours, other, resamples=3000).interval, np.percentile(drawn, [2.5, 97.5]),
                               atol=0.008)


def test_a_clear_difference_is_called_one_and_both_ways() -> None:
    ours, other = np.array([True] * 90 + [False] * 10), np.array([True] * 60 + [False] * 40)
    assert compare_answers(ours, other).verdict() == "better" and compare_answers(other, ours).verdict() == "worse"
    text = format_comparison(compare_answers(ours, other), "run", "scores-b")
    assert "run is better" in text and "alone right in 30" in text and "+30.0 points" in text
    with pytest.raises(DataError, match="cannot be compared"):
        compare_answers(ours, other[:3])


def table(path: Path, predictions: str, notes: str = "abcd", columns: tuple[str, ...] = COLUMNS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(f"{SECRET} {note}", label, answer) for note, label, answer in zip(notes, "XXYY", predictions, strict=True)]
    return write_csv(path, [row[: len(columns)] for row in rows], columns)


def test_tables_of_the_same_rows_are_compared(tmp_path: Path) -> None:
    ours, other = table(tmp_path / "a" / "predictions.csv", "XXYX"), table(tmp_path / "b.csv", "xYXX")
    found = compare_files(tmp_path / "a", other, "label")
    assert (found.exact_match, found.other, found.only_ours, found.only_other) == (0.75, 0.25, 2, 0)
    assert predictions_file(tmp_path / "a") == ours and predictions_file(tmp_path) == ours, "a run folder with one inside"


@pytest.mark.parametrize(("notes", "columns", "label", "says"), [
    ("abce", COLUMNS, "label", "row 4 differs from the other table's in column 'note'"),
    ("bacd", COLUMNS, "label", "row 1 differs"),
    ("abcd", ("note", "label"), "label", "no column 'prediction'"),
    ("abcd", ("text", "protocol", "prediction"), "label", "none of the columns 'note', 'label'"),
    ("abcd", COLUMNS, "protocol", "no label in column 'protocol'"),
])
def test_other_rows_are_refused_without_a_word_of_a_note(notes: str, columns: tuple[str, ...], label: str, says: str,
                                                         tmp_path: Path) -> None:
    table(tmp_path / "a.csv", "XXYX")
    with pytest.raises(DataError) as caught:
        compare_files(tmp_path / "a.csv", table(tmp_path / "b.csv", "XXXX", notes, columns), label)
    assert says in str(caught.value) and SECRET not in str(caught.value)


def test_another_number_of_rows_and_an_unclear_folder_are_refused(tmp_path: Path) -> None:
    table(tmp_path / "a.csv", "XXYX")
    with pytest.raises(DataError, match="3 rows and the other table 4"):
        compare_files(tmp_path / "a.csv", write_csv(tmp_path / "b.csv", [("a", "X", "X")] * 3, COLUMNS),
                      "label")
    with pytest.raises(DataError, match=r"holds no predictions\.csv"):
        predictions_file(tmp_path)
    for name in ("one", "two"):
        table(tmp_path / name / "predictions.csv", "XXYX")
    with pytest.raises(DataError, match=r"holds 2 predictions\.csv"):
        predictions_file(tmp_path)
