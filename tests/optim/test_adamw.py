"""AdamW: by hand, bit for bit against torch, and its state in torch's format."""
from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import ConfigError
from minilora.optim import adamw
from minilora.optim.adamw import AdamW
from minilora.optim.paged_adamw import PagedAdamW


def test_first_step_by_hand() -> None:
    param = torch.nn.Parameter(torch.tensor([1.0]))
    param.grad = torch.tensor([0.5])
    AdamW([param], lr=0.1, weight_decay=0.1).step()
    # Decay first: 1 - 0.1 * 0.1 = 0.99; at step one m̂ / √v̂ = g / |g| = 1, so the step is lr: 0.89.
    assert param.item() == pytest.approx(0.89, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(lr=st.floats(1e-6, 1.0), beta1=st.floats(0.0, 0.99), beta2=st.floats(0.0, 0.9999),
       eps=st.sampled_from([1e-8, 1e-6, 1e-3]), weight_decay=st.sampled_from([0.0, 0.01, 0.3]),
       seed=st.integers(0, 1 << 30), skip=st.booleans())
def test_bits_equal_torch(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, seed: int,
                          skip: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    initial = [torch.randn(shape, generator=generator) for shape in ((3, 5), (7,), (1,))]
    options = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in initial] for _ in range(2))
    a, b = AdamW(ours, **options), torch.optim.AdamW(theirs, **options, foreach=False, fused=False)
    for step in range(12):
        for x, y in zip(ours, theirs, strict=True):
            grad = torch.randn(x.shape, generator=generator) * 10.0 ** int(torch.randint(-6, 3, (1,), generator=generator))
            sparse = skip and step % 3 == 1 and x.numel() == 7      # a parameter without gradient keeps its step count
            x.grad, y.grad = (None, None) if sparse else (grad.clone(), grad.clone())
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y), f"largest difference {(x - y).abs().max()}"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_small_tensors_updated_as_one_have_the_bits_of_each_alone(monkeypatch: pytest.MonkeyPatch, weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 40), (3,), (), (7, 1, 5), (300,), (299,), (7, 2)]
    initial = [torch.randn(shape, generator=generator) for shape in shapes]
    initial[0] = torch.randn(40, 16, generator=generator).T         # not in one piece
    initial[3] = initial[3].double()
    whole, alone = ([torch.nn.Parameter(t.clone()) for t in initial] for _ in range(2))
    sizes: list[int] = []
    update = adamw.adamw_update
    monkeypatch.setattr(adamw, "TOGETHER", 300)
    optimizers = [AdamW([{"params": params[:5]}, {"params": params[5:], "lr": 0.3}], lr=0.1, weight_decay=weight_decay)
                  for params in (whole, alone)]
    for step in range(5):
        for x, y in zip(whole, alone, strict=True):
            x.grad = None if step == 1 and x.shape == (3,) else torch.randn(x.shape, generator=generator).to(x.dtype)
            y.grad = None if x.grad is None else x.grad.clone()
        for optimizer, devices in zip(optimizers, (("cpu",), ("cuda",)), strict=True):
            monkeypatch.setattr(adamw, "TOGETHER_ON", devices)
            monkeypatch.setattr(adamw, "adamw_update", lambda *given: (sizes.append(given[0].numel()), update(*given)))
            optimizer.step()
    for x, y in zip(whole, alone, strict=True):
        assert torch.equal(x, y) and x.stride() == y.stride()
    for ours, theirs in zip(*(optimizer.state_dict()["state"].values() for optimizer in optimizers), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Of the first step: (16, 40) and (300,) are large, the second group goes as one, and so do (3,) and ().
    assert sizes[:5] == [640, 300, 313, 4, 35]


def test_state_dict_goes_to_torch_and_back() -> None:
    def steps(optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, count: int) -> None:
        for step in range(count):
            param.grad = torch.full_like(param, 0.1 * (step + 1))
            optimizer.step()
    a, b = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    ours, theirs = AdamW([a], lr=0.01), torch.optim.AdamW([b], lr=0.01, foreach=False)
    steps(ours, a, 3)
    state = copy.deepcopy(ours.state_dict())
    b.data.copy_(a.data)
    theirs.load_state_dict({"state": state["state"], "param_groups": theirs.state_dict()["param_groups"]})
    steps(ours, a, 3)
    steps(theirs, b, 3)
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [AdamW, PagedAdamW])
@pytest.mark.parametrize("variant", ["maximize", "amsgrad"])
def test_a_group_that_asks_for_another_update_is_refused_and_not_minimised(kind: type[AdamW], variant: str) -> None:
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ConfigError, match=variant):
        kind([{"params": [first], variant: True}])
    optimizer = kind([first])
    with pytest.raises(ConfigError, match=variant):
        optimizer.add_param_group({"params": [second], variant: True})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second], variant: False})


@pytest.mark.parametrize("options", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": float("nan")},
                                     {"lr": "fast"}, {"betas": 0.9}, {"betas": (0.9, 0.99, 0.999)}])
def test_bad_hyper_parameters_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        AdamW([torch.nn.Parameter(torch.ones(1))], **options)
