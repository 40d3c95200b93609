"""Exercise 03: the LoRA layer's forward, its start, and its gradients."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.course.grading import Mistake, Task
from minilora.layers.lora import LoRALinear

Pair = tuple[Tensor, Tensor]


def _layer(weight: Tensor, lora_a: Tensor, lora_b: Tensor, alpha: float) -> LoRALinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    layer = LoRALinear(linear, r=len(lora_a), alpha=alpha)
    with torch.no_grad():
        layer.lora_A.weight.copy_(lora_a)
        layer.lora_B.weight.copy_(lora_b)
    return layer


def _forward(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, alpha: float) -> Tensor:
    return _layer(weight, lora_a, lora_b, alpha)(x).detach()


def _scaled(scale: Callable[[float, int], float], base: Callable[[float, int], float] = lambda alpha, r: 1.0
            ) -> Callable[..., Tensor]:
    """The forward with other factors on the update and on the base."""
    def forward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
        return base(alpha, len(a)) * (x @ weight.T) + scale(alpha, len(a)) * (x @ a.T @ b.T)
    return forward


def _start(in_features: int, out_features: int, r: int) -> Pair:
    layer = LoRALinear(nn.Linear(in_features, out_features), r=r)
    return layer.lora_A.weight.detach(), layer.lora_B.weight.detach()


def _facts(answer: Callable[..., Pair], in_features: int, out_features: int, r: int) -> dict[str, Any]:
    torch.manual_seed(0)
    a, b = answer(in_features, out_features, r)
    a = a.detach().float()
    bound = 1 / math.sqrt(in_features)
    return {"shape of A": list(a.shape), "shape of B": list(b.shape), "A is all zero": not a.any(),
            "B is all zero": not b.any(), "largest |A| is about 1/sqrt(in)": bool(0.9 * bound < a.abs().max() <= bound),
            "rank of A": int(torch.linalg.matrix_rank(a)), "A reaches as far below zero": bool(a.min() < -0.9 * bound),
            "spread of A is that of a uniform one": bool(abs(a.std() * math.sqrt(3) / bound - 1) < 0.2)}


def _gradients(x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, grad_y: Tensor) -> Pair:
    layer = _layer(torch.zeros(len(lora_b), x.shape[1]), lora_a, lora_b, scaling * len(lora_a))
    a, b = torch.autograd.grad(layer(x), (layer.lora_A.weight, layer.lora_B.weight), grad_y)
    return a, b


def _unscaled_gradients(x: Tensor, a: Tensor, b: Tensor, scaling: float, g: Tensor) -> Pair:
    return (g @ b).T @ x, g.T @ (x @ a.T)


def _swapped_gradients(x: Tensor, a: Tensor, b: Tensor, scaling: float, g: Tensor) -> Pair:
    return _gradients(x, a, b, scaling, g)[::-1]


def _mean_gradients(x: Tensor, a: Tensor, b: Tensor, scaling: float, g: Tensor) -> Pair:
    grad_a, grad_b = _gradients(x, a, b, scaling, g)
    return grad_a / len(x), grad_b / len(x)


def _only_b(x: Tensor, a: Tensor, b: Tensor, scaling: float, g: Tensor) -> Pair:
    return torch.zeros_like(a), _gradients(x, a, b, scaling, g)[1]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _draw_forward(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    r = int(torch.randint(2, 5, (), generator=generator))
    alpha = float(torch.randint(5, 9, (), generator=generator))
    return (_normal(generator, 4, 6), _normal(generator, 5, 6), _normal(generator, r, 6), _normal(generator, 5, r), alpha)


def _draw_gradients(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, float, Tensor]:
    return (_normal(generator, 4, 6), _normal(generator, 2, 6), _normal(generator, 5, 2), 3.0, _normal(generator, 4, 5))


FIXED = (torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.eye(2), 8.0)
TASKS = (
    Task("lora_forward", _forward, fixed=(FIXED,), random=_draw_forward, mistakes=(
        Mistake("you scaled the update by alpha: divide by r as well, or a larger r acts stronger",
                _scaled(lambda alpha, r: alpha)),
        Mistake("you scaled by r, not by alpha / r", _scaled(lambda alpha, r: r)),
        Mistake("you divided r by alpha: the factor is alpha / r", _scaled(lambda alpha, r: r / alpha)),
        Mistake("you divided by the square root of r: that is rsLoRA; LoRA's factor is alpha / r",
                _scaled(lambda alpha, r: alpha / math.sqrt(r))),
        Mistake("the update is not scaled: multiply it by alpha / r", _scaled(lambda alpha, r: 1.0)),
        Mistake("you scaled the base product as well: the factor belongs to the update alone",
                _scaled(lambda alpha, r: alpha / r, lambda alpha, r: alpha / r)),
        Mistake("the base product x W^T is missing: LoRA adds to it",
                _scaled(lambda alpha, r: alpha / r, lambda alpha, r: 0.0)))),
    Task("lora_start", _start, probe=_facts, fixed=((64, 32, 4), (100, 7, 16)), mistakes=(
        Mistake("A and B are both zero: then both gradients are zero as well, and nothing is ever learnt",
                lambda i, o, r: (torch.zeros(r, i), torch.zeros(o, r))),
        Mistake("A and B are both random: the model is disturbed before the first step; let B be zero",
                lambda i, o, r: ((torch.rand(r, i) * 2 - 1) / math.sqrt(i), torch.randn(o, r))),
        Mistake("you made A zero and B random: it would learn as well, but LoRA (and every adapter file) has it the other way",
                lambda i, o, r: (torch.zeros(r, i), torch.randn(o, r))),
        Mistake("A is too large: its entries should lie within 1/sqrt(in), or wide layers get huge updates",
                lambda i, o, r: (torch.randn(r, i), torch.zeros(o, r))),
        Mistake("A is normal, as in the paper: here it is uniform, and no entry lies beyond 1/sqrt(in)",
                lambda i, o, r: (torch.randn(r, i) / math.sqrt(3 * i), torch.zeros(o, r))),
        Mistake("no entry of A is negative: uniform within 1/sqrt(in) is from -1/sqrt(in) to 1/sqrt(in), and torch.rand goes "
                "from 0 to 1", lambda i, o, r: (torch.rand(r, i) / math.sqrt(i), torch.zeros(o, r))),
        Mistake("all rows of A are the same, so r of them are worth one: draw each entry by itself",
                lambda i, o, r: ((torch.rand(1, i) * 2 - 1).expand(r, i) / math.sqrt(i), torch.zeros(o, r))),
        Mistake("A has rank 1, r of its rows are worth one: draw each entry by itself, on both sides of zero",
                lambda i, o, r: (torch.full((r, i), 1 / math.sqrt(i)), torch.zeros(o, r))))),
    Task("lora_gradients", _gradients, fixed=(), random=_draw_gradients, mistakes=(
        Mistake("the scaling is missing: it is a factor of y, so it is one of both gradients", _unscaled_gradients),
        Mistake("you returned them in the other order: A's gradient comes first", _swapped_gradients),
        Mistake("you took the mean over the rows of x: gradients add up, the mean is the loss's business", _mean_gradients),
        Mistake("A's gradient is zero only while B is zero; in general it is scaling * (grad_y B)^T x", _only_b))),
)
