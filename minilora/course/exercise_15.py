"""Exercise 15: exact match and macro-F1, by their definitions."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minilora.course.grading import Mistake, Task
from minilora.evaluate import Evaluation, evaluate

Labels = Sequence[str]
NAMES = ("CT Brain", "CT Abdomen W Contrast", "CT Abdomen WO Contrast", "MRI Knee")


def _evaluation(predictions: Labels, references: Labels) -> Evaluation:
    def apart(texts: Sequence[str]) -> Tensor:
        return torch.eye(len(texts))        # cosine plays no part here
    return evaluate(predictions, references, apart, resamples=1)


def _exact(predictions: Labels, references: Labels) -> float:
    return _evaluation(predictions, references).exact_match


def _macro(predictions: Labels, references: Labels) -> float:
    return _evaluation(predictions, references).macro_f1


def _by_label(predictions: Labels, references: Labels) -> dict[str, tuple[int, int, int]]:
    """Of each label: hits, references, predictions."""
    hits = Counter(p for p, r in zip(predictions, references, strict=True) if p == r)
    n, said = Counter(references), Counter(predictions)
    return {name: (hits[name], n[name], said[name]) for name in {*references, *predictions}}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _over_all(predictions: Labels, references: Labels) -> float:
    return _mean([2 * hit / (n + said) for hit, n, said in _by_label(predictions, references).values()])


def _weighted(predictions: Labels, references: Labels) -> float:
    return sum(n * 2 * hit / (n + said) for hit, n, said in _by_label(predictions, references).values()) / len(references)


def _recalls(predictions: Labels, references: Labels) -> float:
    return _mean([hit / n for hit, n, _ in _by_label(predictions, references).values() if n])


def _arithmetic(predictions: Labels, references: Labels) -> float:
    counts = _by_label(predictions, references).values()
    return _mean([(hit / n + (hit / said if said else 0)) / 2 for hit, n, said in counts if n])


def _matching(same: Callable[[str, str], bool]) -> Callable[[Labels, Labels], float]:
    return lambda predictions, references: _mean([float(same(p, r)) for p, r in zip(predictions, references, strict=True)])


def _draw(generator: torch.Generator) -> tuple[list[str], list[str]]:
    picks = torch.randint(0, 4, (2, 15), generator=generator)
    kept = torch.rand(15, generator=generator) < 0.5
    references = [NAMES[index % 3] for index in picks[0].tolist()]
    predictions = [right if keep else NAMES[index] for right, keep, index in
                   zip(references, kept.tolist(), picks[1].tolist(), strict=True)]
    return predictions, references


def _spelled(generator: torch.Generator) -> tuple[list[str], list[str]]:
    predictions, references = _draw(generator)
    changed = [text.upper() if index % 3 == 0 else text.replace(" ", "  ") if index % 3 == 1 else text
               for index, text in enumerate(predictions)]
    return changed, references


FIXED = (["CT Brain", "ct  brain", "CT Abdomen W Contrast", "MRI"],
         ["CT Brain", "CT Brain", "CT Abdomen WO Contrast", "MRI Knee"])
SPACED = (["CTBrain", "CT Brain"], ["CT Brain", "CT Brain"])
TASKS = (
    Task("exact_match", _exact, fixed=(FIXED, SPACED), random=_spelled, mistakes=(
        Mistake("compare without case and runs of spaces: 'ct  brain' is the answer 'CT Brain'",
                _matching(lambda p, r: p == r)),
        Mistake("you still compare runs of spaces: 'CT  Brain' is the answer 'CT Brain'",
                _matching(lambda p, r: p.casefold() == r.casefold())),
        Mistake("'CTBrain' is not 'CT Brain': make one space of a run, do not take spaces out",
                _matching(lambda p, r: "".join(p.casefold().split()) == "".join(r.casefold().split()))),
        Mistake("an answer that is contained in the right one is not right: 'MRI' is not 'MRI Knee'",
                _matching(lambda p, r: " ".join(p.casefold().split()) in r.casefold())),
        Mistake("that is the number of right answers: divide by the number of rows",
                lambda predictions, references: _exact(predictions, references) * len(references)))),
    Task("macro_f1", _macro, random=_draw,
         fixed=((["a", "a", "a", "b"], ["a", "a", "b", "b"]), (["a", "c"], ["a", "b"])), mistakes=(
        Mistake("the mean goes over the labels among the *references*: an answer outside them is a miss, not another label",
                _over_all),
        Mistake("each label counts the same in a macro mean; you weighted by the number of rows", _weighted),
        Mistake("that is exact match (micro-F1): take F1 label by label first", _exact),
        Mistake("that is the mean recall: F1 also asks how many of the label's answers were right", _recalls),
        Mistake("F1 is the harmonic mean of precision and recall, 2 hits / (references + predictions)", _arithmetic))),
)
