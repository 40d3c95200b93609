"""Exercise 18: the lines in which rsLoRA, DoRA, LoRA+ and PiSSA differ from LoRA."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.course.grading import Mistake, Task
from minilora.layers.lora import LoRAConfig, LoRALinear, dense_weight
from minilora.layers.starts import start_from_weight
from minilora.stepping import rate_groups

Start = tuple[Tensor, Tensor, Tensor]
NAMES = [f"layers.0.{linear}.{part}" for linear in ("q_proj", "down_proj")
         for part in ("lora_magnitude_vector", "lora_A.weight", "lora_B.weight")]


def _scaling(alpha: float, r: int) -> float:
    return LoRAConfig(r, alpha, use_rslora=True).scaling


def _over(weight: Tensor, r: int, scaling: float, use_dora: bool = False) -> LoRALinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone())
    return LoRALinear(linear, r=r, alpha=scaling * r, use_dora=use_dora)


def _dora(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    layer = _over(weight, len(lora_a), scaling, use_dora=True)
    layer.lora_A.weight, layer.lora_B.weight = nn.Parameter(lora_a), nn.Parameter(lora_b)
    layer.lora_magnitude_vector = nn.Parameter(magnitude)
    return layer.merged_weight().detach()


def _with_lengths(combine: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A DoRA weight out of W, s B A and m as a column, (out, in), (out, in) and (out, 1)."""
    def answer(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
        return combine(weight, scaling * lora_b @ lora_a, magnitude[:, None])
    return answer


def _rows(matrix: Tensor) -> Tensor:
    return matrix.norm(dim=1, keepdim=True)


def _draw_dora(generator: torch.Generator) -> tuple[Any, ...]:
    weight, a, b = (torch.randn(*shape, generator=generator) for shape in ((8, 8), (4, 8), (8, 4)))
    return weight, a, b, 0.5, weight.norm(dim=1) * (0.5 + torch.rand(8, generator=generator))


def _rates(names: list[str], lr: float, ratio: float) -> dict[str, float]:
    model = nn.Module()
    for name in names:
        module = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(torch.zeros(1)))
    of = {parameter: name for name, parameter in model.named_parameters()}
    return {of[parameter]: lr * relative for parameters, relative in rate_groups(model, ratio) for parameter in parameters}


def _chosen(fast: Callable[[str], bool]) -> Callable[[list[str], float, float], dict[str, float]]:
    return lambda names, lr, ratio: {name: lr * ratio if fast(name) else lr for name in names}


def _pissa(weight: Tensor, r: int, scaling: float) -> Start:
    layer = _over(weight, r, scaling)
    start_from_weight(layer, weight, "pissa")
    return dense_weight(layer.base_layer).detach(), layer.lora_A.weight.detach(), layer.lora_B.weight.detach()


def _what_counts(answer: Callable[..., Start], *inputs: Any) -> tuple[Tensor, ...]:
    """Of a start, without the signs, which a decomposition leaves open."""
    base, lora_a, lora_b = answer(*inputs)
    return base, lora_b @ lora_a, lora_a.norm(dim=1), lora_b.norm(dim=0)


def _started(in_a: float = 0.5, scaled_a: float = 0.5, scaled_b: float = 0.5, weakest: bool = False) -> Callable[..., Start]:
    """A start whose A has that power of S, and A and B those of 1 / s."""
    def answer(weight: Tensor, r: int, scaling: float) -> Start:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        kept = slice(-r, None) if weakest else slice(r)
        u, s, vh = u[:, kept], s[kept], vh[kept]
        lora_a, lora_b = s[:, None] ** in_a * vh / scaling ** scaled_a, u * s ** (1 - in_a) / scaling ** scaled_b
        return weight - (u * s) @ vh, lora_a, lora_b
    return answer


def _with_base(base: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Start]:
    """The right A and B, and a base out of W and B A."""
    def answer(weight: Tensor, r: int, scaling: float) -> Start:
        _, lora_a, lora_b = _pissa(weight, r, scaling)
        return base(weight, lora_b @ lora_a), lora_a, lora_b
    return answer


def _draw_pissa(generator: torch.Generator) -> tuple[Tensor, int, float]:
    return torch.randn(12, 10, generator=generator), 3, 4.0


TASKS = (
    Task("rslora_scaling", _scaling, fixed=((32.0, 16), (16.0, 4), (8.0, 64)), mistakes=(
        Mistake("that is LoRA's alpha / r", lambda alpha, r: alpha / r),
        Mistake("the root is of r alone: alpha / √r", lambda alpha, r: math.sqrt(alpha / r)),
        Mistake("divide by √r, do not multiply", lambda alpha, r: alpha * math.sqrt(r)),
        Mistake("you took the square of r: it is its root", lambda alpha, r: alpha / r ** 2))),
    Task("dora_weight", _dora, fixed=(), random=_draw_dora, mistakes=(
        Mistake("the rows are not brought to length 1 before m is multiplied: divide each by its length",
                _with_lengths(lambda weight, update, m: m * (weight + update))),
        Mistake("you divided by the lengths of W's rows: it is those of W + s B A, with the update in it",
                _with_lengths(lambda weight, update, m: m * (weight + update) / _rows(weight))),
        Mistake("those are the lengths of columns: m has one for each *output*, a row of W (the paper's columns: its W is "
                "(in, out))",
                _with_lengths(lambda weight, update, m: m * (weight + update) / (weight + update).norm(dim=0))),
        Mistake("you divided by the norm of the whole matrix: each row has its own",
                _with_lengths(lambda weight, update, m: m * (weight + update) / (weight + update).norm())),
        Mistake("m is the length of the whole row, W's part and the update's, not of the update alone",
                _with_lengths(lambda weight, update, m: weight + m * update / _rows(update))),
        Mistake("the update is not scaled: it is scaling * B A",
                lambda weight, a, b, scaling, m: m[:, None] * (weight + b @ a) / _rows(weight + b @ a)))),
    Task("loraplus_rates", _rates, fixed=((NAMES, 1e-3, 16.0), (NAMES[1:3], 2e-4, 4.0)), mistakes=(
        Mistake("you made A fast: it is B, which starts at zero", _chosen(lambda name: "lora_A" in name)),
        Mistake("everything but A is fast: DoRA's lengths keep the rate of A", _chosen(lambda name: "lora_A" not in name)),
        Mistake("the ratio is a factor on lr, not a rate of its own",
                lambda names, lr, ratio: {name: ratio if "lora_B" in name else lr for name in names}),
        Mistake("B is to be faster: multiply by the ratio, do not divide",
                lambda names, lr, ratio: {name: lr / ratio if "lora_B" in name else lr for name in names}),
        Mistake("all of them are fast, which is only a higher rate: A keeps its own", _chosen(lambda name: True)))),
    Task("pissa_start", _pissa, fixed=(), random=_draw_pissa, probe=_what_counts, tolerance=1e-4, mistakes=(
        Mistake("the layer multiplies B A by scaling once more: divide A and B by √scaling each",
                _started(scaled_a=0.0, scaled_b=0.0)),
        Mistake("base + scaling * B A is right, but A and B share the scaling evenly: √scaling each",
                _started(scaled_a=0.0, scaled_b=1.0)),
        Mistake("you put all of S into B: √S goes into each of the two", _started(in_a=0.0)),
        Mistake("you put all of S into A: √S goes into each of the two", _started(in_a=1.0)),
        Mistake("those are the weakest directions: singular values come sorted, the largest first", _started(weakest=True)),
        Mistake("the base still has what A and B hold: take scaling * B A out of it", _with_base(lambda weight, ba: weight)),
        Mistake("what the layer adds is scaling * B A: take that out of the base, not B A",
                _with_base(lambda weight, ba: weight - ba)))),
)
