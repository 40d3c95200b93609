"""What `torch.compile` makes of 4-bit layers computes what they compute."""
from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from minilora import LoRALinear, NF4Linear
from minilora.layers.nf4_linear import FUSED_WEIGHTS


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(columns: int, rows: int, seed: int) -> LoRALinear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = LoRALinear(NF4Linear.from_linear(nn.Linear(columns, rows)), 8)
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    return layer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sizes", [(64, 32, 32), (1024, FUSED_WEIGHTS // 1024)])
def test_a_compiled_model_has_the_values_and_gradients_of_its_layers(sizes: tuple[int, ...]) -> None:
    """By AOTAutograd, the part of torch.compile that takes buffers and in-place sums apart."""
    model = nn.Sequential(*(adapted(a, b, seed) for seed, (a, b) in enumerate(itertools.pairwise(sizes))))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, sizes[0], generator=torch.Generator().manual_seed(5))
    found = []
    for each in (compiled, model):
        model.zero_grad()
        given = x.clone().requires_grad_()
        y = each(given)
        y.square().sum().backward()
        with torch.no_grad():
            found.append([y, each(x), given.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == 3 + 2 * len(model)
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
