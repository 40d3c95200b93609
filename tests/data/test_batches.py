"""Batches: every row once an epoch, in an order that can be computed again, and padding that means nothing."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.batches import collate, epoch_batches, steps_per_epoch
from minilora.data.prompts import IGNORED, Example
from minilora.errors import ConfigError

lengths = st.lists(st.integers(1, 500), max_size=400)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32)


@st.composite
def examples(draw):
    prompt = draw(st.lists(st.integers(0, 99), min_size=1, max_size=12))
    answer = draw(st.lists(st.integers(0, 99), min_size=1, max_size=6))
    return Example(prompt + answer, [IGNORED] * len(prompt) + answer, row=draw(st.integers(1, 10**6)))


@given(lengths, sizes, sizes, seeds, st.integers(0, 50))
def test_every_row_comes_once_an_epoch(lengths, batch_size, accumulate, seed, epoch):
    steps = epoch_batches(lengths, batch_size, accumulate, seed, epoch)
    assert sorted(row for step in steps for batch in step for row in batch) == list(range(len(lengths)))


@given(lengths, sizes, sizes, seeds)
def test_batches_and_steps_have_their_sizes(lengths, batch_size, accumulate, seed):
    steps = epoch_batches(lengths, batch_size, accumulate, seed, 0)
    batches = [batch for step in steps for batch in step]
    assert len(steps) == steps_per_epoch(len(lengths), batch_size, accumulate)
    assert all(len(step) == accumulate for step in steps[:-1])
    assert all(1 <= len(step) <= accumulate for step in steps)
    assert sum(len(batch) != batch_size for batch in batches) <= 1
    assert all(1 <= len(batch) <= batch_size for batch in batches)


@given(lengths, sizes, sizes, seeds, st.integers(0, 50))
def test_the_order_is_a_function_of_seed_and_epoch(lengths, batch_size, accumulate, seed, epoch):
    first = epoch_batches(lengths, batch_size, accumulate, seed, epoch)
    epoch_batches(lengths, batch_size, accumulate, seed + 1, epoch)
    np.random.seed(0)
    torch.manual_seed(0)
    assert epoch_batches(lengths, batch_size, accumulate, seed, epoch) == first


@given(lengths, sizes, seeds)
def test_accumulation_groups_the_same_batches(lengths, batch_size, seed):
    single = epoch_batches(lengths, batch_size, 1, seed, 0)
    grouped = epoch_batches(lengths, batch_size, 3, seed, 0)
    assert [batch for step in grouped for batch in step] == [batch for step in single for batch in step]


def test_epochs_and_seeds_differ():
    orders = {str(epoch_batches(range(1, 65), 4, 1, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_length_buckets_leave_little_padding():
    lengths = np.random.default_rng(0).integers(1, 200, 5000).tolist()
    batches = [batch for step in epoch_batches(lengths, 8, 1, 0, 0) for batch in step]
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded <= 1.05 * sum(lengths), f"{padded} tokens with padding, {sum(lengths)} without"


def test_steps_do_not_come_sorted_by_length():
    lengths = list(range(1, 401))
    longest = [max(lengths[row] for row in step[0]) for step in epoch_batches(lengths, 4, 1, 0, 0)]
    assert longest != sorted(longest)


@pytest.mark.parametrize(("batch_size", "accumulate", "seed", "words"), [
    (0, 1, 0, "batch_size 0"), (1, 0, 0, "accumulate 0"), (1, 1, -1, "seed -1")])
def test_impossible_sizes_are_refused(batch_size, accumulate, seed, words):
    with pytest.raises(ConfigError, match=words):
        epoch_batches([1, 2], batch_size, accumulate, seed, 0)


@given(st.lists(examples(), min_size=1, max_size=8), st.none() | st.integers(0, 99))
def test_mask_and_labels_equal_the_examples(batch, pad_id):
    out = collate(batch, pad_id)
    width = max(len(example.input_ids) for example in batch)
    assert out.input_ids.shape == out.attention_mask.shape == out.labels.shape == (len(batch), width)
    assert {out.input_ids.dtype, out.attention_mask.dtype, out.labels.dtype} == {torch.int64}
    assert out.rows == [example.row for example in batch]
    assert out.label_tokens == sum(label != IGNORED for example in batch for label in example.labels)
    for index, example in enumerate(batch):
        n = len(example.input_ids)
        assert out.input_ids[index].tolist() == example.input_ids + [pad_id or 0] * (width - n)
        assert out.attention_mask[index].tolist() == [1] * n + [0] * (width - n)
        assert out.labels[index].tolist() == example.labels + [IGNORED] * (width - n)


def test_the_end_token_keeps_its_loss_when_it_is_the_padding_id():
    eos = 2
    out = collate([Example([1, 9, 8, eos], [-100, -100, 8, eos]), Example([1, 7, eos], [-100, 7, eos])], pad_id=eos)
    assert out.labels.tolist() == [[-100, -100, 8, eos], [-100, 7, eos, -100]]
    assert out.label_tokens == 4


def test_an_empty_batch_is_refused():
    with pytest.raises(ConfigError, match="at least one example"):
        collate([], 0)
