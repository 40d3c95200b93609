"""The head's product is that of torch up to the order of its sums, and torch's wherever it is asked for more."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minilora.kernels import cpu
from minilora.llama.head import NARROWEST, logits


def head(width: int = NARROWEST, rows: int = 300, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, rows, bias=bias).to(dtype)


def states(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that the vector code was asked for."""
    kernel, seen = cpu.kernel(), []
    if kernel is None or not kernel.dense_rows:
        pytest.skip("no vector code for dense products here")
    product: Callable[[Tensor, Tensor], Tensor] = kernel.dense_product

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return product(x, weight)

    monkeypatch.setattr(kernel, "dense_product", noted)
    return seen


@torch.no_grad()
def test_logits_of_a_few_positions_are_those_of_torch(calls: list[tuple[int, ...]]) -> None:
    layer = head()
    for shape in ((1, 1), (4, 1), (1, 3), (2, 2), (5, 1), (16, 1)):
        x = states(*shape, NARROWEST)
        exact = x.double() @ layer.weight.double().T
        found = logits(layer, x)
        assert found.shape == exact.shape and found.dtype == torch.bfloat16
        assert (found.double() - exact).abs().max() <= 2 * (layer(x).double() - exact).abs().max()
        assert calls.pop() == (shape[0] * shape[1], NARROWEST)


def test_what_needs_more_is_torchs_own(calls: list[tuple[int, ...]]) -> None:
    layer, x = head(), states(1, 1, NARROWEST)
    assert logits(layer, x).requires_grad                                       # a head that is trained
    with torch.no_grad():
        for other, y in ((layer, states(17, 1, NARROWEST)), (layer, states(0, 1, NARROWEST)), (head(bias=True), x),
                         (head(dtype=torch.float32), x.float()), (head(64), states(1, 1, 64))):
            assert torch.equal(logits(other, y), other(y))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logits(layer, x), layer(x))
        seen: list[int] = []
        hook = layer.register_forward_hook(lambda *_: seen.append(1))
        logits(layer, x)
        hook.remove()
        assert seen == [1]
    assert calls == []


@torch.no_grad()
def test_without_vector_code_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "kernel", lambda: None)
    layer, x = head(), states(1, 1, NARROWEST)
    assert torch.equal(logits(layer, x), layer(x))
