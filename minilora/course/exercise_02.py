"""Exercise 02: how many numbers a low-rank update trains, and the best one there is."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.course.grading import Mistake, Task
from minilora.layers.lora import LoRALinear
from minilora.layers.starts import low_rank


def _trained_numbers(in_features: int, out_features: int, r: int) -> int:
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(in_features, out_features), r=r)
    return layer.lora_A.weight.numel() + layer.lora_B.weight.numel()


def _factors(answer: Callable[..., Any], weight: Tensor, r: int) -> dict[str, Any]:
    left, right = answer(weight, r)
    return {"shape of left": list(left.shape), "shape of right": list(right.shape), "left @ right": left @ right}


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(weight, full_matrices=False)


def _smallest(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    u, s, vh = _svd(weight)
    return u[:, -r:] * s[-r:], vh[-r:]


def _unscaled(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    u, _, vh = _svd(weight)
    return u[:, :r], vh[:r]


def _scaled_twice(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    u, s, vh = _svd(weight)
    return u[:, :r] * s[:r], s[:r, None] * vh[:r]


def _cut_out(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    return weight[:, :r], torch.eye(r, weight.shape[1])


def _draw(generator: torch.Generator) -> tuple[Tensor, int]:
    return torch.randn(7, 5, generator=generator), int(torch.randint(1, 4, (), generator=generator))


TASKS = (
    Task("trained_numbers", _trained_numbers, fixed=((20_000, 10_000, 8), (4096, 4096, 16), (3, 5, 1)), mistakes=(
        Mistake("that is the whole matrix: LoRA freezes it, and trains A (r, in) and B (out, r)", lambda i, o, r: i * o),
        Mistake("you multiplied in by out: A and B are two matrices side by side, so their sizes are added",
                lambda i, o, r: r * i * o),
        Mistake("that is one of the two matrices: A has r * in numbers, and B another r * out", lambda i, o, r: r * i),
        Mistake("that is B alone: A has another r * in", lambda i, o, r: r * o),
        Mistake("there is no r x r matrix between A and B", lambda i, o, r: r * (i + o) + r * r))),
    Task("low_rank", low_rank, probe=_factors, tolerance=1e-4, random=_draw,
         fixed=((torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1),), mistakes=(
        Mistake("you kept the smallest singular values: torch.linalg.svd sorts them falling, the strongest are the first r",
                _smallest),
        Mistake("the singular values are missing: U and V only have directions, S says how strong they are", _unscaled),
        Mistake("the singular values are in there twice: give them to one side, or their square roots to both", _scaled_twice),
        Mistake("those are the first r columns of the matrix, which know nothing of the others: decompose it "
                "(torch.linalg.svd)", _cut_out))),
)
