"""The product of a few rows and a dense weight: as long as the weight takes to be read.

Torch reads the weight of one row's product in bfloat16 at half the speed of memory; the vector code of `kernels.cpu` reads it
faster.  It serves the head in decoding (`llama.head`) and the two narrow products of a low-rank update (`layers.low_rank`).
"""
from __future__ import annotations

import torch
from torch import Tensor

from minilora.kernels import cpu


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor | None:
    """``x Wᵀ`` where no gradient is wanted, or None where there is no vector code for it: then it is torch's to make.

    Args: x: (..., in), weight: (out, in).
    Returns: (..., out), for a few rows in bfloat16 on a CPU.
    Guarantee: sums in float32 of the products in bfloat16, rounded once (tests/kernels/test_product.py).
    """
    if not (x.dtype == weight.dtype == torch.bfloat16 and x.device.type == weight.device.type == "cpu" and x.numel() > 0
            and x.shape[-1] == weight.shape[1] and weight.is_contiguous() and not torch.is_autocast_enabled("cpu")):
        return None
    rows, kernel = x.detach().reshape(-1, x.shape[-1]), cpu.kernel()
    if kernel is None or len(rows) > kernel.dense_rows:
        return None
    return kernel.dense_product(rows.contiguous(), weight.detach()).view(*x.shape[:-1], -1)
