"""The loss of fine-tuning: −log p of the label's tokens, given the prompt and the tokens before them.

Summed, not averaged: whoever takes a step knows over how many tokens of how many micro-batches the mean goes.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.data.batches import Batch, collate
from minilora.data.prompts import IGNORED, Example
from minilora.llama.model import LlamaForCausalLM

PADDING = 0     # Trap: a tokenizer's own padding id may lie past the embedding table; padding is masked, so any id will do


def label_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Sum over the batch's label tokens of −log p(token | what stands before it), a float32 scalar.

    Position t predicts token t + 1, so labels are shifted by one against the hidden states.  No attention mask: `collate`
    pads on the right, where a causal model's earlier positions don't look, and padding carries no loss.
    """
    targets = batch.labels[:, 1:]                                                          # (B, T - 1)
    carries_loss = targets != IGNORED
    # The last block is needed only where a label token is predicted: L positions a row, those of short labels filled up.
    longest = int(carries_loss.sum(1).max())
    at = carries_loss.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]     # (B, L)
    wanted = carries_loss.gather(1, at)
    logits = model.lm_head(model.hidden(batch.input_ids, at=at)[wanted])                   # (label tokens, vocab)
    return F.cross_entropy(logits.float(), targets.gather(1, at)[wanted], reduction="sum")


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
