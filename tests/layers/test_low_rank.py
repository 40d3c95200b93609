"""The update as one function: autograd's gradients, in place, and no more kept than needed."""
from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from minilora import LoRALinear, NF4Linear
from minilora.kernels import cpu
from minilora.layers.low_rank import LowRankUpdate, few_rows_update, plain_update
from minilora.layers.nf4_linear import FUSED_WEIGHTS

SIZE = 768      # a square layer of this width is large enough for the base to add in place
assert SIZE * SIZE >= FUSED_WEIGHTS


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("trained", list(itertools.product([True, False], repeat=3)), ids=str)
def test_gradients_equal_autograds_whatever_is_trained(trained: tuple[bool, bool, bool]) -> None:
    x, a, b = normal(2, 5, 8), normal(3, 8), normal(6, 3)
    for tensor, needed in zip((x, a, b), trained, strict=True):
        tensor.requires_grad_(needed)
    base = normal(6, 8, seed=1)
    through, update = LowRankUpdate.apply(x, a, b, 0.7)
    assert (through is None) == (not trained[0])
    y = update + (x if through is None else through) @ base.T
    expected = plain_update(x, a, b, 0.7) + x @ base.T
    torch.testing.assert_close(y, expected)
    wanted = [t for t in (x, a, b) if t.requires_grad]
    if not wanted:
        assert not y.requires_grad
        return
    g = normal(*y.shape, seed=2)
    for found, theirs in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g), strict=True):
        torch.testing.assert_close(found, theirs)


def test_first_and_second_derivatives_pass_finite_differences() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        through, update = LowRankUpdate.apply(x, a, b, 0.7)
        return update + through.tanh()

    inputs = [t.requires_grad_() for t in (normal(2, 4), normal(3, 4), normal(4, 3))]
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


def layer_pair(bias: bool, r: int = 8) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(SIZE, SIZE, bias=bias)), r=r, alpha=2 * r)
    nn.init.normal_(layer.lora_B.weight, std=0.05)
    return layer


def by_hand(layer: LoRALinear, x: Tensor) -> Tensor:
    """In float32, from the dense weight."""
    y = x.float() @ layer.base_layer.dense_weight(torch.float32).T + plain_update(x.float(), layer.lora_A.weight,
                                                                                  layer.lora_B.weight, layer.scaling)
    return y if layer.base_layer.bias is None else y + layer.base_layer.bias


@pytest.mark.parametrize("rows", [1, 20, 300])      # the kernel for a few rows, and torch's product
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_layer_computes_the_equation(rows: int, bias: bool, dtype: torch.dtype) -> None:
    layer = layer_pair(bias)
    assert layer.base_layer.adds_in_place
    x = torch.randn(2, rows, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    g = torch.randn(2, rows, SIZE, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = layer(x)
    y.backward(g)
    found = [x.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad]
    reference = x.detach().float().requires_grad_()
    layer.zero_grad()
    expected = by_hand(layer, reference)
    expected.backward(g.float())
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    # bfloat16: weights, x Aᵀ and results are rounded to 8 bits, 0.4 % of the largest entries; sums are taken in float32.
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for ours, theirs in zip([y, *found], [expected, reference.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad],
                            strict=True):
        assert ours is not None and theirs is not None
        assert (ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max()


def test_a_large_layer_keeps_x_and_what_is_r_wide() -> None:
    layer = layer_pair(bias=False)
    x = torch.randn(40, SIZE, dtype=torch.bfloat16, requires_grad=True)
    own = {t.data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(40, 8)]


def test_in_place_sums_touch_nothing_that_is_used_elsewhere() -> None:
    """x feeds three layers and a residual, as in a block; its own gradient is asked for as well."""
    layers = [layer_pair(bias=False) for _ in range(3)]
    x = torch.randn(30, SIZE, generator=torch.Generator().manual_seed(3)).requires_grad_()
    before, h = x.detach().clone(), (x * 1.0)
    h.retain_grad()
    (sum(layer(h).tanh() for layer in layers) + h).sum().backward()
    reference = before.clone().requires_grad_()
    (sum(by_hand(layer, reference).tanh() for layer in layers) + reference).sum().backward()
    assert torch.equal(x.detach(), before) and h.grad is not None and reference.grad is not None
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(h.grad, x.grad)


def test_without_gradients_and_with_adapters_off_it_is_the_same_layer() -> None:
    layer = layer_pair(bias=True)
    x = torch.randn(70, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=1e-4, atol=1e-4)
        layer.active = False
        assert torch.equal(layer(x), layer.base_layer(x))


def test_under_autocast_the_types_are_torchs() -> None:
    layer = layer_pair(bias=False)
    x = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and layer(x).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_few_rows_have_the_update_in_vector_code_whether_trained_or_frozen(rows: int) -> None:
    products = cpu.kernel()
    if products is None or not products.dense_rows:
        pytest.skip("no vector code for dense products here")
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=generator).bfloat16().float() for shape in ((rows, 1, 768), (5, 768), (96, 5)))
    exact, x = 0.5 * (x.double() @ a.double().T) @ b.double().T, x.bfloat16()
    found = few_rows_update(x, a, b, 0.5)
    assert found is not None and found.shape == (rows, 1, 96) and found.dtype == torch.bfloat16
    # Rounded thrice, as `plain_update` is: the sum over 768, that half of it, the sum over 5.
    assert (found.double() - exact).norm() <= 3 * 2 ** -9 * exact.norm()
    assert (found.double() - plain_update(x, a, b, 0.5).double()).norm() <= 3 * 2 ** -8 * exact.norm()
    assert torch.equal(few_rows_update(x, a.requires_grad_(), b.requires_grad_(), 0.5), found)
    assert few_rows_update(x.repeat(17, 1, 1), a, b, 0.5) is None and few_rows_update(x.float(), a, b, 0.5) is None
    with torch.enable_grad():
        assert few_rows_update(x, a, b, 0.5) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert few_rows_update(x, a, b, 0.5) is None


@pytest.mark.parametrize("kind", ["before", "behind", "backward", "before backward", "global", "instance", "subclass"])
@pytest.mark.parametrize("columns", [64, 1024])
def test_what_a_base_does_beside_its_product_is_done_whatever_its_size(columns: int, kind: str,
                                                                       request: pytest.FixtureRequest) -> None:
    base, seen = NF4Linear.from_linear(nn.Linear(columns, FUSED_WEIGHTS // 1024)), []
    layer, plain = LoRALinear(base, 4), base.forward

    def note(*_: object) -> None:
        seen.append(kind)

    def noted(x: Tensor) -> Tensor:
        note()
        return plain(x)

    if kind == "global":
        request.addfinalizer(nn.modules.module.register_module_forward_hook(
            lambda module, *_: note() if module is base else None).remove)
    elif kind == "instance":
        base.forward = noted                                                # type: ignore[method-assign]
    elif kind == "subclass":
        base.__class__ = type("Noted", (NF4Linear,), {"forward": lambda _, x: noted(x)})
    else:
        register = {"before": base.register_forward_pre_hook, "behind": base.register_forward_hook,
                    "backward": base.register_full_backward_hook, "before backward": base.register_full_backward_pre_hook}
        register[kind](note)
    layer(torch.ones(3, columns, requires_grad=True)).sum().backward()
    assert seen == [kind]
