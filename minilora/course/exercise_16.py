"""Exercise 16: merging an adapter into the weights that training saw, and measuring what a merge loses."""
from __future__ import annotations

import torch
from torch import Tensor

from minilora.course.grading import Mistake, Task
from minilora.layers.lora import LoRALinear
from minilora.layers.merge import MergeError
from minilora.layers.nf4_linear import NF4Linear
from minilora.quant.nf4 import NF4Tensor, quantize_nf4


def _merge(original: Tensor, base: NF4Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    layer = LoRALinear(NF4Linear(base), r=len(lora_a), alpha=scaling * len(lora_a))
    with torch.no_grad():
        layer.lora_A.weight.copy_(lora_a)
        layer.lora_B.weight.copy_(lora_b)
        return layer.merged_weight()


def _draw(generator: torch.Generator) -> tuple[Tensor, NF4Tensor, Tensor, Tensor, float]:
    original = torch.randn(16, 16, generator=generator)
    a, b = torch.randn(16, 16, generator=generator), torch.randn(16, 16, generator=generator) * 0.02
    return original, quantize_nf4(original), a, b, 2.0


def _kept(merged: Tensor, trained: Tensor, base: Tensor) -> float:
    return MergeError.measure(merged, trained, base).update_cosine


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def _draw_three(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    base = torch.randn(8, 8, generator=generator)
    update = torch.randn(8, 8, generator=generator) * 0.1
    return base + update + 0.1 * torch.randn(8, 8, generator=generator), base + update, base


TASKS = (
    Task("merge_16bit", _merge, fixed=(), random=_draw, tolerance=1e-4, mistakes=(
        Mistake("you merged into the original weights: training never saw those. Dequantize the 4-bit base, and add to that",
                lambda original, base, a, b, scaling: original + scaling * b @ a),
        Mistake("the update is not scaled: what was trained is scaling * B A",
                lambda original, base, a, b, scaling: base.dequantize(torch.float32) + b @ a),
        Mistake("you multiplied A by B: the update is B A, (out, r) times (r, in)",
                lambda original, base, a, b, scaling: base.dequantize(torch.float32) + scaling * a @ b),
        Mistake("you quantized the sum again: that is the 4-bit merge, which rounds small updates away",
                lambda original, base, a, b, scaling: quantize_nf4(_merge(original, base, a, b, scaling)).dequantize()),
        Mistake("that is the update alone: add it to the dequantized base",
                lambda original, base, a, b, scaling: scaling * b @ a))),
    Task("update_cosine", _kept, fixed=(), random=_draw_three, mistakes=(
        Mistake("you compared whole weights: the base is in both and hides everything. Subtract it first",
                lambda merged, trained, base: _cosine(merged, trained)),
        Mistake("you compared the *error* with the update: it is what merging added to the base",
                lambda merged, trained, base: _cosine(merged - trained, trained - base)),
        Mistake("subtract the base from both", lambda merged, trained, base: _cosine(merged - base, trained)),
        Mistake("divide by both lengths: a cosine lies between -1 and 1",
                lambda merged, trained, base: float(((merged - base) * (trained - base)).sum())))),
)
