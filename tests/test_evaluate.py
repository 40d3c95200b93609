"""Scores against hand-made tables, scikit-learn, and a bootstrap that really draws rows."""
from __future__ import annotations

import csv
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minilora.calibration import calibration_error
from minilora.clinical import clinical_difference, error_kinds, read_protocol
from minilora.duplicates import find_twins
from minilora.errors import ConfigError, DataError
from minilora.evaluate import OTHER, evaluate, format_table, save_evaluation
from minilora.metrics import (
    bootstrap_intervals,
    count_pairs,
    normalize_label,
    number_labels,
    said_of_few_rows,
    summarize,
    top_k,
)

WITH, WITHOUT, KNEE = "CT Abdomen W Contrast", "CT Abdomen WO Contrast", "XR Knee"


def words(texts: Sequence[str]) -> Tensor:
    """An embedder whose cosine can be computed by hand: 1 where a letter occurs, else 0."""
    return torch.tensor([[float(chr(97 + letter) in text.casefold()) for letter in range(26)] for text in texts])


def one_hot(texts: Sequence[str]) -> Tensor:
    """Different texts have cosine 0."""
    return torch.eye(max(len(texts), 1))[: len(texts)]


def test_scores_of_a_table_by_hand() -> None:
    references = ["a", "a", "a", "b", "b", "c"]
    predictions = ["a", "a", "b", "b", "x", "c"]
    scores = evaluate(predictions, references, one_hot, resamples=50)
    assert scores.n == 6 and scores.outside == 1
    assert scores.exact_match == pytest.approx(4 / 6) and scores.cosine == pytest.approx(4 / 6)
    # F1: a 2·2/(3+2), b 2·1/(2+2), c 1; "x" is no reference label and has no F1 of its own
    assert scores.macro_f1 == pytest.approx((0.8 + 0.5 + 1) / 3)
    assert scores.weighted_f1 == pytest.approx((3 * 0.8 + 2 * 0.5 + 1) / 6)
    rows = {row.label: row for row in scores.per_label}
    assert (rows["a"].n, rows["a"].predicted, rows["a"].precision, rows["a"].recall) == (3, 2, 1.0, pytest.approx(2 / 3))
    assert (rows["b"].precision, rows["b"].recall, rows["b"].cosine) == (0.5, 0.5, 0.5)
    assert scores.baselines["majority"].label == "a" and scores.baselines["majority"].exact_match == 0.5
    assert {(error.reference, error.prediction, error.n) for error in scores.confusions} == {("a", "b", 1), ("b", OTHER, 1)}


def test_cosine_of_a_pair_by_hand() -> None:
    scores = evaluate(["ab"], ["bc"], words, resamples=5)
    assert scores.cosine == pytest.approx(1 / 2) and scores.exact_match == 0        # one letter of two in common
    opposite = evaluate(["p"], ["q"], lambda texts: torch.tensor([[1.0], [-1.0]][: len(texts)]), resamples=5)
    assert opposite.cosine == 0                                                   # −1 counts as 0


def test_normalization_folds_case_and_spacing_and_nothing_else() -> None:
    assert normalize_label("  ct\tAbdomen \n W Contrast") == normalize_label(WITH)
    assert normalize_label("Ko\u0308rper") == normalize_label("KÖRPER")
    assert normalize_label("πρωτεΐνη") == normalize_label("πρωτεΐνη".upper()), "folding took the letter apart"
    for a, b in ((WITH, WITHOUT), ("CT W/O", "CT WO"), ("C-Spine", "C Spine"), ("C-Spine(Bone)", "C-Spine (Bone)")):
        assert normalize_label(a) != normalize_label(b), f"{a!r} and {b!r}"
    scores = evaluate(["ct abdomen  w contrast ", WITHOUT], [WITH, WITHOUT], words, resamples=5)
    assert scores.exact_match == scores.cosine == 1 and [row.label for row in scores.per_label] == [WITH, WITHOUT]


tables = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdefgh")), min_size=1, max_size=60)


@given(tables)
def test_scores_equal_scikit_learn(table: list[tuple[str, str]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    references, predictions = [a for a, _ in table], [b for _, b in table]
    scores = evaluate(predictions, references, one_hot, resamples=2)
    labels = sorted(set(references))
    assert scores.exact_match == pytest.approx(metrics.accuracy_score(references, predictions))
    options: dict[str, Any] = {"labels": labels, "zero_division": 0}
    assert scores.macro_f1 == pytest.approx(metrics.f1_score(references, predictions, average="macro", **options))
    assert scores.weighted_f1 == pytest.approx(metrics.f1_score(references, predictions, average="weighted", **options))
    expected = metrics.precision_recall_fscore_support(references, predictions, **options)
    found = [[getattr(row, name) for row in scores.per_label] for name in ("precision", "recall", "f1", "n")]
    np.testing.assert_allclose(found, np.stack(expected), err_msg=f"labels {labels}")


@given(tables, st.integers(0, 9))
def test_all_rates_lie_between_0_and_1_and_inside_their_interval(table: list[tuple[str, str]], seed: int) -> None:
    scores = evaluate([b for _, b in table], [a for a, _ in table], words, seed=seed, resamples=40)
    for name in ("exact_match", "macro_f1", "cosine"):
        low, high = scores.intervals[name]
        assert 0 <= low <= high <= 1 and 0 <= getattr(scores, name) <= 1, f"{name}: {low}, {high}"
    for baseline in scores.baselines.values():
        assert 0 <= baseline.exact_match <= 1 and 0 <= baseline.cosine <= 1


def test_bootstrap_by_counts_equals_a_bootstrap_by_rows() -> None:
    rng = np.random.default_rng(1)
    reference = rng.integers(0, 8, 300)
    prediction = np.where(rng.random(300) < 0.7, reference, rng.integers(0, 10, 300))
    vectors = rng.normal(size=(10, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    drawn: dict[str, list[float]] = {"exact_match": [], "macro_f1": [], "cosine": []}
    for _ in range(2000):
        rows = rng.integers(0, 300, 300)
        for name, values in summarize(count_pairs(reference[rows], prediction[rows], vectors)).items():
            drawn[name].append(float(values[0]))
    found = bootstrap_intervals(count_pairs(reference, prediction, vectors), 2000, np.random.default_rng(2))
    for name, values in drawn.items():
        # A bound's own spread at 2,000 draws is some 0.003.
        np.testing.assert_allclose(found[name], np.percentile(values, [2.5, 97.5]), atol=0.015, err_msg=name)


@pytest.mark.parametrize(("rows", "rate", "least", "most"), [(5, 0.9, 0.3, 0.5), (20, 0.98, 0.2, 0.45), (200, 0.9, 0.9, 0.98)])
def test_intervals_hold_what_they_say_of_many_rows_and_less_of_few(rows: int, rate: float, least: float, most: float) -> None:
    rng, vectors = np.random.default_rng(0), np.eye(2)
    held = 0
    for _ in range(300):
        right = rng.random(rows) < rate
        pairs = count_pairs(np.zeros(rows, dtype=np.int64), np.where(right, 0, 1), vectors)
        low, high = bootstrap_intervals(pairs, 400, rng)["exact_match"]
        held += low - 1e-12 <= rate <= high + 1e-12
    assert least <= held / 300 <= most
    assert (said_of_few_rows(rows) is None) == (rows >= 200)


def test_a_table_of_few_rows_says_that_its_intervals_are_too_narrow() -> None:
    few = evaluate(list("aabb"), list("aaba"), words, resamples=10)
    assert "4 rows are few: intervals resampled from them are too narrow" in format_table(few)
    many = evaluate(list("aabb") * 50, list("aaba") * 50, words, resamples=10)
    assert "too narrow" not in format_table(many)


def test_bootstrap_in_pieces_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    references, predictions = list("aabbccdd") * 4, list("aabcccdx") * 4
    whole = evaluate(predictions, references, words, seed=3, resamples=64)
    monkeypatch.setattr("minilora.metrics.RESAMPLED_NUMBERS", 1)
    assert evaluate(predictions, references, words, seed=3, resamples=64).to_dict() == whole.to_dict()


def test_one_seed_gives_one_evaluation_whatever_the_order_of_rows() -> None:
    references, predictions = list("aabbccdd"), list("aabcccdx")
    first = evaluate(predictions, references, words, seed=3)
    assert first.to_dict() == evaluate(predictions, references, words, seed=3).to_dict()
    assert first.intervals != evaluate(predictions, references, words, seed=4).intervals
    backwards = evaluate(predictions[::-1], references[::-1], words, seed=3)
    assert backwards.macro_f1 == pytest.approx(first.macro_f1) and backwards.per_label == first.per_label
    assert backwards.baselines["majority"] == first.baselines["majority"]


def test_close_pairs_name_contrast_against_none_first() -> None:
    references = [WITH, WITHOUT, "CT Abdomen W WO Contrast", KNEE, "MRI Abdomen W Contrast", "US Pelvis"]
    predictions = [WITHOUT, WITHOUT, WITH, KNEE, KNEE, "US Pelvis"]

    def close(texts: Sequence[str]) -> Tensor:      # X-ray and ultrasound stand apart, all else is close
        return torch.tensor([[1.0, 0.0] if text[:2] in ("XR", "US") else [0.1, 1.0 + 0.001 * len(text)] for text in texts])

    pairs = evaluate(predictions, references, close, resamples=5).close_pairs
    assert pairs and all(pair.cosine >= 0.9 for pair in pairs)
    contrast_alone = [pair for pair in pairs if pair.difference.startswith("contrast") and ";" not in pair.difference]
    assert contrast_alone == pairs[: len(contrast_alone)] and len(contrast_alone) == 3
    found = {frozenset((pair.a, pair.b)): pair for pair in pairs}
    assert found[frozenset((WITH, WITHOUT))].difference == "contrast: with against without"
    assert found[frozenset((WITH, WITHOUT))].confused == 1
    assert found[frozenset((KNEE, "US Pelvis"))].difference == "modality: ultrasound against X-ray; region: pelvis against knee"
    assert not any(KNEE in pair and WITH in pair for pair in found)


@pytest.mark.parametrize(("a", "b", "difference"), [
    (WITH, WITHOUT, "contrast: with against without"),
    ("MRI Brain W WO Contrast", "MRI Brain WO Contrast", "contrast: with and without against without"),
    ("MRI Brain W/WO", "MRI Brain W", "contrast: with and without against with"),
    ("CT Head with and without contrast", "CT head w/o contrast", "contrast: with and without against without"),
    ("CT Head non-contrast", "CT Head, IV contrast", "contrast: without against with"),
    ("CT Chest", "CT Chest W Contrast", "contrast: not said against with"),
    ("CT Abdomen W Contrast", "MRI Abdomen W Contrast", "modality: CT against MR"),
    ("CT Angiography Chest", "CT Chest", "modality: CTA against CT"),
    ("CT Brain WO Contrast", "CT Lumbar Spine WO Contrast", "region: head against lumbar spine"),
    ("CT Abdomen W Contrast", "CT Abdomen Pelvis W Contrast", "region: abdomen against abdomen, pelvis"),
    ("XR Knee Left", "XR Knee RT", "side: left against right"),
    ("CT C-Spine(Bone)", "MRI Cervical Spine WO Contrast", "modality: CT against MR"),
    ("X-ray chest", "US Abdomen", "modality: X-ray against ultrasound; region: chest against abdomen"),
    ("urgent", "routine", None), ("refund", "refund now", None), (WITH, WITH.lower(), None),
    ("", WITH, "contrast: not said against with"),
])
def test_clinical_differences_are_named(a: str, b: str, difference: str | None) -> None:
    assert clinical_difference(a, b) == difference
    assert (clinical_difference(b, a) is None) == (difference is None)


def test_protocol_names_are_read() -> None:
    expected = {WITH: "with", WITHOUT: "without", "MRI Liver W WO Contrast": "with and without", "CT WWO": "with and without",
                "XR Knee": None, "CT Head W/O": "without", "CT Head w/": "with", "Two views": None}
    assert {name: read_protocol(name).contrast for name in expected} == expected


def test_edges_one_label_empty_answers_and_nothing_at_all() -> None:
    single = evaluate(["a"], ["a"], words, resamples=3)
    assert single.exact_match == single.macro_f1 == 1 and single.intervals["macro_f1"] == (1.0, 1.0) and not single.close_pairs
    empty = evaluate(["", " "], ["a", "b"], lambda texts: torch.ones(len(texts), 3), resamples=3)
    assert empty.exact_match == empty.cosine == 0 and empty.outside == 2
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate([], [], words)
    with pytest.raises(DataError, match="1 predictions and 2 references don't match"):
        evaluate(["a"], ["a", "b"], words)
    with pytest.raises(DataError, match="reference 2 of 2 is empty"):
        evaluate(["a", "b"], ["a", " "], words)
    for probability in (float("nan"), -0.1, 40.0):
        with pytest.raises(DataError, match="between 0 and 1"):
            evaluate(["a"], ["a"], words, probabilities=[probability])
    with pytest.raises(ConfigError, match="one finite vector a text"):
        evaluate(["a"], ["b"], lambda texts: torch.ones(1, 3))
    with pytest.raises(ConfigError, match="resamples"):
        evaluate(["a"], ["b"], words, resamples=0)


def test_each_distinct_label_is_embedded_once() -> None:
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> Tensor:
        seen.extend(texts)
        return words(texts)

    evaluate(["a", "b", "A", "c"] * 5, ["a", "b", "b", "a"] * 5, embed, resamples=3)
    assert sorted(seen) == ["a", "b", "c"]


def test_calibration_error_by_hand() -> None:
    # Bin [0.9, 1]: two rows at 0.95, one right: |0.5 − 0.95|. Bin [0.2, 0.3): one row at 0.25, right: 0.75.
    found = calibration_error(np.array([0.95, 0.95, 0.25]), np.array([True, False, True]))
    assert found == pytest.approx((2 * 0.45 + 0.75) / 3)
    scores = evaluate(["a", "b", "c"], ["a", "c", "c"], words, probabilities=[0.95, 0.95, 0.25], resamples=3)
    assert scores.calibration_error == pytest.approx(found) and scores.mean_probability == pytest.approx(2.15 / 3)


def test_files_hold_scores_and_rows_but_no_free_text_in_metrics(tmp_path: Path) -> None:
    rows = [{"id": "1", "note": "fall, \"r/o\"\nbleed – Ä"}, {"id": "2", "note": "secret history"}]
    predictions, references = [KNEE, "secret history"], [KNEE, WITH]
    scores = evaluate(predictions, references, words, resamples=5)
    save_evaluation(scores, tmp_path, rows, predictions, [0.5, None])
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    metrics = json.loads(text)
    assert {"n", "exact_match", "macro_f1", "cosine", "intervals"} <= metrics.keys() and metrics["n"] == 2
    assert "secret" not in text and metrics["outside"] == 1
    assert "secret" not in format_table(scores)
    known = evaluate(predictions, references, words, resamples=5, labels=[WITHOUT, "Secret  History"])
    assert known.confusions[0].prediction == "secret history" and scores.confusions[0].prediction == OTHER
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{**rows[0], "prediction": KNEE, "probability": "0.5"},
                                              {**rows[1], "prediction": "secret history", "probability": ""}]
    assert stat.S_IMODE((tmp_path / "predictions.csv").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "predictions.csv"]
    with pytest.raises(DataError, match="'prediction'"):
        save_evaluation(scores, tmp_path, [{"prediction": ""}] * 2, predictions)
    with pytest.raises(DataError, match="don't match"):
        save_evaluation(scores, tmp_path, rows[:1], predictions)


def test_the_table_for_people_shows_intervals_baselines_and_pairs() -> None:
    scores = evaluate([WITHOUT, WITHOUT, KNEE], [WITH, WITHOUT, KNEE], words, probabilities=[0.9, 0.8, 0.7], resamples=50)
    text = format_table(scores)
    for part in ("exact match", "95 %", "shuffled", "majority", "hardest labels", "calibration error",
                 "contrast: with against without"):
        assert part in text, f"{part!r} is not in\n{text}"
    assert max(map(len, text.splitlines())) <= 130


def test_thousands_of_labels_and_rows_stay_within_memory() -> None:
    references = [f"label {number % 3000}" for number in range(6000)]
    predictions = [f"label {number * 7 % 3000}" for number in range(6000)]
    vectors = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    scores = evaluate(predictions, references, lambda texts: vectors[: len(texts)], resamples=20)
    assert scores.n == 6000 and len(scores.per_label) == 3000 and number_labels(references)[1].max() == 2999


def test_top_k_by_hand() -> None:
    ranked = [("a", "b", "c"), ("b", "A", "c"), ("c", "b", "x"), ()]
    assert top_k(ranked, ["a", "a", "a", "a"]) == {"1": 1 / 4, "2": 2 / 4, "3": 2 / 4}
    scores = evaluate(["a", "b"], ["a", "c"], words, resamples=3, ranked=[("a", "c"), ("b", "c")])
    assert scores.top_k == {"1": 0.5, "2": 1.0} and scores.top_k["1"] == scores.exact_match
    with pytest.raises(DataError, match="one entry for each of the 2 rows"):
        evaluate(["a", "b"], ["a", "c"], words, ranked=[("a",)])


def test_the_histogram_of_cosines_shows_what_their_mean_hides() -> None:
    def close(texts: Sequence[str]) -> Tensor:
        return torch.tensor([[1.0, 0.2 * index] for index in range(len(texts))])

    scores = evaluate(["a", "b", "b", "c"], ["a", "b", "a", "a"], close, resamples=3).cosine_histogram
    assert len(scores.rows) == len(scores.wrong) == 20 and sum(scores.rows) == 4 and sum(scores.wrong) == 2
    # cos(a, b) = 1 / √1.04 = 0.981 and cos(a, c) = 1 / √1.16 = 0.928; right answers have 1, in the last bin as well
    assert (scores.rows[19], scores.wrong[19], scores.wrong[18]) == (3, 1, 1)


def test_the_confusion_matrix_holds_every_row_once_and_no_free_text() -> None:
    found = evaluate(["a", "b", "secret", "b"], ["a", "a", "c", "b"], one_hot, resamples=3).confusion_matrix
    assert found.labels == ["a", "b", "c", OTHER]
    assert found.cells == [(0, 0, 1), (0, 1, 1), (1, 1, 1), (2, 3, 1)]


def test_reliability_and_coverage_stand_in_the_metrics() -> None:
    scores = evaluate(["a", "b", "c", "c"], ["a", "c", "c", "c"], words, probabilities=[0.95, 0.55, 0.85, 0.75], resamples=3)
    assert [bin.n for bin in scores.reliability] == [0, 0, 0, 0, 0, 1, 0, 1, 1, 1]
    assert (scores.reliability[5].probability, scores.reliability[5].accuracy) == (0.55, 0.0)
    assert scores.coverage[0].share == 1 and scores.coverage[0].accuracy == 0.75
    assert scores.coverage[1].share == 0.75 and scores.coverage[1].accuracy == 1 and scores.coverage[1].threshold == 0.75
    without = evaluate(["a"], ["a"], words, resamples=3)
    assert without.reliability == without.coverage == [] and without.top_k == {}


@pytest.mark.parametrize(("reference", "answer", "kinds"), [
    (WITH, WITH, []), (WITH, WITHOUT, ["contrast left out"]), (WITHOUT, WITH, ["contrast given"]),
    ("CT Abdomen", WITH, ["contrast given"]), ("MRI Brain W WO Contrast", "MRI Brain W", ["contrast phases"]),
    ("MRI Brain W WO Contrast", "MRI Brain WO", ["contrast left out"]), ("MRI Brain WO", "MRI Brain", ["unsaid"]),
    (WITH, "CT Abdomen Pelvis W Contrast", ["extent"]),
    ("XR Knee Left", "XR Knee Right", ["side"]), ("CT Chest", "US Abdomen", ["modality", "region"]),
    (WITHOUT, "CT Chest W Contrast", ["region", "contrast given"]), ("refund", "complaint", ["unsaid"]),
])
def test_what_is_wrong_with_an_answer_has_a_direction(reference: str, answer: str, kinds: list[str]) -> None:
    assert error_kinds(reference, answer) == kinds
    assert (clinical_difference(reference, answer) is None) <= (kinds in ([], ["unsaid"]))


def test_clinical_cost_by_hand() -> None:
    references = [WITH, WITHOUT, WITH, KNEE, KNEE]
    answers = [WITHOUT, WITH, WITH, KNEE, "what I wrote"]
    found = evaluate(answers, references, one_hot, resamples=400).clinical
    # contrast left out 0.5, contrast given 1, an answer that is no label 0.25
    assert found.cost == pytest.approx((0.5 + 1 + 0.25) / 5) and found.per_error == pytest.approx((0.5 + 1 + 0.25) / 3)
    assert found.kinds == {"contrast given": 1, "contrast left out": 1, "no label": 1}
    assert 0 <= found.interval[0] < found.cost < found.interval[1] <= 1
    right = evaluate(references, references, one_hot, resamples=5).clinical
    assert (right.cost, right.per_error, right.kinds, right.interval) == (0, 0, {}, (0.0, 0.0))


def test_other_methods_are_scored_and_compared_on_the_same_rows() -> None:
    references = list("aabbccdd") * 5
    scores = evaluate(references, references, one_hot, resamples=20, others={"bag of words": ["a"] * 40, "twin": references})
    assert scores.baselines["bag of words"].exact_match == 0.25 and scores.baselines["twin"].macro_f1 == 1
    found = scores.comparisons["bag of words"]
    assert (found.only_ours, found.only_other, found.verdict()) == (30, 0, "better")
    assert scores.comparisons["twin"].verdict() == "not told apart" and scores.comparisons["twin"].p_value == 1
    text = format_table(scores)
    assert "against bag of words: +75.0 points" in text and "against twin" in text
    json.dumps(scores.to_dict(), allow_nan=False)
    with pytest.raises(DataError, match="short has not one entry for each of the 40"):
        evaluate(references, references, one_hot, others={"short": ["a"]})


def test_rows_that_the_training_table_holds_are_counted_and_scored_apart() -> None:
    notes = ["fall on the left knee today", "headache since this morning", "cough"]
    twins = find_twins(notes, ["Fall on the left knee, today", "headache since yesterday"])
    scores = evaluate(["a", "b", "a"], ["a", "b", "b"], one_hot, resamples=3, twins=twins)
    found = scores.near_duplicates
    assert found is not None and (found.same, found.near, found.n_without, found.exact_match_without) == (1, 0, 2, 0.5)
    assert "1 notes stand in the training table, 0 nearly; exact match without them 0.500" in format_table(scores)
    everything = evaluate(["a"], ["a"], one_hot, resamples=3, twins=find_twins(["cough"], ["cough"])).near_duplicates
    assert everything is not None and everything.n_without == 0 and everything.exact_match_without is None
