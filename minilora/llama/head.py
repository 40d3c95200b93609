"""Logits: the head's product, which for a few positions is as long as its weight takes to be read.

A head of 32,000 rows holds a fifth of the bytes that a 4-bit model of 1.1 billion weights reads for a token.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from minilora.layers import dense
from minilora.layers.few_rows import few_rows_product
from minilora.layers.hooks import is_hooked

# Narrower heads keep torch's product, and its bits: figures that are published hang on those of the small model that ships.
NARROWEST = 768


def logits(head: nn.Module, states: Tensor) -> Tensor:
    """``head(states)``: (..., hidden) -> (..., vocab).

    Guarantee: sums in float32 of the products in bfloat16, rounded once, whoever makes them (tests/llama/test_head.py).
    """
    if type(head) is not nn.Linear or head.bias is not None or is_hooked(head):
        made: Tensor = head(states)
        return made
    few = None if torch.is_grad_enabled() or states.shape[-1] < NARROWEST else few_rows_product(states, head.weight)
    return dense.linear(states, head.weight) if few is None else few
