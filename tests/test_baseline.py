"""The bag of words that a model has to beat."""
from __future__ import annotations

import importlib

import pytest

from minilora.baseline import bag_of_words, require_baseline
from minilora.errors import ConfigError, DataError

KNEE, HEAD = "XR Knee", "CT Brain"
TRAIN = [(f"{words} since {day} days", label) for day in range(20)
         for words, label in (("knee pain", KNEE), ("headache and vomiting", HEAD))]


def test_it_learns_words_and_is_sure_of_them() -> None:
    pytest.importorskip("sklearn")
    answers, chances = bag_of_words(TRAIN, ["pain in the knee", "vomiting", "KNEE"])
    assert answers == [KNEE, HEAD, KNEE] and all(0.5 < chance <= 1 for chance in chances)
    assert bag_of_words(TRAIN, ["pain in the knee"], val=TRAIN[:4])[0] == [KNEE]
    assert bag_of_words(TRAIN, ["knee"], seed=3) == bag_of_words(TRAIN, ["knee"], seed=3)


def test_a_single_label_cannot_be_learnt() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(DataError, match="fewer than two labels"):
        bag_of_words([("a", KNEE)] * 3, ["a"])


def test_without_scikit_learn_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"minilora\[baseline\]"):
        require_baseline()
