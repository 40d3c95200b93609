"""The two tables: where their numbers come from, and what shape they have."""
from __future__ import annotations

import numpy as np
import torch
from scipy.stats import norm

from minilora.quant.codebooks import DYNAMIC_8BIT, NF4_CODE, NF4_OFFSET, derive_nf4, dynamic_map


def test_nf4_table_follows_from_normal_quantiles() -> None:
    assert np.abs(derive_nf4() - NF4_CODE.double().numpy()).max() <= 1.2e-7


def test_the_offset_is_the_mean_margin_of_15_and_16_levels() -> None:
    exact = 1 - (1 / 30 + 1 / 32) / 2
    assert round(exact, 7) == NF4_OFFSET
    # The unrounded offset moves no level by more than 2e-7, so the printed digits are enough.
    assert np.abs(derive_nf4(exact) - NF4_CODE.double().numpy()).max() < 2e-7


def test_nf4_by_hand() -> None:
    # The level next to the largest positive one: the quantile one eighth of the way from the offset to the median.
    probability = NF4_OFFSET - (NF4_OFFSET - 0.5) / 8
    assert abs(norm.ppf(probability) / norm.ppf(NF4_OFFSET) - float(NF4_CODE[14])) < 1.2e-7


def test_nf4_is_lopsided_around_an_exact_zero() -> None:
    assert NF4_CODE.dtype == torch.float32 and NF4_CODE.shape == (16,)
    assert (NF4_CODE < 0).sum() == 7 and NF4_CODE[7] == 0 and (NF4_CODE > 0).sum() == 8
    assert NF4_CODE[0] == -1 and NF4_CODE[15] == 1
    assert torch.equal(NF4_CODE, NF4_CODE.sort().values)


def test_dynamic_map_has_the_documented_shape() -> None:
    assert DYNAMIC_8BIT.shape == (256,) and DYNAMIC_8BIT[127] == 0 and DYNAMIC_8BIT[255] == 1
    assert abs(float(DYNAMIC_8BIT[0]) + 0.99297) < 1e-5
    assert torch.equal(DYNAMIC_8BIT, DYNAMIC_8BIT.sort().values) and DYNAMIC_8BIT.unique().numel() == 256
    unsigned = dynamic_map(signed=False)
    assert unsigned.shape == (256,) and unsigned[0] == 0 and unsigned[255] == 1 and unsigned.unique().numel() == 256


def test_dynamic_map_by_hand() -> None:
    # The largest decade has 64 parts of [0.1, 1]; the middle of the last is 1 - 0.9 / 128.
    assert abs(float(DYNAMIC_8BIT[254]) - (1 - 0.9 / 128)) < 1e-7
    # The smallest has one part, of [1e-7, 1e-6]; its middle is 5.5e-7.
    assert abs(float(DYNAMIC_8BIT[128]) - 5.5e-7) < 1e-12
