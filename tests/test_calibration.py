"""Reliability, calibration error and coverage: by hand, by property, against the loops and against scikit-learn."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import testing
from minilora.calibration import calibration_error, coverage, reliability

EDGES = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
TABLES = st.lists(st.tuples(st.one_of(EDGES, st.floats(0, 1)), st.booleans()), min_size=1, max_size=60)


def columns(rows: list[tuple[float, bool]]) -> tuple[Any, Any]:
    return np.array([p for p, _ in rows]), np.array([r for _, r in rows])


def test_reliability_by_hand() -> None:
    # [0.5, 1] holds 0.5, 0.75 (right) and 1.0 (right); [0, 0.5) holds 0.25 (right).
    found = reliability(np.array([0.5, 0.75, 1.0, 0.25]), np.array([False, True, True, True]), bins=2)
    assert found.n.tolist() == [1, 3]
    assert found.probability.tolist() == [0.25, 0.75] and found.accuracy.tolist() == [1.0, pytest.approx(2 / 3)]


def test_coverage_by_hand_takes_equals_together() -> None:
    found = coverage(np.array([0.5, 0.9, 0.5, 0.1]), np.array([True, True, False, False]))
    assert found.threshold.tolist() == [0.9, 0.5, 0.1]
    assert found.share.tolist() == [0.25, 0.75, 1.0] and found.accuracy.tolist() == [1.0, pytest.approx(2 / 3), 0.5]


@given(TABLES, st.integers(1, 20))
def test_they_equal_the_loops(rows: list[tuple[float, bool]], bins: int) -> None:
    probability, right = columns(rows)
    found = reliability(probability, right, bins)
    said = testing.reliability(probability.tolist(), right.tolist(), bins)
    assert said == [(n, pytest.approx(p), pytest.approx(a))
                    for n, p, a in zip(found.n.tolist(), found.probability, found.accuracy, strict=True)]
    assert calibration_error(probability, right, bins) == pytest.approx(
        testing.calibration_error(probability.tolist(), right.tolist(), bins))
    curve = coverage(probability, right)
    assert [tuple(point) for point in zip(curve.threshold, curve.share, curve.accuracy, strict=True)] == [
        pytest.approx(point) for point in testing.coverage(probability.tolist(), right.tolist())]


@given(TABLES, st.randoms(use_true_random=False))
def test_the_order_of_rows_decides_nothing(rows: list[tuple[float, bool]], random: Any) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    one, other = coverage(*columns(rows)), coverage(*columns(shuffled))
    assert np.allclose(one.accuracy, other.accuracy) and one.share.tolist() == other.share.tolist()
    assert calibration_error(*columns(rows)) == pytest.approx(calibration_error(*columns(shuffled)))


@given(TABLES)
def test_all_rows_are_answered_in_the_end_and_rates_are_rates(rows: list[tuple[float, bool]]) -> None:
    probability, right = columns(rows)
    curve = coverage(probability, right)
    assert curve.share[-1] == 1 and curve.accuracy[-1] == pytest.approx(right.mean())
    assert (np.diff(curve.share) > 0).all() and (np.diff(curve.threshold) < 0).all()
    assert ((curve.accuracy >= 0) & (curve.accuracy <= 1)).all()
    assert 0 <= calibration_error(probability, right) <= 1
    assert reliability(probability, right).n.sum() == len(rows)


def test_a_probability_that_comes_true_has_no_error() -> None:
    right = np.array([True] * 7 + [False] * 3)
    assert calibration_error(np.full(10, 0.7), right) == pytest.approx(0)
    assert calibration_error(np.ones(10), ~right) == pytest.approx(0.7)


def test_reliability_equals_scikit_learn() -> None:
    curve = pytest.importorskip("sklearn.calibration").calibration_curve
    rng = np.random.default_rng(3)
    probability = rng.random(500)
    right = rng.random(500) < probability ** 2
    accuracy, mean = curve(right, probability, n_bins=10)
    found = reliability(probability, right)
    assert found.accuracy[found.n > 0] == pytest.approx(accuracy) and found.probability[found.n > 0] == pytest.approx(mean)
