"""The head's loss in chunks: the same number and gradients, without all logits at once."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.data.batches import collate
from minilora.data.prompts import IGNORED, Example
from minilora.layers.lora import LoRAConfig
from minilora.layers.qlora import add_lora
from minilora.loss import head_loss, label_loss
from minilora.memory import Workload, logits_bytes
from minilora.shapes import random_model, shape_of


def case(trained_head: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(24, 300, bias=False).requires_grad_(trained_head)
    return head, torch.randn(50, 24, requires_grad=True), torch.randint(0, 300, (50,))


@pytest.mark.parametrize("rows", [1, 7, 49])
@pytest.mark.parametrize("trained_head", [False, True])
def test_chunks_give_the_loss_and_gradients_of_the_whole(rows: int, trained_head: bool) -> None:
    head, hidden, targets = case(trained_head)
    whole = F.cross_entropy(head(hidden), targets, reduction="sum")
    whole.backward()
    expected = [hidden.grad, head.weight.grad]
    hidden.grad = head.weight.grad = None
    chunked = head_loss(head, hidden, targets, chunk_bytes=4 * 300 * rows)
    chunked.backward()
    torch.testing.assert_close(chunked, whole)
    for found, theirs in zip([hidden.grad, head.weight.grad], expected, strict=True):
        assert (found is None) == (theirs is None)
        if found is not None:
            torch.testing.assert_close(found, theirs)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(head, hidden, targets, chunk_bytes=4 * 300 * rows), whole)


def test_no_logits_outlive_their_chunk() -> None:
    head, hidden, targets = case(trained_head=False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        head_loss(head, hidden, targets, chunk_bytes=4 * 300 * 7)
        inside = max(tensor.numel() for tensor in kept)
        kept.clear()
        head_loss(head, hidden, targets)
    assert inside == 7 * 24 and max(tensor.numel() for tensor in kept) == 50 * 300, "else there was nothing to drop"


def test_one_chunk_has_the_bits_of_the_plain_formula() -> None:
    head, hidden, targets = case(trained_head=False)
    assert torch.equal(head_loss(head, hidden, targets), F.cross_entropy(head(hidden), targets, reduction="sum"))


def test_the_plan_counts_one_chunk_of_a_large_vocabulary() -> None:
    config = shape_of("8b")
    few, many = (logits_bytes(config, Workload("qlora", batch=1, seq=2048, label_tokens=tokens)) for tokens in (64, 2000))
    assert config.vocab_size == 128_256 and few == 64 * 128_256 * 10 and many == 130 * 128_256 * 10


def test_a_batch_without_label_tokens_adds_nothing_and_has_a_gradient() -> None:
    model = add_lora(random_model(shape_of("tiny"), quantize=None), LoRAConfig(r=2)).train()
    batch = collate([Example([1, 5, 6, 7], [IGNORED] * 4), Example([1, 5], [IGNORED] * 2)], 0)
    assert batch.label_tokens == 0
    loss = label_loss(model, batch)
    loss.backward()
    assert loss.item() == 0 and all(not bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


def test_a_label_in_the_first_place_is_predicted_by_nothing_and_not_counted() -> None:
    assert collate([Example([1, 2, 3], [1, 2, 3])], 0).label_tokens == 2
