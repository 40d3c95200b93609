"""Examples of unequal length become rectangles, with little padding and in an order that can be computed again.

One epoch, in four steps: shuffle the rows; sort each run of 50 batches' worth of them by length, so that neighbours are
alike and a batch pads little; cut batches; shuffle the batches, so that no step sees only short notes.  `accumulate`
batches form one optimizer step.

The order is a pure function of (lengths, sizes, seed, epoch).  Nothing is carried from one epoch to the next, so the
position of a run is two integers, (epoch, step), and a killed run resumes on the very batch it would have seen.

The loss of a step is the sum over its label tokens divided by their number over the whole step, so a batch counts them
(`label_tokens`): the mean of micro-batch means would weigh short labels more (transformers issues 34191, 35203).

Lessons 10 and 14 explain it.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minilora.data.prompts import IGNORED, Example
from minilora.errors import ConfigError

BUCKET_BATCHES = 50


@dataclass(frozen=True)
class Batch:
    """A rectangle of examples.

    input_ids, attention_mask, labels: (B, T) int64; mask 1 = token, 0 = padding; labels -100 = no loss.
    label_tokens: positions that carry loss.  rows: the examples' row numbers in their file.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    label_tokens: int
    rows: list[int]

    def to(self, device: str | torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device),
                     self.label_tokens, self.rows)


def collate(examples: Sequence[Example], pad_id: int | None) -> Batch:
    """Stack examples, padded on the right to the longest one.

    Padding is recognised by attention_mask = 0 and labels = -100, never by its id, so any id will do: 0 where the
    tokenizer names none.  Trap: padding with the end token and masking "labels equal to the padding id" masks the real
    end tokens too; the model never learns to stop (MYTHS 27).  Here an end token inside an example keeps its loss
    whatever the padding id.

    Args:
        examples: B >= 1 of them.
        pad_id: id written into padding; None means 0.

    Raises:
        ConfigError: no examples.
    """
    if not examples:
        raise ConfigError("a batch needs at least one example")
    length = max(len(example.input_ids) for example in examples)
    shape, padding = (len(examples), length), 0 if pad_id is None else pad_id
    input_ids = torch.full(shape, padding, dtype=torch.int64, device="cpu")                # (B, T)
    attention_mask = torch.zeros_like(input_ids)                                           # (B, T)
    labels = torch.full_like(input_ids, IGNORED)                                           # (B, T)
    for index, example in enumerate(examples):
        n = len(example.input_ids)
        input_ids[index, :n] = input_ids.new_tensor(example.input_ids)
        attention_mask[index, :n] = 1
        labels[index, :n] = labels.new_tensor(example.labels)
    return Batch(input_ids, attention_mask, labels, int((labels[:, 1:] != IGNORED).sum()), [e.row for e in examples])


def steps_per_epoch(rows: int, batch_size: int, accumulate: int) -> int:
    """Return the optimizer steps of one epoch: ceil(ceil(rows / batch_size) / accumulate)."""
    batches = -(-rows // batch_size)
    return -(-batches // accumulate)


def epoch_batches(lengths: Sequence[int], batch_size: int, accumulate: int, seed: int,
                  epoch: int) -> list[list[list[int]]]:
    """Return an epoch as optimizer steps of micro-batches of indices into `lengths`.

    Args:
        lengths: tokens of each example.
        batch_size: examples a micro-batch; one batch of the epoch may be smaller.
        accumulate: micro-batches an optimizer step; the last step may have fewer.
        seed, epoch: not negative; together they pick the shuffle (numpy PCG64 on SeedSequence([seed, epoch])).

    Raises:
        ConfigError: a size below 1, or a negative seed or epoch.

    Guarantee: every index exactly once (test_every_row_comes_once_an_epoch); `steps_per_epoch` steps.
    """
    if batch_size < 1 or accumulate < 1:
        raise ConfigError(f"batch_size {batch_size} and accumulate {accumulate} must be at least 1")
    if seed < 0 or epoch < 0:
        raise ConfigError(f"seed {seed} and epoch {epoch} must not be negative")
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(len(lengths))
    size = np.asarray(lengths, dtype=np.int64)
    batches: list[list[int]] = []
    bucket = BUCKET_BATCHES * batch_size
    for start in range(0, len(order), bucket):
        rows = order[start:start + bucket]
        rows = rows[np.argsort(size[rows], kind="stable")]
        batches += [rows[i:i + batch_size].tolist() for i in range(0, len(rows), batch_size)]
    batches = [batches[i] for i in generator.permutation(len(batches))]
    return [batches[i:i + accumulate] for i in range(0, len(batches), accumulate)]
