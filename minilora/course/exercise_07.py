"""Exercise 07: the product with a frozen 4-bit weight, forward and backward, with no dense weight kept between the two."""
from __future__ import annotations

import gc
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from minilora.course.grading import Mistake, Task
from minilora.layers.nf4_linear import NF4Product
from minilora.quant.nf4 import NF4Tensor, quantize_nf4

SIZE = 16       # square, so that a forgotten transposition is a wrong number and no error


class _Package:
    """The package's product, called as the reader's is."""

    @staticmethod
    def apply(x: Tensor, weight: NF4Tensor) -> Tensor:
        """x Ŵᵀ."""
        return NF4Product.apply(x, weight, None, False)


@dataclass(frozen=True, eq=False)
class _Watched(NF4Tensor):
    """Remembers each dense weight that was made of it, without keeping it; None where the caller gave the buffer."""

    made: list[StorageWeakRef | None] = field(default_factory=list)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        dense = super().dequantize(dtype, out)
        self.made.append(StorageWeakRef(dense.untyped_storage()) if out is None else None)
        return dense

    def alive(self) -> bool:
        """Whether one of them is still there, whoever has it."""
        return any(each is not None and not each.expired() for each in self.made)


def _run(answer: Any, x: Tensor, weight: NF4Tensor, grad_y: Tensor) -> dict[str, Any]:
    """Forward and backward, and whether a dense weight lay in memory between the two.

    It is one that autograd was given, or hangs on ctx; or one that `dequantize` made and that is alive, in a list, a closure or
    a global; or a copy, which shows in a backward that makes none, after a forward that did.
    """
    saved: list[Any] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    weight = _Watched(**{each.name: getattr(weight, each.name) for each in fields(NF4Tensor)})
    x = x.clone().requires_grad_()
    with saved_tensors_hooks(save, lambda tensor: tensor):
        y = answer.apply(x, weight)
    saved += vars(y.grad_fn).values() if hasattr(y.grad_fn, "__dict__") else ()
    kept = any(isinstance(each, Tensor) and each.is_floating_point() and each.numel() >= SIZE * SIZE for each in saved)
    del saved[:]
    if weight.alive():
        gc.collect()
    kept, in_forward = kept or weight.alive(), len(weight.made)
    if y.requires_grad:
        y.backward(grad_y)
    return {"y": y.detach(), "gradient of x": None if x.grad is None else x.grad,
            "a dense weight is kept for backward": kept or len(weight.made) == in_forward > 0}


class _Mistaken(torch.autograd.Function):
    """What the mistakes below have in common."""

    @classmethod
    def _dense(cls, weight: NF4Tensor) -> Tensor:
        return weight.dequantize(torch.float32)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Tensor) -> Tensor:
        """x Ŵᵀ."""
        ctx.weight = weight
        return x @ weight.dequantize(torch.float32).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """∂L/∂y Ŵ."""
        return grads[0] @ ctx.weight.dequantize(torch.float32), None


class _KeepsDense(_Mistaken):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Tensor) -> Tensor:
        dense = weight.dequantize(torch.float32)
        ctx.save_for_backward(dense)
        return x @ dense.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dense, = ctx.saved_tensors
        return grads[0] @ dense, None


class _TransposedForward(_Mistaken):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Tensor) -> Tensor:
        ctx.weight = weight
        return x @ weight.dequantize(torch.float32)


class _TransposedBackward(_Mistaken):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0] @ ctx.weight.dequantize(torch.float32).T, None


class _StraightThrough(_Mistaken):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], None


class _NoGradient(_Mistaken):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None


def _draw(generator: torch.Generator) -> tuple[Tensor, NF4Tensor, Tensor]:
    weight = quantize_nf4(torch.randn(SIZE, SIZE, generator=generator))
    return torch.randn(3, SIZE, generator=generator), weight, torch.randn(3, SIZE, generator=generator)


TASKS = (
    Task("FrozenProduct", _Package, fixed=(), random=_draw, probe=_run, mistakes=(
        Mistake("right, but the dense weight is kept from forward to backward, wherever it hangs, in every layer at once: the "
                "whole model, dense. Keep the NF4Tensor on ctx, and dequantize again in backward", _KeepsDense),
        Mistake("the forward multiplies by W: a linear layer's weight is (out, in), so y = x W^T", _TransposedForward),
        Mistake("the backward multiplies by W^T: y = x W^T has the gradient grad_y W", _TransposedBackward),
        Mistake("you passed the gradient on as it came: it has to go through the weight, grad_y W", _StraightThrough),
        Mistake("x gets no gradient: the weight is frozen, but the layers below are reached through x alone", _NoGradient))),
)
