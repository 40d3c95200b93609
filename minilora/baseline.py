"""A bag of words, the yardstick that keeps a language model honest: TF-IDF over words and their pairs, logistic regression.

    x_w = (1 + log count of w) · (1 + log((1 + notes) / (1 + notes with w))),  scaled to length 1;   p = softmax(W x + b)

It knows no order beyond neighbours, no negation that isn't a pair of words, and nothing that the training table doesn't hold.
It takes seconds and no GPU: a model that doesn't beat it isn't worth its cost.  Needs scikit-learn (extra ``[baseline]``).
"""
from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from minilora.errors import ConfigError, DataError

NAME = "bag of words"
STRENGTHS = (10.0, 100.0)       # C, the inverse of the penalty
HELD_OUT = 0.1                  # share of the notes that choose between settings, where no table for it is given


def require_baseline() -> Any:
    """scikit-learn.

    Raises: ConfigError: it is not installed.
    """
    try:
        for name in ("sklearn.feature_extraction.text", "sklearn.linear_model", "sklearn.pipeline"):
            importlib.import_module(name)
        return importlib.import_module("sklearn")
    except ImportError as error:
        raise ConfigError("the baseline needs scikit-learn: pip install 'minilora[baseline]'") from error


def bag_of_words(train: Sequence[tuple[str, str]], notes: Sequence[str], val: Sequence[tuple[str, str]] = (),
                 seed: int = 0) -> tuple[list[str], list[float]]:
    """Fit on (note, label) pairs and answer notes.

    Words or words and pairs, and the strength of the penalty, are chosen on `val`, or else on a tenth of `train` that is held
    out (and then counts again: the best setting is fitted to all).

    Returns: labels and their probabilities.
    Raises: ConfigError: no scikit-learn. DataError: fewer than two labels to learn.
    """
    sklearn = require_baseline()
    if len({label for _, label in train}) < 2:
        raise DataError("the baseline's training table has fewer than two labels; give the table that the model was trained on")

    def fitted(rows: Sequence[tuple[str, str]], pairs: int, strength: float) -> Any:
        least = 2 if len(rows) > 200 else 1
        model = sklearn.pipeline.make_pipeline(
            sklearn.feature_extraction.text.TfidfVectorizer(ngram_range=(1, pairs), sublinear_tf=True, min_df=least),
            sklearn.linear_model.LogisticRegression(C=strength, max_iter=300))
        return model.fit([note for note, _ in rows], [label for _, label in rows])

    order = np.random.default_rng(seed).permutation(len(train)).tolist()
    cut = len(train) - (0 if val else max(1, int(len(train) * HELD_OUT)))
    part, held = [train[i] for i in order[:cut]], list(val) or [train[i] for i in order[cut:]]
    if len({label for _, label in part}) < 2:
        part = list(train)
    settings = list(itertools.product((1, 2), STRENGTHS))
    trials = [fitted(part, *setting) for setting in settings]
    scores = [model.score([note for note, _ in held], [label for _, label in held]) for model in trials]
    best = int(np.argmax(scores))                               # the first of equals: the simplest
    model = trials[best] if val else fitted(list(train), *settings[best])
    chances = model.predict_proba(list(notes))
    return [str(model.classes_[i]) for i in chances.argmax(axis=1)], chances.max(axis=1).tolist()
