"""Starts of A and B that know the weight W they update.

    LoRA     A random, B = 0                                           over W, or over its 4-bit Q(W)
    PiSSA    scaling·BA = L, the best rank-r approximation of W        over Q(W − L): the strongest directions are trained, and
                                                                       the rest is smaller and loses less in 4 bits
    LoftQ    scaling·BA = Lₜ, the best rank-r approximation of W − Qₜ   over Qₜ = Q(W − Lₜ₋₁), L₀ = 0: the update first makes
                                                                       up for what quantization lost

The best rank-r approximation is the singular value decomposition U S Vᵀ cut after r (Eckart–Young), split evenly: B from
U √S, A from √S Vᵀ.  Both starts change what lies under the adapter, so the adapter alone no longer tells the model
(`minilora.own_base`).

Sources: PiSSA, arXiv 2404.02948, equations 2 to 4 and section 4; LoftQ, arXiv 2310.08659, algorithm 1.

Lessons 02 and 18 explain it.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.layers.lora import LoRALinear, dense_weight
from minilora.layers.nf4_linear import NF4Linear
from minilora.quant.nf4 import quantize_nf4

Start = Literal["pissa", "loftq"]
LOFTQ_ROUNDS = 5            # T of algorithm 1
EXACT_UP_TO = 1024          # smaller side of the largest matrix that is decomposed whole: beyond, that takes minutes
POWER_ITERATIONS = 16       # of the randomized decomposition (arXiv 0909.4061); PEFT's "pissa_niter_16"


def low_rank(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of a matrix as (U √S, √S Vᵀ): (out, r) and (r, in), float32.

    A matrix of more than 1,024 rows and columns is decomposed by random projection, out of torch's global generator.

    Raises: ConfigError: r exceeds the matrix.
    """
    if r > min(weight.shape):
        raise ConfigError(f"a start from the weights needs r of at most {min(weight.shape)}, the smaller side of a "
                          f"{tuple(weight.shape)} matrix, not {r}")
    if min(weight.shape) <= EXACT_UP_TO:
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight.float(), q=min(2 * r, *weight.shape), niter=POWER_ITERATIONS)
        vh = v.T
    root = s[:r].sqrt()
    return u[:, :r] * root, root[:, None] * vh[:r]


def pissa(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """PiSSA's start for W, (out, in) float32: (what the base is stored from, left factor, right factor of the update)."""
    left, right = low_rank(weight, r)
    return weight - left @ right, left, right


def loftq(weight: Tensor, r: int, quantize: Callable[[Tensor], Tensor], rounds: int = LOFTQ_ROUNDS
          ) -> tuple[Tensor, Tensor, Tensor]:
    """LoftQ's start, as `pissa`; `quantize` gives the float32 values that a stored matrix stands for."""
    rest = weight
    left, right = low_rank(weight - quantize(rest), r)
    for _ in range(rounds - 1):
        rest = weight - left @ right
        left, right = low_rank(weight - quantize(rest), r)
    return rest, left, right


@torch.no_grad()
def start_from_weight(layer: LoRALinear, weight: Tensor, start: Start) -> None:
    """Give a layer the first A and B of PiSSA or LoftQ, and the base that goes with them, stored as its base is now.

    Args:
        layer: over a 4-bit linear, or for PiSSA a dense one. weight: W, (out, in), as it was before quantization.

    Raises: ConfigError: LoftQ over a dense base, which lost nothing; or r exceeds the matrix.
    """
    base, weight = layer.base_layer, weight.float()
    new: nn.Module
    if isinstance(base, NF4Linear):
        blocksize, double_quant = base.blocksize, base.double_quant
        rest, left, right = pissa(weight, layer.r) if start == "pissa" else \
            loftq(weight, layer.r, lambda values: quantize_nf4(values, blocksize, double_quant).dequantize())
        new = NF4Linear(replace(quantize_nf4(rest, blocksize, double_quant), dtype=base.weight_dtype), base.bias)
    elif start == "loftq":
        raise ConfigError("loftq makes up for what quantization lost, and this base is not quantized: use pissa, or quantize")
    else:
        rest, left, right = pissa(weight, layer.r)
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(rest.to(dense_weight(base).dtype))
        dense.register_parameter("bias", getattr(base, "bias", None))
        new = dense
    layer.start_at(new, right / math.sqrt(layer.scaling), left / math.sqrt(layer.scaling))
