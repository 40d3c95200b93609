"""Gradient checkpointing by hand against torch's, and against none at all."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minilora import LoRAConfig, add_lora, load_model
from minilora.layers.qlora import lora_layers
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.recompute import recompute
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
            return grad

    x = torch.ones(3, requires_grad=True)
    y = recompute(lambda x: Watched.apply(x) * 2, x)
    assert y.grad_fn is not None and "Recomputed" in type(y.grad_fn).__name__
    assert all(node is None or "AccumulateGrad" in type(node).__name__ for node, _ in y.grad_fn.next_functions[1:])
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 2.0)) and len(alive) == 2, "computed twice"
