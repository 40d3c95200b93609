"""The three merges, and what each costs."""
from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from minilora import ConfigError, LoRALinear, NF4Linear, merge_lora
from minilora.layers.merge import MergeError
from minilora.layers.qlora import Quantization
from minilora.quant.nf4 import quantize_nf4


def adapted(quantized: bool, strength: float = 0.1) -> tuple[nn.Sequential, nn.Linear]:
    """One 256 x 128 layer with an update of `strength` times the weights' spread; and the original layer."""
    torch.manual_seed(0)
    original = nn.Linear(128, 256)
    nn.init.normal_(original.weight, std=0.02)
    layer = LoRALinear(NF4Linear.from_linear(original) if quantized else original, r=8)
    nn.init.normal_(layer.lora_B.weight)
    with torch.no_grad():
        layer.lora_B.weight.mul_(strength * 0.02 / layer.update().std())
    model = nn.Sequential()
    model.q_proj = layer
    return model, original


def merged_error(model: nn.Module, **options: object) -> MergeError:
    errors: list[MergeError] = []
    merge_lora(model, on_layer=lambda _, error: errors.append(error), **options)
    error, = errors
    return error


def test_into_the_dequantized_base_is_the_trained_model_up_to_16_bit_rounding() -> None:
    model, _ = adapted(True)
    x = torch.randn(5, 128)
    expected = model.q_proj(x)
    error = merged_error(model, dtype=torch.bfloat16)
    assert type(model.q_proj) is nn.Linear and model.q_proj.weight.dtype == torch.bfloat16
    assert error.relative_error < 2 ** -8 and error.update_cosine > 0.99
    torch.testing.assert_close(model.q_proj.float()(x), expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))


def test_into_float32_is_exact_to_rounding() -> None:
    model, _ = adapted(True)
    x = torch.randn(5, 128)
    expected = model.q_proj(x)
    assert merged_error(model).relative_error < 1e-6
    torch.testing.assert_close(model.q_proj(x), expected, rtol=1e-5, atol=1e-6)


def test_into_the_original_base_is_off_by_about_the_update() -> None:
    model, original = adapted(True)
    update = model.q_proj.update().detach()
    other = nn.Sequential()
    other.q_proj = LoRALinear(original, r=8)
    other.q_proj.load_state_dict({k: v for k, v in model.q_proj.state_dict().items() if "lora" in k}, strict=False)
    error = merged_error(other, trained_on=Quantization())
    torch.testing.assert_close(other.q_proj.weight, original.weight + update)
    assert 0.7 < error.error_to_update < 1.2, error       # MYTHS 24: 0.92 at a tenth of the weights' spread


def test_into_4_bits_eats_small_updates() -> None:
    cosines = {strength: merged_error(adapted(True, strength)[0], into="4bit").update_cosine for strength in (0.01, 0.1, 1.0)}
    assert cosines[0.01] < 0.2 < 0.5 < cosines[0.1] < 0.9 < 0.97 < cosines[1.0], cosines     # MYTHS 23: 0.04, 0.74, 0.99


def test_into_4_bits_gives_a_4_bit_layer_with_the_bases_blocks() -> None:
    model, original = adapted(True)
    model.q_proj.base_layer = NF4Linear.from_linear(original, blocksize=128, double_quant=False)
    merge_lora(model, into="4bit")
    assert isinstance(model.q_proj, NF4Linear) and model.q_proj.blocksize == 128 and not model.q_proj.double_quant


def test_dense_lora_merges_and_keeps_the_bias() -> None:
    model, original = adapted(False)
    x = torch.randn(5, 128)
    expected = model.q_proj(x)
    merge_lora(model)
    torch.testing.assert_close(model.q_proj(x), expected)
    assert torch.equal(model.q_proj.bias, original.bias)


def test_merging_nothing_or_a_dense_base_into_4_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="no LoRA"):
        merge_lora(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="4-bit base"):
        merge_lora(adapted(False)[0], into="4bit")
    for wrong in ("8bit", "16", None):
        with pytest.raises(ConfigError, match="'16bit' or '4bit'"):
            merge_lora(adapted(True)[0], into=wrong)


def test_a_refused_merge_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential()
    model.first, model.second = adapted(True)[0].q_proj, adapted(True)[0].q_proj
    with torch.no_grad():
        model.second.lora_B.weight[3, 1] = torch.nan
    for into in ("16bit", "4bit"):
        with pytest.raises(ConfigError, match="second: the adapter holds a NaN or an infinity"):
            merge_lora(model, into=into)
        assert isinstance(model.first, LoRALinear) and isinstance(model.second, LoRALinear)


def test_into_4_bits_a_layer_that_was_dense_stays_dense() -> None:
    """As the head, or what a checkpoint left out of its quantization."""
    model = nn.Sequential()
    model.first, model.head = adapted(True)[0].q_proj, adapted(False)[0].q_proj
    expected = model.head.merged_weight()
    merge_lora(model, into="4bit")
    assert isinstance(model.first, NF4Linear) and type(model.head) is nn.Linear
    assert torch.equal(model.head.weight, expected)


@pytest.mark.parametrize("into", ["16bit", "4bit"])
def test_a_sum_that_its_type_cannot_hold_is_refused_by_name(into: Literal["16bit", "4bit"]) -> None:
    model = nn.Sequential()
    model.first = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 64).half()), r=4)
    with torch.no_grad():
        model.first.lora_A.weight.fill_(60.0)
        model.first.lora_B.weight.fill_(60.0)
    with pytest.raises(ConfigError, match=r"first: base and adapter add up to numbers that torch\.float16 cannot hold"):
        merge_lora(model, into=into)


def test_into_float32_the_base_is_not_rounded_first() -> None:
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 48, bias=False).bfloat16()), r=4)
    with torch.no_grad():
        layer.lora_B.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    expected, model = layer(x), nn.Sequential()
    model.layer = layer
    errors: list[MergeError] = []
    merge_lora(model, dtype=torch.float32, on_layer=lambda name, error: errors.append(error))
    assert (model.layer(x) - expected).norm() < 1e-6 * expected.norm() and errors[0].relative_error == 0


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("policy", ["dequantized", "original", "4bit"])
def test_each_policys_measured_error_is_the_one_worked_out_here(policy: str, use_dora: bool) -> None:
    """The three policies with their formulas in float64, beside what `merge_lora` did and what it said about it."""
    torch.manual_seed(0)
    original = nn.Linear(128, 64, bias=False).bfloat16()
    quantized = NF4Linear.from_linear(original)
    layer = LoRALinear(quantized, r=4, alpha=6, use_dora=use_dora)
    nn.init.normal_(layer.lora_B.weight, std=0.01)
    if use_dora:
        layer.lora_magnitude_vector.data.mul_(1.1)

    def with_update(base: torch.Tensor) -> torch.Tensor:
        weight = base.double() + 6 / 4 * layer.lora_B.weight.detach().double() @ layer.lora_A.weight.detach().double()
        return weight * (layer.lora_magnitude_vector.detach() / weight.norm(dim=1))[:, None] if use_dora else weight

    rebuilt = quantized.dense_weight()
    trained = with_update(rebuilt)
    expected = {"dequantized": with_update(rebuilt), "original": with_update(original.weight.detach()),
                "4bit": quantize_nf4(with_update(rebuilt).bfloat16()).dequantize(torch.float32)}[policy]
    model = nn.Sequential()
    model.q_proj = layer
    options: dict[str, object] = {"into": "4bit"} if policy == "4bit" else {}
    if policy == "original":
        layer.base_layer = original
        options["trained_on"] = Quantization()
    error = merged_error(model, **options)
    merged = model.q_proj.dense_weight(torch.float32) if policy == "4bit" else model.q_proj.weight
    assert (merged.double() - expected).abs().max() <= 2 ** -8 * expected.abs().max()       # saved in bfloat16, or 4 bits of it
    if policy != "4bit":
        assert merged.dtype == torch.bfloat16
    stored = (model.q_proj.dense_weight() if policy == "4bit" else merged).double()
    distance, update = (stored - trained).norm(), trained - rebuilt.double()
    assert error.relative_error == pytest.approx(float(distance / trained.norm()), rel=1e-3)
    assert error.error_to_update == pytest.approx(float(distance / update.norm()), rel=1e-3)
    kept = stored - rebuilt.double()
    assert error.update_cosine == pytest.approx(float((kept * update).sum() / kept.norm() / update.norm()), rel=1e-3)


def test_a_model_cast_to_float32_merges_what_it_computes() -> None:
    model, _ = adapted(True)
    model.q_proj.base_layer = NF4Linear.from_linear(nn.Linear(128, 256).bfloat16())
    model.float()
    x = torch.randn(5, 128)
    expected = model.q_proj(x)
    assert merged_error(model).relative_error < 1e-6
    torch.testing.assert_close(model.q_proj(x), expected, rtol=1e-5, atol=1e-5)
