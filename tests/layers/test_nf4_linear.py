"""The frozen 4-bit linear: values, gradients, and what it keeps in memory."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from minilora import NF4Linear, NF4Tensor, quantize_nf4


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 40)


@pytest.mark.parametrize("double_quant", [False, True])
def test_forward_and_backward_equal_a_dense_layer_of_the_dequantized_weight(linear: nn.Linear, double_quant: bool) -> None:
    layer = NF4Linear.from_linear(linear, double_quant=double_quant)
    dense = copy.deepcopy(linear)
    dense.weight.data = quantize_nf4(linear.weight, double_quant=double_quant).dequantize()
    x, y = (torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    a, b = layer(x), dense(y)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_gradient_passes_finite_differences(linear: nn.Linear) -> None:
    layer = NF4Linear.from_linear(linear)
    x = torch.randn(3, 96, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: layer(v.double()), (x,), eps=1e-5, atol=1e-5)


def test_no_dense_weight_is_kept_for_backward(linear: nn.Linear) -> None:
    layer = NF4Linear.from_linear(nn.Linear(512, 512))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(2, 512, requires_grad=True)).sum()
    assert not any(n >= 512 * 512 for n in saved), f"saved tensors of {saved} elements"


def test_the_weight_is_rebuilt_in_forward_and_again_in_backward(linear: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilds = []
    original = NF4Tensor.dequantize
    monkeypatch.setattr(NF4Tensor, "dequantize", lambda self, *a, **k: rebuilds.append(1) or original(self, *a, **k))
    layer = NF4Linear.from_linear(linear)
    y = layer(torch.randn(2, 96, requires_grad=True))
    assert len(rebuilds) == 1
    y.sum().backward()
    assert len(rebuilds) == 2
    layer(torch.randn(2, 96)).sum()
    assert len(rebuilds) == 3, "no input gradient, no second rebuild"


def test_casting_the_model_leaves_the_constants_alone(linear: nn.Linear) -> None:
    for double_quant in (False, True):
        layer = NF4Linear.from_linear(linear, double_quant=double_quant)
        before = layer.dense_weight(torch.float32)
        layer.to(torch.bfloat16)
        assert torch.equal(layer.dense_weight(torch.float32), before)
        assert layer.bias.dtype == torch.bfloat16 and layer(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_restores_the_layer(linear: nn.Linear) -> None:
    layer, other = NF4Linear.from_linear(linear), NF4Linear.from_linear(nn.Linear(96, 40))
    x = torch.randn(2, 96)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_it_trains_nothing_of_its_own(linear: nn.Linear) -> None:
    assert not any(p.requires_grad for p in NF4Linear.from_linear(linear).parameters())
