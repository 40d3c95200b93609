"""Near-duplicates: by hand, and against a comparison of every pair."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.duplicates import find_twins, shingles

WORDS = st.sampled_from(["pain", "fall", "left", "knee", "r/o", "bleed"])
NOTES = st.lists(st.lists(WORDS, max_size=9).map(" ".join), max_size=14)


def jaccard(a: str, b: str) -> float:
    one, other = shingles(a), shingles(b)
    return len(one & other) / len(one | other) if one | other else 0.0


@given(NOTES, NOTES, st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]))
def test_the_closest_note_is_what_comparing_every_pair_finds(notes: list[str], others: list[str], threshold: float) -> None:
    found = find_twins(notes, others, threshold)
    for row, note in enumerate(notes):
        best = max((jaccard(note, other) for other in others), default=0.0)
        assert found.similarity[row] == pytest.approx(best if best >= threshold - 1e-12 and shingles(note) else 0.0), note
        if found.similarity[row]:
            assert found.nearest[row] == [jaccard(note, other) == pytest.approx(best) for other in others].index(True)
        else:
            assert found.nearest[row] == -1


def test_near_duplicates_by_hand() -> None:
    train = ["Fall on left hand, wrist pain, r/o scaphoid fracture.", "Headache for two days, on warfarin"]
    asked = ["fall on LEFT hand; wrist pain - r/o scaphoid fracture", "Fall on left hand, wrist pain, r/o scaphoid injury",
             "Fall on right hand, elbow pain", "headache", ""]
    found = find_twins(asked, train)
    # The second shares 8 of its 9 pairs of words with the first note's 9: 8 / (9 + 9 - 8).
    assert found.similarity.tolist() == [1.0, pytest.approx(8 / 10), 0.0, 0.0, 0.0]
    assert found.nearest.tolist() == [0, 0, -1, -1, -1] and (found.same, found.near) == (1, 1)


def test_words_count_and_not_case_or_punctuation() -> None:
    assert shingles("A b, C.") == shingles("a B c") == {("a", "b"), ("b", "c")}
    assert shingles("Fever!") == {("fever",)} and shingles(" .. ") == frozenset()
    assert find_twins(["fever"], ["Fever."]).same == 1 and find_twins([""], [""]).same == 0


@given(NOTES)
def test_within_one_table_each_note_is_compared_with_those_before_it(notes: list[str]) -> None:
    found = find_twins(notes)
    for row, note in enumerate(notes):
        best = max((jaccard(note, other) for other in notes[:row]), default=0.0)
        assert found.similarity[row] == pytest.approx(best if best >= 0.7 - 1e-12 else 0.0)
        assert found.nearest[row] < row


@pytest.mark.parametrize("others", [None, ["chest pain, r/o bleed"] * 300])
def test_a_note_that_stands_there_a_thousand_times_is_compared_once(others: list[str] | None,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    class Counting(frozenset[tuple[str, ...]]):
        def __and__(self, other: object) -> frozenset[tuple[str, ...]]:
            compared.append(1)
            return frozenset(self) & other      # type: ignore[operator]

    monkeypatch.setattr("minilora.duplicates.shingles", lambda note: Counting(shingles(note)))
    found = find_twins(["chest pain, r/o bleed"] * 300, others)
    assert found.same == 300 - (others is None) and set(found.nearest[1:].tolist()) == {0} and len(compared) <= 300
