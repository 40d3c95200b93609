"""Logits: the head's product, which for a few positions is as long as its weight takes to be read.

A head of 32,000 rows holds a fifth of the bytes that a 4-bit model of 1.1 billion weights reads for a token, and torch reads
it at half the speed of memory; the vector code of `kernels.cpu` reads it faster.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from minilora.kernels import cpu

# Narrower heads keep torch's product, and its bits: figures that are published hang on those of the small model that ships.
NARROWEST = 768


def logits(head: nn.Module, states: Tensor) -> Tensor:
    """``head(states)``: (..., hidden) -> (..., vocab).

    Guarantee: sums in float32 of the products in bfloat16, rounded once, whoever makes them (tests/llama/test_head.py).
    """
    kernel = cpu.kernel() if _may_be_fast(head, states) else None
    if kernel is None or states[..., 0].numel() > kernel.dense_rows or not isinstance(head, nn.Linear):
        return head(states)
    y = kernel.dense_product(states.reshape(-1, states.shape[-1]).contiguous(), head.weight.detach())
    return y.view(*states.shape[:-1], -1)


def _may_be_fast(head: nn.Module, states: Tensor) -> bool:
    """A plain head in bfloat16 on a CPU, and no gradient, hook or other type wanted."""
    return (type(head) is nn.Linear and head.bias is None and not head._forward_hooks and not torch.is_grad_enabled()
            and states.dtype == head.weight.dtype == torch.bfloat16 and states.device.type == head.weight.device.type == "cpu"
            and states.shape[-1] == head.in_features >= NARROWEST and states.numel() > 0 and head.weight.is_contiguous()
            and not torch.is_autocast_enabled("cpu"))
