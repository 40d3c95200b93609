"""Exercise 10: one training example, and a batch of them."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minilora.course.grading import Mistake, Task
from minilora.data.batches import collate
from minilora.data.prompts import IGNORED, Example
from minilora.testing import label_mask

Ids = list[int]
Pair = tuple[Ids, Ids]
Batch = tuple[Tensor, Tensor, Tensor]


def _plain(answer: Callable[..., Any], *inputs: Any) -> tuple[Ids, Ids]:
    """Ids as plain lists, whatever they came in."""
    ids, labels = (each.tolist() if isinstance(each, Tensor) else list(each) for each in answer(*(list(i) if isinstance(i, list)
                                                                                               else i for i in inputs)))
    return ids, labels


def _collate(examples: list[Pair], pad_id: int) -> Batch:
    batch = collate([Example(ids, labels) for ids, labels in examples], pad_id)
    return batch.input_ids, batch.attention_mask, batch.labels


def _stacked(examples: list[Pair], fill: Callable[[Pair, int], tuple[Ids, Ids, Ids]]) -> Batch:
    longest = max(len(ids) for ids, _ in examples)
    rows = [fill(example, longest - len(example[0])) for example in examples]
    ids, mask, labels = (torch.tensor([row[part] for row in rows]) for part in range(3))
    return ids, mask, labels


def _left(examples: list[Pair], pad_id: int) -> Batch:
    return _stacked(examples, lambda e, gap: ([pad_id] * gap + e[0], [0] * gap + [1] * len(e[0]), [IGNORED] * gap + e[1]))


def _loss_on_padding(examples: list[Pair], pad_id: int) -> Batch:
    return _stacked(examples, lambda e, gap: (e[0] + [pad_id] * gap, [1] * len(e[0]) + [0] * gap, e[1] + [pad_id] * gap))


def _all_seen(examples: list[Pair], pad_id: int) -> Batch:
    return _stacked(examples, lambda e, gap: (e[0] + [pad_id] * gap, [1] * (len(e[0]) + gap), e[1] + [IGNORED] * gap))


def _masked_by_id(examples: list[Pair], pad_id: int) -> Batch:
    ids, mask, labels = _collate(examples, pad_id)
    return ids, mask, labels.masked_fill(labels == pad_id, IGNORED)


def _seen_by_id(examples: list[Pair], pad_id: int) -> Batch:
    ids, _, labels = _collate(examples, pad_id)
    return ids, (ids != pad_id).long(), labels


def _draw(generator: torch.Generator) -> tuple[Ids, Ids, int]:
    def some(least: int) -> Ids:
        n = int(torch.randint(least, 6, (), generator=generator))
        ids: Ids = torch.randint(3, 50, (n,), generator=generator).tolist()
        return ids
    return some(2), some(1), 1


def _draw_batch(generator: torch.Generator) -> tuple[list[Pair], int]:
    """Three examples of unequal length; the padding id is that of the end token, as careless tokenizers have it."""
    return [label_mask(*_draw(generator)) for _ in range(3)], 1


FIXED = ([([0, 5, 6, 7, 8, 1], [IGNORED, IGNORED, IGNORED, 7, 8, 1]), ([0, 5, 9, 1], [IGNORED, IGNORED, 9, 1])], 2)
TASKS = (
    Task("training_example", label_mask, fixed=(([0, 5, 6], [7, 8], 1),), random=_draw, probe=_plain, mistakes=(
        Mistake("the prompt carries loss: its labels must be -100, or the model is trained to write notes",
                lambda prompt, label, end: ([*prompt, *label, end], [*prompt, *label, end])),
        Mistake("the end token is missing: the model would never learn to stop",
                lambda prompt, label, end: ([*prompt, *label], [IGNORED] * len(prompt) + label)),
        Mistake("the end token is there, but carries no loss: the model would never learn to stop",
                lambda prompt, label, end: ([*prompt, *label, end], [IGNORED] * len(prompt) + [*label, IGNORED])),
        Mistake("you shifted the labels by one: the loss does that itself, and twice is once too often",
                lambda prompt, label, end: ([*prompt, *label, end], [IGNORED] * (len(prompt) - 1) + [*label, end, IGNORED])),
        Mistake("the label's tokens carry no loss, the prompt's do: it is the other way round",
                lambda prompt, label, end: ([*prompt, *label, end], [*prompt] + [IGNORED] * (len(label) + 1))))),
    Task("collate", _collate, fixed=(FIXED,), random=_draw_batch, mistakes=(
        Mistake("you padded on the left: in training a causal model is padded on the right, where no real token looks", _left),
        Mistake("padding carries loss: its labels must be -100", _loss_on_padding),
        Mistake("the attention mask is 1 on padding as well: 1 is for real tokens", _all_seen),
        Mistake("you masked labels by the padding id: where that is the end token's, the end is never learnt", _masked_by_id),
        Mistake("you found padding by its id: where that is the end token's, real end tokens are masked too. Count lengths",
                _seen_by_id))),
)
