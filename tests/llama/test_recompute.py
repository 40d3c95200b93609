"""Gradient checkpointing by hand against torch's, and against none at all."""
from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minilora import LoRAConfig, add_lora, load_model
from minilora.layers.qlora import lora_layers
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.recompute import recompute, recompute_rows, remembered
from minilora.llama.rotary import inverse_frequencies, rotation
from tests.models import write_model

IDS = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(0))
Through = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("recompute") / "base")


def gradients(base: Path, through: Through) -> tuple[dict[str, Tensor], Tensor]:
    """Of all adapters, each block run by `through`, with dropout; and what the random generator gives next."""
    model = load_model(base, dtype=torch.float32)
    add_lora(model, LoRAConfig(r=4, dropout=0.3), torch.Generator().manual_seed(1))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    model.train()
    torch.manual_seed(3)
    run(model, through).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, torch.rand(4)


def run(model: LlamaForCausalLM, through: Through) -> Tensor:
    x = model.model.embed_tokens(IDS)
    cos, sin = rotation(torch.arange(19).expand(2, 19), inverse_frequencies(model.config, x.device), x.dtype)
    for layer in model.model.layers:
        x = through(lambda x, layer=layer: layer(x, cos, sin, None, None), x)       # type: ignore[misc]
    return model.model.norm(x)


def torchs(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    result: Tensor = checkpoint(block, x, use_reentrant=False)
    return result


@pytest.mark.parametrize("other", [torchs, lambda block, x: block(x)], ids=["torch's", "none"])
def test_gradients_are_equal_to_the_bit_dropout_included(base: Path, other: Through) -> None:
    found, next_found = gradients(base, recompute)
    expected, next_expected = gradients(base, other)
    assert found.keys() == expected.keys() and len(found) == 2 * 7 * 2
    assert [name for name, grad in found.items() if not torch.equal(grad, expected[name])] == []
    assert torch.equal(next_found, next_expected), "the generator must not notice"


def test_gradients_are_equal_to_the_bit_from_host_memory(base: Path) -> None:
    found, _ = gradients(base, lambda block, x: recompute(block, x, on_host=True))
    expected, _ = gradients(base, recompute)
    assert found.keys() == expected.keys()
    assert [name for name, grad in found.items() if not torch.equal(grad, expected[name])] == []


def test_on_the_host_a_copy_is_kept_and_not_what_it_was_made_of() -> None:
    x = torch.ones(3, requires_grad=True) * 2
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = recompute(lambda x: x.exp(), x, on_host=True)
    assert len(kept) == 1 and torch.equal(kept[0], x.detach()) and kept[0].data_ptr() != x.data_ptr()
    assert kept[0].device.type == "cpu" and y.requires_grad


@pytest.mark.parametrize("rows", [1, 4, 5, 9, 10, 11])
@pytest.mark.parametrize("on_host", [False, True])
def test_rows_may_be_recomputed_some_at_a_time(rows: int, on_host: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    seen: list[int] = []

    def block(x: Tensor) -> Tensor:
        seen.append(x[..., 0].numel())
        return x + (x @ weight).exp()

    y = recompute_rows(block, x, rows, on_host)
    assert sum(seen) == 10 and max(seen) <= rows
    found = torch.autograd.grad(y.square().sum(), (x, weight))
    plain = block(x)
    assert torch.equal(y, plain)
    for one, other in zip(found, torch.autograd.grad(plain.square().sum(), (x, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)      # sums in another order


def test_no_inner_activation_outlives_the_forward() -> None:
    alive: list[int] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:      # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            alive.append(1)
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            return grad * ctx.saved_tensors[0]

    x = torch.ones(3, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = recompute(lambda x: Watched.apply(x) * 2, x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()], "its input, and nothing else"
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 2.0)) and len(alive) == 2, "computed twice"


class Doubled(torch.autograd.Function):
    """2 x, of which `remembered` holds a result that is also saved."""

    made = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:              # type: ignore[no-untyped-def]
        def make() -> tuple[Tensor]:
            Doubled.made += 1
            return (2 * x,)

        y, = remembered(make)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:          # type: ignore[no-untyped-def]
        x, y = ctx.saved_tensors
        assert torch.equal(y, 2 * x)
        return 2 * grad


def test_what_is_remembered_is_made_once_and_freed_with_the_graph() -> None:
    Doubled.made = 0
    x = torch.arange(3.0, requires_grad=True)
    y = recompute(lambda x: Doubled.apply(x.exp()).square(), x)
    gc.collect()
    gc.disable()
    try:
        before = {id(thing) for thing in gc.get_objects()}
        y = recompute(lambda x: Doubled.apply(x.exp()).square(), x)
        y.sum().backward()
        del y
        left = [thing for thing in gc.get_objects() if id(thing) not in before and type(thing).__name__ == "_Recomputed"]
    finally:
        gc.enable()
    assert Doubled.made == 2 and left == [], "made once in each forward; no cycle keeps it"
    torch.testing.assert_close(x.grad, 8 * x.detach().exp().square())


def test_the_second_forward_ends_where_all_is_there() -> None:
    ran: list[str] = []

    def block(x: Tensor) -> Tensor:
        y = x.exp()                     # keeps its result
        ran.append("after the last tensor that is kept")
        return y + 1

    x = torch.ones(3, requires_grad=True)
    recompute(block, x).sum().backward()
    assert len(ran) == 1 and x.grad is not None and torch.equal(x.grad, torch.ones(3).exp())


def test_a_graph_that_is_kept_and_second_derivatives_are_served() -> None:
    x = torch.arange(3.0, requires_grad=True)
    y = recompute(lambda x: x.exp() * x, x).sum()
    first, = torch.autograd.grad(y, x, retain_graph=True)
    again, = torch.autograd.grad(y, x, create_graph=True)
    second, = torch.autograd.grad(again.sum(), x)
    e = x.detach().exp()
    torch.testing.assert_close(first, e * (x.detach() + 1))
    torch.testing.assert_close(again.detach(), first)
    torch.testing.assert_close(second, e * (x.detach() + 2))


def test_a_block_that_differs_the_second_time_is_caught() -> None:
    calls: list[int] = []

    def block(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp().exp() if len(calls) == 1 else x.exp()

    with pytest.raises(AssertionError, match="isn't the same twice"):
        recompute(block, torch.ones(3, requires_grad=True)).sum().backward()


def test_autocast_is_the_same_both_times() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(4, 8, requires_grad=True, generator=torch.Generator().manual_seed(1))
    grads = []
    for through in (recompute, lambda block, x: block(x)):
        with torch.autocast("cpu", torch.bfloat16):
            y = through(lambda x: (x @ weight).exp(), x)
        grads.append(torch.autograd.grad(y.float().sum(), weight)[0])
    assert torch.equal(*grads)


def test_a_step_does_not_import_torchs_compiler(base: Path) -> None:
    code = f"""
import sys, torch
from minilora import LoRAConfig, add_lora, load_model
from minilora.optim.adamw import AdamW
model = load_model({str(base)!r})
add_lora(model, LoRAConfig(r=2))
model.gradient_checkpointing = True
optimizer = AdamW([p for p in model.train().parameters() if p.requires_grad])
model(torch.tensor([[5, 6, 7]])).sum().backward()
optimizer.step()
optimizer.zero_grad()
print([name for name in ("torch._dynamo", "sympy", "scipy", "triton") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
