"""The frozen 4-bit linear: values, gradients, and what it keeps in memory."""
from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from minilora import NF4Linear, NF4Tensor, QuantizationError, quantize_nf4
from minilora.layers.scratch import release


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


def test_every_rebuilt_weight_is_gone_after_forward_and_after_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks of the test above do not see what a Function keeps on its context: this one follows the weights themselves.

    All of them were written into one buffer, and once that is given back nothing is left of any.
    """
    rebuilt: list[weakref.ref[torch.UntypedStorage]] = []
    original = NF4Tensor.dequantize

    def dequantize(self: NF4Tensor, *args: object, **options: object) -> torch.Tensor:
        result = original(self, *args, **options)
        rebuilt.append(weakref.ref(result.untyped_storage()))
        return result

    def alive() -> set[int]:
        gc.collect()
        return {storage.data_ptr() for ref in rebuilt if (storage := ref()) is not None}

    monkeypatch.setattr(NF4Tensor, "dequantize", dequantize)
    release()
    model = nn.Sequential(*(NF4Linear.from_linear(nn.Linear(96, 96)) for _ in range(4)))
    y = model(torch.randn(2, 96, requires_grad=True))
    assert len(rebuilt) == 4 and len(alive()) <= 1, "a dense weight outlives its forward"
    release()
    assert alive() == set(), "something but the shared buffer holds a dense weight"
    y.sum().backward()
    assert len(rebuilt) == 8 and len(alive()) <= 1, "a dense weight outlives its backward"
    release()
    assert alive() == set(), "something but the shared buffer holds a dense weight"


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


def test_the_weight_is_made_once_until_a_part_of_it_changes(linear: nn.Linear) -> None:
    layer = NF4Linear.from_linear(linear)
    first = layer.quantized
    assert layer.quantized is first
    layer.nested_offset.add_(1)
    assert layer.quantized is not first and layer.quantized.nested.offset == pytest.approx(first.nested.offset + 1)
    again = layer.quantized
    layer.to(torch.float16)
    assert layer.quantized.dtype == torch.float16 and layer.quantized is not again
    again = layer.quantized
    layer.packed = layer.packed.clone()
    assert layer.quantized.packed is layer.packed and layer.quantized is not again
    copied = copy.deepcopy(layer)
    copied.packed.zero_()
    assert copied.quantized.packed is copied.packed and layer.quantized.packed is layer.packed


@pytest.mark.parametrize("writes", range(4))
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_that_is_loaded_has_the_offset_that_it_loaded(how: Callable[[NF4Linear], NF4Linear], writes: int) -> None:
    layer, other, x = NF4Linear.from_linear(nn.Linear(96, 40)), NF4Linear.from_linear(nn.Linear(96, 40)), torch.ones(2, 96)
    other.nested_offset.add_(1)
    for _ in range(writes):
        layer.load_state_dict(layer.state_dict())
    layer(x)
    copied = how(layer)
    copied.load_state_dict(other.state_dict())
    assert torch.equal(copied(x), other(x))


def test_it_trains_nothing_of_its_own(linear: nn.Linear) -> None:
    assert not any(p.requires_grad for p in NF4Linear.from_linear(linear).parameters())


@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 5, 96), (0, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_leading_shape_and_a_trained_bias_work(linear: nn.Linear, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = NF4Linear.from_linear(linear)
    layer.bias.requires_grad_()
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape[:-1], 40) and y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.bias.grad.tolist() == [float(x[..., 0].numel())] * 40


def test_a_merge_makes_the_type_the_model_was_cast_to(linear: nn.Linear) -> None:
    layer = NF4Linear.from_linear(linear.bfloat16())
    assert layer.dense_weight().dtype == torch.bfloat16
    x = torch.randn(3, 96)
    layer.float()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))


def test_a_weight_or_bias_that_does_not_fit_is_refused() -> None:
    for weight, bias in ((torch.randn(2, 3, 4), None), (torch.randn(8), None), (torch.randn(2, 3), torch.randn(3)),
                         (torch.randn(2, 3), torch.randn(2, 1))):
        with pytest.raises(QuantizationError, match="4-bit linear"):
            NF4Linear(quantize_nf4(weight), bias)


@torch.no_grad()
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_that_moved_is_read_where_it_lies_now(double_quant: bool) -> None:
    """What a kernel is told of a weight is kept; storage that is exchanged (as FSDP does), or copied, is told anew."""
    generator = torch.Generator().manual_seed(0)
    first, second = (quantize_nf4(torch.randn(1024, 512, generator=generator), double_quant=double_quant) for _ in range(2))
    x = torch.randn(2, 512, generator=generator).bfloat16()
    expected = [torch.nn.functional.linear(x.double(), q.dequantize(torch.bfloat16).double()) for q in (first, second)]
    layer = NF4Linear(first)
    torch.testing.assert_close(layer(x).double(), expected[0], rtol=2 ** -7, atol=1e-3)
    copied = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for name, tensor in NF4Linear(second).named_buffers():
        getattr(layer, name).set_(tensor.clone())
    torch.testing.assert_close(layer(x).double(), expected[1], rtol=2 ** -7, atol=1e-3)
    for other in copied:
        torch.testing.assert_close(other(x).double(), expected[0], rtol=2 ** -7, atol=1e-3)


def test_a_layer_made_in_inference_mode_computes_inside_it_and_outside() -> None:
    weight, x = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)), torch.ones(2, 32)
    expected = NF4Linear(quantize_nf4(weight))(x)
    other = NF4Linear(quantize_nf4(2 * weight))
    with torch.inference_mode():
        layer = NF4Linear(quantize_nf4(weight))
        assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x)), "an old offset is kept"
