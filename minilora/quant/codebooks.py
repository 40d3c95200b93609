"""The two tables of QLoRA, and where their numbers come from.

**NF4** (4-bit NormalFloat; QLoRA section 3 and appendix E).  Weights of a trained network look normal, so the sixteen
levels are normal quantiles: equally many weights should use each.  A symmetric table of sixteen would have no zero, yet
zero must be exact (padding, pruned weights).  So the table is made of two halves that share it: 8 quantiles above,
7 below, and 0.  Quantiles of exactly 0 and 1 are infinite; the outermost probability is therefore

    offset = 1 - (1/30 + 1/32) / 2 = 0.9677083…

the mean of the half-bucket margins of a 15- and a 16-level table.  Divided by the largest, the levels end at -1 and 1.
The stored values are the float32 ones that bitsandbytes ships; `derive_nf4` re-derives them to 1.2e-7.

**8-bit dynamic map** (8-bit optimizers, arXiv 2110.02861, section 1.3): a sign, then a unary exponent of base ten, and
what bits remain are a linear fraction: many levels near ±1, ever coarser decades towards zero.  Without a sign its bit
goes to the fraction (section 2.2).  QLoRA's double quantization uses the map for the block constants; the 8-bit optimizer
state uses both forms for its moments.

Lesson 05 explains it.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NF4_OFFSET = 0.9677083      # the paper's printed digits of 1 - (1/30 + 1/32) / 2

NF4_CODE: Tensor = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=torch.float32, device="cpu")
NF4_ZERO = 7                # the index of the exact zero


def derive_nf4(offset: float = NF4_OFFSET) -> np.ndarray:
    """The sixteen levels from the quantiles of the standard normal.

    Args:
        offset: the largest probability used (see the module docstring).

    Returns: (16,) float64, sorted, from -1 to 1, with an exact 0 at index 7.
    Guarantee: within 1.2e-7 of `NF4_CODE` (tests/quant/test_codebooks.py).
    Source: QLoRA appendix E; `create_normal_map` in bitsandbytes.
    """
    from scipy.stats import norm  # here, since it takes half a second and 75 MB, and only a proof asks for it

    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])       # 8 levels, the largest first
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])      # 7 levels
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    return levels / levels.max()


def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 levels of the 8-bit dynamic map.

    For the exponent e = -6 … 0 the interval [0.1, 1] · 10^e is cut into 2^(e+6) equal parts (twice as many when there is
    no sign bit to pay for) and each part is represented by its middle.  A zero and a one complete the table.

    Args:
        signed: mirror the levels (first moments, double quantization) or not (second moments).

    Returns: (256,) float32, sorted. Signed: -0.99297 … 1.0 with 0 at index 127; unsigned: 0 … 1.0.
    Source: arXiv 2110.02861, sections 1.3 (signed) and 2.2 (unsigned); equal to the bit to bitsandbytes'
        `create_dynamic_map` (tests/peers).
    """
    levels = [0.0, 1.0]
    for exponent in range(-6, 1):
        parts = 2 ** (exponent + 6) * (1 if signed else 2)
        # What torch.linspace gives where the processor fuses a + b * c, which not every one does: counted from the nearer end.
        end = torch.arange(parts + 1, dtype=torch.float64, device="cpu")
        low, step = float(np.float32(0.1)), float((np.float32(1) - np.float32(0.1)) / np.float32(parts))
        edges = torch.where(2 * end < parts, low + step * end, 1 - step * (parts - end)).float()
        middles = 10.0 ** exponent * ((edges[:-1] + edges[1:]) / 2)
        levels += middles.tolist()
        if signed:
            levels += (-middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu")


DYNAMIC_8BIT: Tensor = dynamic_map(signed=True)
DYNAMIC_8BIT_UNSIGNED: Tensor = dynamic_map(signed=False)
