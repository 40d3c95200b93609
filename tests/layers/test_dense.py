"""Products of 16-bit matrices on a CPU that has no instructions for them: the exact sums, rounded once."""
from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora
from minilora.layers import dense, scratch
from minilora.llama.config import LlamaConfig
from minilora.llama.head import logits
from minilora.shapes import random_model
from tests.models import SHAPE

KINDS = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(dense, "PIECE", 300)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, exact: Tensor, magnitude: Tensor) -> bool:
    """Off by one rounding to the type of what was found, and by sums in float32."""
    rounding = torch.finfo(found.dtype).eps / 2 * exact.abs()
    return bool(((found.double() - exact).abs() <= rounding + 64 * 2.0 ** -24 * magnitude).all())


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("lying", ["as rows", "as columns"])
@pytest.mark.parametrize(("rows", "k", "n"), [
    (1, 1, 1), (3, 50, 7), (17, 33, 129), (2, 700, 5), (5, 4, 900), (0, 8, 3), (4, 0, 3)])
def test_a_product_is_the_exact_sum_rounded_once(rows: int, k: int, n: int, lying: str, dtype: torch.dtype) -> None:
    a = numbers(rows, k, dtype=dtype)
    b = numbers(k, n, dtype=dtype, seed=1) if lying == "as rows" else numbers(n, k, dtype=dtype, seed=1).T
    exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    found = dense.matmul(a, b)
    assert found.dtype == dtype and found.shape == (rows, n) and close(found, exact, magnitude)
    out = torch.full((rows, n), 7.0, dtype=dtype)
    assert dense.matmul(a, b, out=out) is out and torch.equal(out, found)
    y = numbers(rows, n, dtype=dtype, seed=2)
    added = dense.addmm_(y.clone(), a, b)
    assert close(added, y.double() + exact, y.double().abs() + magnitude)


@pytest.mark.parametrize("dtype", KINDS)
def test_a_linear_layer_has_its_output_bias_and_gradients(dtype: torch.dtype) -> None:
    x, weight, bias = numbers(2, 5, 40, dtype=dtype), numbers(30, 40, dtype=dtype, seed=1), numbers(30, dtype=dtype, seed=2)
    grad = numbers(2, 5, 30, dtype=dtype, seed=3)
    exact = F.linear(x.double(), weight.double(), bias.double())
    magnitude = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    for trained in (False, True):
        mine, own_weight, own_bias = x.clone().requires_grad_(), weight.clone(), bias.clone()
        own_weight.requires_grad_(trained)
        own_bias.requires_grad_(trained)
        y = dense.linear(mine, own_weight, own_bias)
        assert y.dtype == dtype and close(y.detach(), exact, magnitude)
        y.backward(grad)
        assert mine.grad is not None
        assert close(mine.grad, grad.double() @ weight.double(), grad.double().abs() @ weight.double().abs())
        if trained:
            flat_grad, flat_x = grad.double().view(-1, 30), x.double().view(-1, 40)
            assert own_weight.grad is not None and own_bias.grad is not None
            assert close(own_weight.grad, flat_grad.T @ flat_x, flat_grad.abs().T @ flat_x.abs())
            assert close(own_bias.grad, flat_grad.sum(0), flat_grad.abs().sum(0))


def test_what_comes_out_may_be_changed_in_place_and_differentiated_twice() -> None:
    x, weight = numbers(3, 20, dtype=torch.bfloat16).requires_grad_(), numbers(10, 20, dtype=torch.bfloat16, seed=1)
    y = dense.linear(x, weight).mul_(2)
    first, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    second, = torch.autograd.grad(first.sum(), x)
    exact = 8 * (weight.double().T @ weight.double()).sum(0).expand(3, 20)
    assert torch.allclose(second.double(), exact, rtol=0.05, atol=0.5)      # three roundings to 8 bits in a row


def test_the_buffer_that_a_matrix_is_widened_in_is_not_the_one_that_it_may_lie_in() -> None:
    lent = scratch.borrow(torch.Size((40, 50)), torch.bfloat16, torch.device("cpu"))
    lent.copy_(numbers(40, 50))
    a, copy = numbers(3, 40, dtype=torch.bfloat16, seed=1), lent.clone()
    assert torch.equal(dense.matmul(a, lent), dense.matmul(a, copy)) and torch.equal(lent, copy)


def test_few_rows_that_learn_nothing_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    add = dense._add_wide
    monkeypatch.setattr(dense, "_add_wide", lambda y, a, b: made.append(len(a)) or add(y, a, b))
    weight = numbers(30, 40, dtype=torch.bfloat16)
    for rows, learning, expected in ((4, False, []), (5, False, [5]), (1, True, [1, 1])):
        made.clear()
        y = dense.linear(numbers(rows, 40, dtype=torch.bfloat16).requires_grad_(learning), weight)
        if learning:
            y.sum().backward()
        assert made == expected
    made.clear()
    dense.matmul(numbers(1, 30, dtype=torch.bfloat16), weight)      # across the lines, where torch is slowest
    assert made == [1]


def test_float32_autocast_and_what_does_not_fit_are_torchs() -> None:
    x, weight = numbers(3, 20), numbers(10, 20, seed=1)
    assert torch.equal(dense.linear(x, weight), F.linear(x, weight)) and torch.equal(dense.matmul(x, weight.T), x @ weight.T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dense.linear(x.bfloat16(), weight), F.linear(x.bfloat16(), weight))
    for wrong in (numbers(10, 20), numbers(10, 21, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError):
            dense.linear(x.bfloat16(), wrong)
    assert not dense.is_widened(x.bfloat16().to("meta"))


@pytest.mark.parametrize("dtype", KINDS)
def test_attention_is_that_of_float32(dtype: torch.dtype) -> None:
    q, k, v = (numbers(2, heads, 9, 16, dtype=dtype, seed=heads) for heads in (4, 2, 2))
    mask = numbers(2, 1, 9, 9, seed=9) > -1
    mask |= torch.eye(9, dtype=torch.bool)
    for masked, causal in ((None, True), (mask, False)):
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=masked, is_causal=causal,
                                               enable_gqa=True)
        found = dense.attention(q, k, v, masked, causal)
        assert found.dtype == dtype and close(found, exact, v.double().abs().amax().expand_as(exact))


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_a_step_is_the_one_that_torch_makes_within_roundings(quantize: Literal["nf4"] | None,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for way in ("widened", "as torch does"):
        monkeypatch.setattr(dense, "multiplies", lambda dtype, way=way: way != "widened")
        model = random_model(LlamaConfig.from_dict(SHAPE), quantize, torch.bfloat16)
        minilora.add_lora(model, minilora.LoRAConfig(r=4), torch.Generator().manual_seed(0))
        ids = torch.arange(24).view(2, 12)
        logits = model(ids)
        logits.float().logsumexp(-1).sum().backward()
        found[way] = [logits.detach().float(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert len(found["widened"]) > 2
    for mine, torchs in zip(*found.values(), strict=True):
        assert (mine - torchs).norm() <= 0.02 * torchs.norm()


def test_a_head_of_the_model_is_such_a_product_and_one_with_a_hook_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    head, states = nn.Linear(40, 30, bias=False, dtype=torch.bfloat16), numbers(2, 9, 40, dtype=torch.bfloat16)
    assert torch.equal(logits(head, states), dense.linear(states, head.weight))
    head.register_forward_hook(lambda module, args, y: y * 0)
    assert not logits(head, states).any()


def test_this_cpu_is_asked_once_and_float32_always_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert dense.multiplies(torch.float32) and dense.multiplies(torch.float64)
    assert all(isinstance(dense.multiplies(dtype), bool) for dtype in KINDS)
