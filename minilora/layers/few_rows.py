"""The product of a few rows and a dense weight: as long as the weight takes to be read.

Torch reads the weight of one row's product in bfloat16 at half the speed of memory; the vector code of `kernels.cpu` reads it
faster.  It serves the head in decoding (`llama.head`) and the two narrow products of a low-rank update (`layers.low_rank`).
"""
from __future__ import annotations

import torch
from torch import Tensor

from minilora.kernels import cpu


def takes_few_rows(x: Tensor) -> bool:
    """Whether there is vector code for such rows: few of them, in bfloat16 on a CPU."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not x.numel() or torch.is_autocast_enabled("cpu"):
        return False
    kernel = cpu.kernel()
    return kernel is not None and x.numel() <= kernel.dense_rows * x.shape[-1]


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor | None:
    """``x Wᵀ`` without a gradient, or None where there is no vector code for it: then it is torch's to make.

    Args: x: (..., in), weight: (out, in).
    Returns: (..., out).
    Guarantee: sums in float32 of the products in bfloat16, rounded once (tests/kernels/test_product.py).
    """
    kernel = cpu.kernel() if takes_few_rows(x) else None
    if kernel is None or weight.dtype != x.dtype or weight.device != x.device or not weight.is_contiguous() \
            or weight.shape[1] != x.shape[-1]:
        return None
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    return kernel.dense_product(rows, weight.detach()).view(*x.shape[:-1], -1)
