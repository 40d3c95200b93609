"""The low-rank update as one function, which keeps less and adds in place.

    forward     update = scaling · (x Aᵀ) Bᵀ                    then the base adds x Ŵᵀ to it, in place
    backward    ∂L/∂x = ∂L/∂y Ŵ, by the base                    then += scaling · (∂L/∂y B) A, in place
                ∂L/∂B = ∂L/∂yᵀ (scaling · x Aᵀ),    ∂L/∂A = scaling · (∂L/∂y B)ᵀ x

Autograd would make y and its update one by one and add them, (..., out) each, the same with both shares of ∂L/∂x, and keep
16-bit copies of A and B from forward to backward.  Here the sums are taken within the products, in float32, and rounded once.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minilora.layers import dense
from minilora.layers.few_rows import few_rows_product, takes_few_rows


def plain_update(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling · (x Aᵀ) Bᵀ: x (..., in), A (r, in), B (out, r) -> (..., out), in x's type."""
    # Scaled while it is narrow: (..., r) is read and written in a moment, (..., out) in forward and backward is not.
    return dense.linear(dense.linear(x, a.to(x.dtype)) * scaling, b.to(x.dtype))


def few_rows_update(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor | None:
    """`plain_update` by `few_rows_product`, where no gradient is wanted and that makes it, or None."""
    if torch.is_grad_enabled() or not takes_few_rows(x):
        return None
    low = few_rows_product(x, a.to(x.dtype))
    return None if low is None else few_rows_product(low.mul_(scaling), b.to(x.dtype))


class LowRankUpdate(torch.autograd.Function):
    """x ↦ (x, scaling · (x Aᵀ) Bᵀ), so that the base product is made of the x that came through here.

    Its gradient then arrives whole, and the update's share of ∂L/∂x is added to it in the product that makes it.  Of the base
    nothing is known: whoever has the update adds the product to it (`NF4Linear.add_to`).  The update comes first and the base
    last, since nothing of a base product is kept: recomputing a block ends before its last one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor | None, Tensor]:
        """x: (..., in), A: (r, in), B: (out, r) -> x, or None where it needs no gradient, and (..., out)."""
        low = dense.linear(x, a.to(x.dtype)).mul_(scaling)                                 # (..., r)
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        update = x.new_empty(*x.shape[:-1], len(b))
        dense.matmul(low.view(-1, len(a)), b.to(x.dtype).T, out=update.view(-1, len(b)))
        return (x if ctx.needs_input_grad[0] else None), update

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂L/∂x by way of the base, and ∂L/∂update: (..., out)."""
        x, low, a, b = ctx.saved_tensors
        grad_x, grad_update = grads
        if grad_update is None:
            return grad_x, None, None, None
        if torch.is_grad_enabled():         # the gradient is to be differentiated once more
            wanted = [tensor for tensor, needed in zip((x, a, b), ctx.needs_input_grad, strict=False) if needed]
            found = torch.autograd.grad(plain_update(x, a, b, ctx.scaling), wanted, grad_update, create_graph=True)
            shares = iter(found)
            by_update, grad_a, grad_b = (next(shares) if needed else None for needed in ctx.needs_input_grad[:3])
            return by_update if grad_x is None or by_update is None else grad_x + by_update, grad_a, grad_b, None
        g = grad_update.reshape(-1, len(b))
        grad_low = dense.matmul(g, b.to(x.dtype)).mul_(ctx.scaling)                        # (..., r)
        flat_x, flat_low = x.reshape(-1, x.shape[-1]), low.reshape(-1, len(a))
        grad_a = dense.matmul(grad_low.T, flat_x).to(a.dtype) if ctx.needs_input_grad[1] else None
        grad_b = dense.matmul(g.T, flat_low).to(b.dtype) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[0]:
            share = a.to(x.dtype)
            # Made by the base's backward a moment ago, and in nobody else's hands.
            grad_x = dense.matmul(grad_low, share).view_as(x) if grad_x is None else \
                dense.addmm_(grad_x.view(-1, x.shape[-1]), grad_low, share).view_as(x)
        return grad_x, grad_a, grad_b, None
