"""LoRA's algebra, its start, its gradients and its variants."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minilora import ConfigError, LoRAConfig, LoRALinear, NF4Linear, add_lora, load_model
from minilora.layers.qlora import base_only, lora_layers, trainable_parameters
from tests.models import write_model


def layer_with_update(**options: object) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(24, 10), **options)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def test_ten_thousand_by_twenty_thousand_trains_240000_numbers() -> None:
    layer = LoRALinear(_Shape(10_000, 20_000), r=8)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 240_000
    assert layer.in_features * layer.out_features == 200_000_000


class _Shape(nn.Module):
    """A base layer that is only its shape."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features


def test_the_equation_by_hand() -> None:
    base = nn.Linear(2, 1, bias=True)
    base.weight.data, base.bias.data = torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])
    layer = LoRALinear(base, r=1, alpha=3)
    layer.lora_A.weight.data, layer.lora_B.weight.data = torch.tensor([[4.0, -1.0]]), torch.tensor([[2.0]])
    # 1·1 + 2·1 + 0.5 = 3.5; A x = 3, B A x = 6, times alpha / r = 3: 18.
    assert layer(torch.ones(1, 2)).item() == pytest.approx(21.5)


def test_at_the_start_it_is_the_base_exactly() -> None:
    base = nn.Linear(24, 10)
    x = torch.randn(5, 24)
    before = base(x)
    for dora in (False, True):
        layer = LoRALinear(base, use_dora=dora)
        assert (layer.lora_B.weight == 0).all() and layer.lora_A.weight.std() > 0
        torch.testing.assert_close(layer(x), before, rtol=0, atol=0 if not dora else 1e-6)


def test_a_starts_uniform_within_one_over_root_in() -> None:
    layer = LoRALinear(nn.Linear(400, 10), r=64)
    bound = 1 / math.sqrt(400)      # Kaiming with a = √5: √(6 / ((1 + 5) · in))
    assert layer.lora_A.weight.abs().max() <= bound and layer.lora_A.weight.abs().max() > 0.98 * bound


def test_first_gradient_is_in_b_alone() -> None:
    layer = LoRALinear(nn.Linear(24, 10))
    layer(torch.randn(5, 24)).square().sum().backward()
    assert layer.lora_B.weight.grad.abs().max() > 0 and (layer.lora_A.weight.grad == 0).all()
    assert layer.base_layer.weight.grad is None


def test_with_both_at_zero_nothing_ever_moves() -> None:
    layer = LoRALinear(nn.Linear(24, 10))
    nn.init.zeros_(layer.lora_A.weight)
    layer(torch.randn(5, 24)).square().sum().backward()
    assert (layer.lora_B.weight.grad == 0).all() and (layer.lora_A.weight.grad == 0).all()


@settings(max_examples=30, deadline=None)
@given(r=st.integers(1, 9), alpha=st.floats(0.1, 64), rs=st.booleans(), dora=st.booleans(), quantized=st.booleans())
def test_merged_weight_computes_the_same(r: int, alpha: float, rs: bool, dora: bool, quantized: bool) -> None:
    torch.manual_seed(r)
    base = nn.Linear(24, 10)
    layer = LoRALinear(NF4Linear.from_linear(base) if quantized else base, r=r, alpha=alpha, use_rslora=rs, use_dora=dora)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 24)
    expected = layer(x)
    # float32: two products of 24 and r terms against one; errors grow with the size of the result.
    atol = 1e-5 * float(expected.detach().abs().max() + 1)
    torch.testing.assert_close(x @ layer.merged_weight().T + base.bias, expected, rtol=1e-4, atol=atol)


def test_gradients_equal_those_of_the_dense_product() -> None:
    layer = layer_with_update(r=3, alpha=5).double()
    x = torch.randn(4, 24, dtype=torch.float64)
    layer(x).square().sum().backward()
    a, b = (m.weight.detach().clone().requires_grad_() for m in (layer.lora_A, layer.lora_B))
    weight = layer.base_layer.weight.detach() + layer.scaling * b @ a
    (x @ weight.T + layer.base_layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.weight.grad, a.grad)
    torch.testing.assert_close(layer.lora_B.weight.grad, b.grad)


def test_the_update_is_linear_in_alpha_and_rslora_changes_the_root() -> None:
    one, two = layer_with_update(r=4, alpha=1).update(), layer_with_update(r=4, alpha=2).update()
    torch.testing.assert_close(2 * one, two)
    assert LoRAConfig(r=16, alpha=32).scaling == 2 and LoRAConfig(r=16, alpha=32, use_rslora=True).scaling == 8


def test_dora_keeps_the_trained_length_of_each_row() -> None:
    layer = layer_with_update(use_dora=True)
    layer.lora_magnitude_vector.data.mul_(3)
    torch.testing.assert_close(layer.merged_weight().norm(dim=1), layer.lora_magnitude_vector.detach())


def test_dropout_acts_in_training_only() -> None:
    for dora in (False, True):
        layer = layer_with_update(dropout=0.5, use_dora=dora)
        x = torch.randn(50, 24)
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_dropout_thins_what_goes_into_a_and_nothing_else() -> None:
    layer = layer_with_update(r=3, alpha=5, dropout=0.4)
    x = torch.randn(7, 24)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    kept = nn.functional.dropout(x, 0.4)
    assert 0 < int((kept == 0).sum()) < kept.numel()
    torch.testing.assert_close(found, layer.base_layer(x) + 5 / 3 * kept @ layer.lora_A.weight.T @ layer.lora_B.weight.T)


@pytest.mark.parametrize("quantized", [False, True])
def test_dora_over_a_row_of_zeros_is_finite_and_leaves_the_row_alone(quantized: bool) -> None:
    """PEFT divides 0 by 0 here, and every logit behind it is NaN."""
    base = nn.Linear(64, 4)
    nn.init.zeros_(base.weight[1].data)
    layer = LoRALinear(NF4Linear.from_linear(base, double_quant=False) if quantized else base, use_dora=True)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y[:, 1], base.bias[1].expand(3)) and torch.isfinite(layer.merged_weight()).all()
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad) and torch.isfinite(x.grad).all()


def test_sixteen_bit_input_keeps_its_type_and_the_adapters_stay_float32() -> None:
    layer = LoRALinear(nn.Linear(24, 10).bfloat16())
    assert layer(torch.randn(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32


class Block(nn.Module):
    """Two targeted linears and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.o_proj(self.q_proj(x)))


def test_add_lora_trains_the_adapters_and_nothing_else() -> None:
    model = add_lora(Block(), LoRAConfig(r=2, target_modules=("q_proj", "o_proj")))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == ["q_proj.lora_A.weight", "q_proj.lora_B.weight", "o_proj.lora_A.weight", "o_proj.lora_B.weight"]
    assert trainable_parameters(model) == (64, 64 + 72 + 72 + 27)


def test_trainable_share_counts_weights_and_not_bytes() -> None:
    model = nn.Sequential()
    model.q_proj = NF4Linear.from_linear(nn.Linear(64, 64, bias=False))
    assert trainable_parameters(model) == (0, 4096)


def test_the_same_generator_gives_the_same_adapters() -> None:
    one, two = (add_lora(Block(), LoRAConfig(target_modules=("q_proj",)), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one.q_proj.lora_A.weight, two.q_proj.lora_A.weight)


def test_base_only_switches_adapters_off_and_on_again() -> None:
    model = add_lora(Block(), LoRAConfig(target_modules=("q_proj",)))
    nn.init.normal_(model.q_proj.lora_B.weight)
    x = torch.randn(2, 8)
    with_adapter = model(x)
    with base_only(model):
        assert not torch.equal(model(x), with_adapter)
    assert torch.equal(model(x), with_adapter)


@pytest.mark.parametrize("options", [{"r": 0}, {"r": 1.5}, {"r": True}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0},
                                     {"alpha": True}, {"alpha": "8"}, {"alpha": float("inf")}, {"r": -1}, {"r": "8"},
                                     {"dropout": -0.1}, {"dropout": float("nan")}, {"target_modules": "q_proj"},
                                     {"target_modules": None}, {"target_modules": [1]}, {"target_modules": {"q_proj": 1}}])
def test_bad_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        LoRAConfig(**options)


def test_a_target_that_matches_nothing_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'query'.*head, o_proj, q_proj"):
        add_lora(Block(), LoRAConfig(target_modules=("q_proj", "query")))
    with pytest.raises(ConfigError, match="already"):
        add_lora(add_lora(Block(), LoRAConfig(target_modules=("q_proj",))), LoRAConfig(target_modules=("q_proj",)))
    with pytest.raises(ConfigError, match="nothing"):
        add_lora(Block(), LoRAConfig(target_modules=()))
    with pytest.raises(ConfigError, match="LoRAConfig, not a dict"):
        add_lora(Block(), {"r": 8})
    with pytest.raises(ConfigError, match="not over a ReLU"):
        LoRALinear(nn.ReLU())


class Two(nn.Module):
    """Two blocks in a list, as a model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])


@pytest.mark.parametrize(("targets", "adapted"), [
    (("layers.1.q_proj",), ["layers.1.q_proj"]), (("1.q_proj", "head"), ["layers.0.head", "layers.1.q_proj", "layers.1.head"]),
    (("o_proj",), ["layers.0.o_proj", "layers.1.o_proj"]),
])
def test_a_target_is_a_name_or_its_end_cut_at_a_dot(targets: tuple[str, ...], adapted: list[str]) -> None:
    assert [name for name, _ in lora_layers(add_lora(Two(), LoRAConfig(r=1, target_modules=targets)))] == adapted
    with pytest.raises(ConfigError, match="'proj'"):
        add_lora(Two(), LoRAConfig(target_modules=("proj",)))


def test_all_seven_linears_of_every_block_are_adapted_by_default(tmp_path: Path) -> None:
    for quantize in ("nf4", None):
        model = add_lora(load_model(write_model(tmp_path), quantize=quantize))
        assert [name for name, _ in lora_layers(model)] == [
            f"model.layers.{layer}.{name}" for layer in range(2)
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                         "mlp.up_proj", "mlp.down_proj")]
        # r · (in + out) of each, written out for the shape of tests/models.py: hidden 64, key/value 32, inner 128, r 16.
        assert trainable_parameters(model)[0] == 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1.003), (torch.float16, 1.001)])
def test_dora_in_16_bits_sees_a_length_that_moved_by_less_than_a_step(dtype: torch.dtype, factor: float) -> None:
    """1.003 is 1 in bfloat16: rounded before 1 is taken off, such a change is lost in forward, but not in a merge."""
    layer = LoRALinear(nn.Linear(256, 64, bias=False).to(dtype), r=4, use_dora=True)
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        before = layer(x).double()
        layer.lora_magnitude_vector.mul_(factor)      # type: ignore[union-attr]
        moved, merged = layer(x).double(), x.double() @ layer.merged_weight().double().T
    found = float((moved * before).sum() / (before * before).sum())
    assert found - 1 == pytest.approx(factor - 1, rel=0.1)
    assert (moved - merged).norm() < 2.0 ** -8 * merged.norm()


@pytest.mark.parametrize("training", [True, False])
def test_dora_gives_xs_type_whatever_the_biass_is(training: bool) -> None:
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(8, 8)), r=2, use_dora=True, dropout=0.1).train(training)
    assert layer(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
