"""The hash of the weights in memory."""
from __future__ import annotations

import torch
from torch import nn

from minilora.identity import fingerprint


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 60), nn.Linear(60, 3))


def test_one_changed_tensor_changes_it_and_nothing_else_does() -> None:
    model = net()
    first = fingerprint(model)
    assert first == fingerprint(net()) and len(first) == 64
    model(torch.ones(1, 70)).sum().backward()
    assert fingerprint(model.train()) == fingerprint(model.eval()) == first
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(1e-3)
        assert fingerprint(model) != first
        with torch.no_grad():
            parameter.copy_(dict(zip(model.parameters(), net().parameters(), strict=True))[parameter])
    assert fingerprint(model) == first


def test_names_shapes_and_types_count() -> None:
    bare = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(bare.weight)
    wide = nn.Linear(8, 2, bias=False)
    nn.init.zeros_(wide.weight)
    assert len({fingerprint(bare), fingerprint(wide), fingerprint(nn.Sequential(bare)), fingerprint(bare.bfloat16())}) == 4
    floats, whole = nn.Module(), nn.Module()
    floats.register_buffer("x", torch.zeros(4))
    whole.register_buffer("x", torch.zeros(4, dtype=torch.int32))
    assert fingerprint(floats) != fingerprint(whole), "the same bytes"
