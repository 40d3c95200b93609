"""Products of 16-bit matrices: torch's, or on a CPU that has no instructions for them those of float32, rounded once.

On such a CPU (AVX2: most laptops) torch multiplies 16-bit numbers one by one, and a training step took 25 times as long in
bfloat16 as in float32.  Every 16-bit number is a float32 number, and torch sums in float32 too: what is computed here is the
same but for the order of the sums.  A large matrix is widened piece by piece, so that it is never in memory as float32.

Lesson 17 explains it.
"""
from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.layers.scratch import borrow

PIECE = 1 << 20         # elements of a matrix that are float32 at a time: 4 MB
FEW_ROWS = 4            # whose products with the lines of a matrix, as they lie in memory, torch makes faster in 16 bits


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of this type about as fast as float32's."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if name is None:
        return True
    told = getattr(torch.ops.mkldnn, name, None)        # a build without oneDNN has no such question
    return told is not None and bool(told())


def is_widened(x: Tensor) -> bool:
    """Whether products of x are made in float32.  Under autocast the types are torch's to choose."""
    return (x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu" and not multiplies(x.dtype)
            and not torch.is_autocast_enabled("cpu"))


def _is_wide(a: Tensor, b: Tensor) -> bool:
    """Whether ``a b`` is made in float32."""
    return is_widened(a) and not (b.stride(0) == 1 and a.numel() <= FEW_ROWS * a.shape[-1])


def _add_wide(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``y += a b``: y (..., n) float32; a (..., k) and b (k, n) 16-bit, b cut across its lines as they lie in memory."""
    rows, lies = prod(a.shape[:-1]), b.stride(0) >= b.stride(1)
    a, flat_y = a.float().reshape(rows, len(b)), y.view(rows, b.shape[1])
    lines = b if lies else b.T
    step = max(1, PIECE // max(1, lines.shape[1]))
    for start in range(0, len(lines), step):
        stop = min(start + step, len(lines))
        piece = borrow(torch.Size((stop - start, lines.shape[1])), torch.float32, b.device, "piece").copy_(lines[start:stop])
        if lies:
            flat_y.addmm_(a[:, start:stop], piece)
        else:
            flat_y[:, start:stop].addmm_(a, piece.T)
    return y


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a b`` without a gradient: (..., k) and (k, n) of one type -> (..., n), or `out`."""
    if not _is_wide(a, b):
        return torch.matmul(a, b, out=out)
    wide = _add_wide(a.new_zeros(*a.shape[:-1], b.shape[1], dtype=torch.float32), a, b)
    return wide.to(a.dtype) if out is None else out.copy_(wide)


def addmm_(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``y += a b`` in place without a gradient: (rows, n), (rows, k) and (k, n) of one type -> y."""
    return y.copy_(_add_wide(y.float(), a, b)) if _is_wide(a, b) else y.addmm_(a, b)


class _WideLinear(torch.autograd.Function):
    """``x Wᵀ + b``, which keeps what torch's keeps, in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        y = x.new_zeros(*x.shape[:-1], len(weight), dtype=torch.float32)
        return _add_wide(y if bias is None else y.add_(bias), x, weight.T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (x, weight) = grads[0], ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        return (None if weight is None else linear(grad, weight.T),
                None if x is None else linear(flat.T, x.reshape(-1, x.shape[-1]).T),
                flat.sum(0) if ctx.needs_input_grad[2] else None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: ``x Wᵀ + b`` of (..., in), (out, in) and (out,) or None -> (..., out)."""
    learning = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    wide = is_widened(x) if learning else _is_wide(x, weight.T)                         # the way back is never torch's
    if not wide or weight.dtype != x.dtype or x.shape[-1] != weight.shape[-1]:          # of what doesn't fit torch says so
        return F.linear(x, weight, bias)
    return _WideLinear.apply(x, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, whose products are no other than these; heads may share keys."""
    kind, shared = q.dtype, q.shape[1] != k.shape[1]
    if is_widened(q):
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared).to(kind)
