"""PiSSA and LoftQ against their papers' definitions, written out in NumPy's float64."""
from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minilora import ConfigError, LoRALinear
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.starts import LOFTQ_ROUNDS, low_rank, start_from_weight
from minilora.quant.nf4 import quantize_nf4

R = 6


def decaying(rows: int = 48, columns: int = 80, seed: int = 0) -> Tensor:
    """A matrix with a few strong directions, as trained weights have: singular values fall as 1/(i + 1)."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return (u * (1 / torch.arange(1, len(u) + 1))) @ vh


def cut(matrix: np.ndarray, r: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vh[:r]


def adapted(weight: Tensor, four_bit: bool, bias: bool = False, **options: object) -> LoRALinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return LoRALinear(NF4Linear.from_linear(linear) if four_bit else linear, r=R, **options)      # type: ignore[arg-type]


def error(layer: LoRALinear, weight: Tensor, order: Literal["fro", "nuc"]) -> float:
    return float(torch.linalg.matrix_norm(layer.merged_weight().detach() - weight, ord=order))


def test_low_rank_is_the_cut_decomposition_split_evenly() -> None:
    weight = decaying()
    left, right = low_rank(weight, R)
    np.testing.assert_allclose((left @ right).numpy(), cut(weight.double().numpy(), R), atol=1e-6)
    # Both halves carry the root of each singular value.
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
    torch.testing.assert_close(left.norm(dim=0) ** 2, 1 / torch.arange(1.0, R + 1))


def test_a_large_matrix_is_decomposed_nearly_as_well_by_projection() -> None:
    weight = decaying(1030, 1040)
    left, right = low_rank(weight, R)
    optimum = float(torch.linalg.matrix_norm(1 / torch.arange(R + 1.0, 1031)[None]))       # the tail's singular values
    assert float((weight - left @ right).norm()) <= 1.001 * optimum


@pytest.mark.parametrize("options", [{}, {"alpha": 3}, {"use_rslora": True}, {"use_dora": True}])
def test_pissa_over_a_dense_weight_computes_the_same_layer(options: dict[str, object]) -> None:
    weight = decaying()
    layer = adapted(weight, four_bit=False, bias=True, **options)
    bias, x = layer.base_layer.bias, torch.randn(5, 80, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.linear(x, weight, bias)
    start_from_weight(layer, weight, "pissa")
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert layer.base_layer.bias is bias and not any(p.requires_grad for p in layer.base_layer.parameters())
    # The update is the strongest directions, the base the rest.
    torch.testing.assert_close(torch.linalg.svdvals(layer.update())[:R], 1 / torch.arange(1.0, R + 1), atol=1e-5, rtol=0)
    assert isinstance(layer.base_layer.weight, Tensor)
    torch.testing.assert_close(torch.linalg.svdvals(layer.base_layer.weight)[:-R], 1 / torch.arange(R + 1.0, 49), atol=1e-5,
                               rtol=0)


def test_pissa_in_4_bits_stores_what_the_update_leaves() -> None:
    weight = decaying()
    layer = adapted(weight, four_bit=True)
    plain = error(layer, weight, "nuc")
    start_from_weight(layer, weight, "pissa")
    assert isinstance(layer.base_layer, NF4Linear)
    left, right = low_rank(weight, R)
    assert torch.equal(layer.base_layer.packed, quantize_nf4(weight - left @ right).packed)
    # Section 4: the nuclear norm of what is lost is smaller than QLoRA's.
    assert error(layer, weight, "nuc") < 0.8 * plain


def test_loftq_is_the_papers_alternation() -> None:
    weight = decaying()
    layer = adapted(weight, four_bit=True, alpha=9)
    plain = error(layer, weight, "fro")
    start_from_weight(layer, weight, "loftq")

    exact, update = weight.double().numpy(), np.zeros(weight.shape)
    for _ in range(LOFTQ_ROUNDS):       # algorithm 1: quantize what the update leaves, then fit what quantization left
        stored = quantize_nf4(torch.from_numpy(exact - update).float()).dequantize().double().numpy()
        update = cut(exact - stored, R)
    # A value near the middle between two codes may fall to either side in float32: few do.
    found = layer.merged_weight().detach().double().numpy()
    assert np.linalg.norm(found - (stored + update)) < 0.02 * np.linalg.norm(exact - stored - update)
    assert error(layer, weight, "fro") < 0.85 * plain


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_doras_lengths_are_those_of_the_sum(start: Literal["pissa", "loftq"]) -> None:
    weight = decaying()
    layer = adapted(weight, four_bit=True, use_dora=True)
    start_from_weight(layer, weight, start)
    assert layer.lora_magnitude_vector is not None
    torch.testing.assert_close(layer.lora_magnitude_vector.data, (layer.base_layer.dense_weight() + layer.update()).norm(dim=1))


def test_a_base_keeps_its_form() -> None:
    weight = decaying()
    linear = nn.Linear(80, 48, bias=True)
    layer = LoRALinear(NF4Linear.from_linear(linear, blocksize=32, double_quant=False), r=R)
    start_from_weight(layer, weight.bfloat16(), "pissa")
    base = layer.base_layer
    assert isinstance(base, NF4Linear) and base.blocksize == 32 and not base.double_quant
    assert base.weight_dtype == torch.float32 and base.bias is not None and torch.equal(base.bias, linear.bias)


def test_what_cannot_be_started_is_refused() -> None:
    weight = decaying()
    with pytest.raises(ConfigError, match="not quantized"):
        start_from_weight(adapted(weight, four_bit=False), weight, "loftq")
    with pytest.raises(ConfigError, match="at most 4"):
        low_rank(weight[:4], R)
