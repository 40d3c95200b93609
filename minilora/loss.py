"""The loss of fine-tuning: −log p of the label's tokens, given the prompt and the tokens before them.

Summed, not averaged: whoever takes a step knows over how many tokens of how many micro-batches the mean goes.

Lesson 10 explains it.
"""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.data.batches import Batch, collate
from minilora.data.prompts import IGNORED, Example
from minilora.llama.head import logits
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.recompute import recompute

CHUNK_BYTES = 64 * 2 ** 20      # of logits in float32 at a time: enough rows for a product at full speed, of any vocabulary
PADDING = 0     # Trap: a tokenizer's own padding id may lie past the embedding table; padding is masked, so any id will do


def picks(longest: int, length: int) -> bool:
    """Whether the last block is computed where label tokens are predicted alone, up to `longest` of the `length` of a row.

    Where most are needed, picking them out, and a mask of who sees whom, costs more than the rest of them.
    """
    return 2 * longest <= length


def label_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Sum over the batch's label tokens of −log p(token | what stands before it), a float32 scalar.

    Position t predicts token t + 1, so labels are shifted by one against the hidden states.  No attention mask: `collate`
    pads on the right, where a causal model's earlier positions don't look, and padding carries no loss.
    """
    targets = batch.labels[:, 1:]                                                          # (B, T - 1)
    carries_loss = targets != IGNORED
    # The last block is needed only where a label token is predicted: L positions a row, those of short labels filled up.
    longest = max(1, int(carries_loss.sum(1).max()))        # of a batch without label tokens: a sum of none, 0
    if not picks(longest, targets.shape[1]):
        hidden = model.hidden(batch.input_ids)[:, :-1][carries_loss]
        return head_loss(model.lm_head, hidden, targets[carries_loss])
    at = carries_loss.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]     # (B, L)
    wanted = carries_loss.gather(1, at)
    hidden = model.hidden(batch.input_ids, at=at)[wanted]                                  # (label tokens, hidden)
    return head_loss(model.lm_head, hidden, targets.gather(1, at)[wanted])


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Sum of −log softmax(head(h))[target], a float32 scalar.

    Logits take 10 bytes for each entry of the vocabulary, and as much for their gradients: of 1,000 label tokens and a
    vocabulary of 128,000, 2.6 GB.  So the tokens go through in chunks, each of whose logits are dropped, and computed again in
    the backward.

    Args: hidden: (n, hidden). targets: (n,) int64. chunk_bytes: of logits in float32 at a time.
    Guarantee: the bits of one chunk where one is enough; else the sum's rounding (tests/test_loss.py).
    """
    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(head, hidden).float(), targets, reduction="sum")

    rows = max(1, chunk_bytes // (4 * getattr(head, "out_features", 1)))
    if len(hidden) <= rows:
        return loss(hidden, targets)
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.stack([loss(*part) for part in parts]).sum()
    return torch.stack([recompute(partial(loss, targets=wanted), part) for part, wanted in parts]).sum()


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, examples: list[Example], batch_size: int) -> float:
    """Mean −log p over the label tokens of all examples; the model is put back into its mode."""
    was_training = model.training
    model.eval()
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    total, tokens = 0.0, 0
    for start in range(0, len(by_length), batch_size):
        batch = collate(by_length[start : start + batch_size], PADDING).to(model.device)
        total += float(label_loss(model, batch))
        tokens += batch.label_tokens
    model.train(was_training)
    return total / tokens
