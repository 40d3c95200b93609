"""PagedAdamW: bit for bit torch's AdamW, whatever the pages; moments in 8 bits by their definition; state in and out."""
from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minilora import CheckpointError, ConfigError, OutputError, PagedAdamW, testing
from minilora.optim import adamw
from minilora.optim.adamw import AdamW, Moments8bit, adamw_update_8bit
from minilora.optim.paged import SMALLEST_PAGE
from minilora.optim.paged_adamw import FIELDS

Backing = Literal["host", "disk"]
# Smaller than a page of 4 KiB (512 elements), about one, several; in many shapes.
SHAPES = [(1,), (7, 3), (511,), (512,), (513,), (33, 65), (5, 1, 900), (128, 96)]


def parameters(shapes: list[tuple[int, ...]], seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(step: int, seed: int, *sets: list[nn.Parameter], sparse: bool = False) -> None:
    """The same gradients for every set, over many orders of magnitude; with `sparse` some parameters get none."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    for index, same in enumerate(zip(*sets, strict=True)):
        grad = torch.randn(same[0].shape, generator=generator) * 10.0 ** int(torch.randint(-6, 3, (1,), generator=generator))
        for param in same:
            param.grad = None if sparse and (step + index) % 3 == 0 else grad.clone()


def assert_same_bits(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        different = (a.detach().view(torch.int32) != b.detach().view(torch.int32)).nonzero()
        assert not len(different), f"parameter {index} differs first at {different[0].tolist()}"


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6), backing=st.sampled_from(["host", "disk"]),
       page_bytes=st.sampled_from([4096, 4104, 6000, 16384, 1 << 20]), frames=st.integers(2, 9), sparse=st.booleans(),
       cut=st.integers(0, 6), weight_decay=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 1 << 20),
       together=st.sampled_from([0, 700, 1 << 22]))
def test_fifty_steps_have_torchs_bits(shapes: list[tuple[int, ...]], backing: Backing, page_bytes: int, frames: int,
                                      sparse: bool, cut: int, weight_decay: float, seed: int, together: int) -> None:
    ours, theirs = parameters(shapes, seed), parameters(shapes, seed)

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        two = [{"params": params[:cut], "lr": 1e-2}, {"params": params[cut:], "lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-6}]
        return [group for group in two if group["params"]]

    a = PagedAdamW(groups(ours), weight_decay=weight_decay, page_bytes=page_bytes, resident_bytes=frames * page_bytes,
                   backing=backing)
    b = torch.optim.AdamW(groups(theirs), weight_decay=weight_decay, foreach=False, fused=False)
    for step in range(50):
        give_gradients(step, seed, ours, theirs, sparse=sparse)
        with (patch.object(adamw, "TOGETHER", together),            # as on a GPU, several pages at once
              patch.object(adamw, "TOGETHER_ON", ("cpu",) if together else ())):
            a.step()
        b.step()
        if step == 20:
            a.evict()               # as under memory pressure
    assert_same_bits(ours, theirs)
    assert a.pager.resident_bytes <= frames * page_bytes


@pytest.mark.parametrize("backing", ["host", "disk"])
def test_state_goes_to_torch_and_back(backing: Backing) -> None:
    ours, theirs = parameters(SHAPES, 0), parameters(SHAPES, 0)
    a = PagedAdamW(ours, lr=1e-2, page_bytes=SMALLEST_PAGE, resident_bytes=2 * SMALLEST_PAGE, backing=backing)
    b = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    for step in range(4):
        give_gradients(step, 0, ours, theirs, sparse=step < 2)
        a.step()
        b.step()
    state, expected = a.state_dict(), b.state_dict()
    assert state["state"].keys() == expected["state"].keys()
    for index, moments in expected["state"].items():
        assert state["state"][index].keys() == moments.keys()
        assert all(torch.equal(state["state"][index][name], moments[name]) for name in moments), index
    # Each goes on from the other's state.
    state = copy.deepcopy(state)
    a.load_state_dict(copy.deepcopy(expected))
    b.load_state_dict({"state": state["state"], "param_groups": expected["param_groups"]})
    for step in range(4, 8):
        give_gradients(step, 0, ours, theirs)
        a.step()
        b.step()
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_run_that_was_saved_goes_on_to_the_same_bits(bits: Literal[32, 8]) -> None:
    whole, first, second = (parameters(SHAPES, 1) for _ in range(3))
    options: dict[str, Any] = {"lr": 1e-2, "state_bits": bits, "page_bytes": SMALLEST_PAGE,
                               "resident_bytes": 3 * SMALLEST_PAGE}
    a, b = PagedAdamW(whole, **options), PagedAdamW(first, **options)
    for step in range(3):
        give_gradients(step, 1, whole, first, sparse=True)
        a.step()
        b.step()
    for old, new in zip(first, second, strict=True):
        new.data.copy_(old)
    # Into an optimizer that has done something else before, in pages of another size.
    c = PagedAdamW(second, **{**options, "page_bytes": 2 * SMALLEST_PAGE, "resident_bytes": 4 * SMALLEST_PAGE})
    give_gradients(9, 1, second)
    before = [param.detach().clone() for param in second]
    c.step()
    for value, param in zip(before, second, strict=True):
        param.data.copy_(value)
    c.load_state_dict(b.state_dict())
    for step in range(3, 6):
        give_gradients(step, 1, whole, second, sparse=True)
        a.step()
        c.step()
    assert_same_bits(whole, second)


def test_eight_bit_moments_follow_the_specification() -> None:
    generator = torch.Generator().manual_seed(0)
    n, steps = 600, 4
    param = torch.randn(n, generator=generator)
    moments = Moments8bit(torch.zeros(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8), torch.zeros(3), torch.zeros(3))
    expected = param.double().tolist()
    first, second = ([0] * n, [0.0] * 3), ([0] * n, [0.0] * 3)
    for step in range(1, steps + 1):
        grad = torch.randn(n, generator=generator)
        adamw_update_8bit(param, grad, moments, step, 0.01, (0.9, 0.999), 1e-8, 0.1)
        expected, first, second = testing.adamw_8bit(expected, grad.double().tolist(), first, second, step, 0.01,
                                                     weight_decay=0.1)
        # A moment near the middle between two codes may fall to either side in float32: few do, and to the next code only.
        for found, (codes, absmax), constants in ((moments.exp_avg, first, moments.exp_avg_absmax),
                                                  (moments.exp_avg_sq, second, moments.exp_avg_sq_absmax)):
            apart = np.abs(found.numpy().astype(int) - np.array(codes))
            assert apart.max() <= 1 and (apart > 0).mean() < 0.02
            np.testing.assert_allclose(constants.numpy(), absmax, rtol=1e-2)
    np.testing.assert_allclose(param.numpy(), expected, atol=2e-3)


def test_eight_bits_take_two_bytes_an_element_and_small_parameters_stay_exact() -> None:
    params = [nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(4095))]
    optimizer = PagedAdamW(params, state_bits=8, page_bytes=SMALLEST_PAGE, resident_bytes=1 << 20)
    for param in params:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert [name for name in state[0] if name != "step"] == [name for name, _, _ in FIELDS[8]]
    assert sum(moment.numel() * moment.element_size() for name, moment in state[0].items() if name != "step") == \
        2 * 4096 + 2 * 4 * 4096 // 256
    assert state[1].keys() == {"step", "exp_avg", "exp_avg_sq"} and state[1]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("backing", ["host", "disk"])
@pytest.mark.parametrize("page_bytes", [4096, 5000, 1 << 16])
def test_eight_bits_do_not_depend_on_the_pages(backing: Backing, page_bytes: int) -> None:
    shapes: list[tuple[int, ...]] = [(70, 70), (4096,), (10,), (3, 3000)]
    paged, whole = parameters(shapes, 2), parameters(shapes, 2)
    a = PagedAdamW(paged, lr=1e-2, state_bits=8, page_bytes=page_bytes, resident_bytes=2 * page_bytes, backing=backing)
    b = PagedAdamW(whole, lr=1e-2, state_bits=8, page_bytes=1 << 20, resident_bytes=1 << 22)
    for step in range(5):
        give_gradients(step, 2, paged, whole)
        a.step()
        b.step()
    assert_same_bits(paged, whole)


def test_states_of_32_bits_are_rounded_into_8_and_back() -> None:
    exact, rounded = parameters([(80, 80)], 3), parameters([(80, 80)], 3)
    a, b = PagedAdamW(exact, lr=1e-2), PagedAdamW(rounded, lr=1e-2, state_bits=8)
    give_gradients(0, 3, exact)
    a.step()
    b.load_state_dict(a.state_dict())
    found, expected = b.state_dict()["state"][0], a.state_dict()["state"][0]
    first, second = Moments8bit(*(found[name] for name, _, _ in FIELDS[8])).decode()
    for moment, name in ((first, "exp_avg"), (second, "exp_avg_sq")):
        # The dynamic map's widest gap, between levels near 1, is below 0.015 of the block's largest.
        assert float((moment - expected[name].flatten()).abs().max()) < 0.01 * float(expected[name].abs().max())
    a.load_state_dict(b.state_dict())
    torch.testing.assert_close(a.state_dict()["state"][0]["exp_avg"].flatten(), first, rtol=0, atol=0)


def test_sixteen_bit_parameters_keep_float32_moments() -> None:
    param = nn.Parameter(torch.ones(600, dtype=torch.bfloat16))
    exact = nn.Parameter(torch.ones(600))
    a, b = PagedAdamW([param], lr=0.01, page_bytes=SMALLEST_PAGE, resident_bytes=1 << 20), PagedAdamW([exact], lr=0.01)
    param.grad = torch.linspace(-1, 1, 600).bfloat16()
    exact.grad = param.grad.float()
    a.step()
    b.step()
    assert param.dtype == torch.bfloat16 and torch.equal(param, exact.bfloat16())
    assert torch.equal(a.state_dict()["state"][0]["exp_avg"], b.state_dict()["state"][0]["exp_avg"])


def test_a_parameter_that_does_not_lie_in_one_piece() -> None:
    turned, plain = nn.Parameter(torch.arange(1200.0).view(30, 40).T), nn.Parameter(torch.arange(1200.0).view(30, 40).T.clone())
    assert not turned.is_contiguous()
    for param in (turned, plain):
        param.grad = torch.linspace(-1, 1, 1200).view(40, 30)
    PagedAdamW([turned], lr=0.1, page_bytes=SMALLEST_PAGE, resident_bytes=1 << 20).step()
    torch.optim.AdamW([plain], lr=0.1, foreach=False).step()
    assert torch.equal(turned, plain)


def test_a_group_may_be_added_later() -> None:
    ours, theirs = parameters(SHAPES, 4), parameters(SHAPES, 4)
    a = PagedAdamW(ours[:3], lr=1e-2, page_bytes=SMALLEST_PAGE, resident_bytes=1 << 14)
    b = torch.optim.AdamW(theirs[:3], lr=1e-2, foreach=False)
    for step in range(6):
        if step == 2:
            a.add_param_group({"params": ours[3:]})
            b.add_param_group({"params": theirs[3:]})
        give_gradients(step, 4, ours, theirs)
        a.step()
        b.step()
    assert_same_bits(ours, theirs)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    param = nn.Parameter(torch.ones(5000))
    for options in ({"state_bits": 16}, {"resident_bytes": 1}, {"lr": -1.0}):
        with pytest.raises(ConfigError):
            PagedAdamW([param], **options)      # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="on one device, not on cpu, meta"):
        PagedAdamW([param, nn.Parameter(torch.ones(2, device="meta"))])
    with pytest.raises(OutputError, match="cannot make"):
        PagedAdamW([param], backing="disk", folder=tmp_path / "missing")
    other = PagedAdamW([nn.Parameter(torch.ones(6))])
    other.param_groups[0]["params"][0].grad = torch.ones(6)
    other.step()
    optimizer = PagedAdamW([param])
    with pytest.raises(CheckpointError, match=r"does not fit a parameter of \(5000,\)"):
        optimizer.load_state_dict(other.state_dict())


def test_a_failed_page_stops_every_later_step(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters([(4000,)], 5)
    optimizer = PagedAdamW(params, page_bytes=SMALLEST_PAGE, resident_bytes=2 * SMALLEST_PAGE, backing="disk")
    give_gradients(0, 5, params)
    optimizer.step()

    def full(page: int, frame: Tensor) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(optimizer.pager._backing, "write", full)
        with pytest.raises(OutputError, match=r"No space left on device.*--resume"):
            optimizer.step()
    for call in (optimizer.step, optimizer.state_dict, optimizer.evict):
        with pytest.raises(OutputError, match="state is lost"):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_parameters_of_other_types_are_refused(dtype: torch.dtype) -> None:
    """They would be rounded to float32 at every step, and lose what is imaginary."""
    with pytest.raises(ConfigError, match=f"PagedAdamW updates parameters of .* not of {dtype}"):
        PagedAdamW([nn.Parameter(torch.ones(3, dtype=dtype))])
    optimizer = PagedAdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(ConfigError, match="PagedAdamW updates parameters of"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=dtype))]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_and_nothing_moves() -> None:
    table, other = nn.Parameter(torch.ones(5, 2)), nn.Parameter(torch.ones(3))
    for optimizer in (PagedAdamW([other, table]), AdamW([other, table])):
        other.grad, table.grad = torch.ones(3), torch.eye(5, 2).to_sparse()
        with pytest.raises(ConfigError, match="SparseAdam"):
            optimizer.step()
    assert torch.equal(table, torch.ones(5, 2))


def test_a_parameter_without_elements_takes_part() -> None:
    empty, other = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.ones(3))
    optimizer = PagedAdamW([empty, other], lr=0.1)
    empty.grad, other.grad = torch.zeros(0, 4), torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    assert state["state"][0]["exp_avg"].shape == (0, 4) and state["state"][1]["step"] == 1
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30])
def test_in_8_bits_a_gradient_that_moments_cannot_hold_changes_nothing(broken: float) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(5000, generator=generator)) for _ in range(2)]
    optimizer = PagedAdamW(params, lr=0.1, state_bits=8, page_bytes=SMALLEST_PAGE, resident_bytes=1 << 14)
    for param in params:
        param.grad = torch.randn(5000, generator=generator)
    optimizer.step()
    before, state = [param.detach().clone() for param in params], optimizer.state_dict()["state"]
    params[1].grad[17] = broken         # type: ignore[index]
    with pytest.raises(ConfigError, match=r"a gradient holds a NaN.*nothing was changed"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[index][name], state[index][name]) for index in state for name in state[index])


@pytest.mark.parametrize("variant", ["maximize", "amsgrad"])
def test_the_state_of_a_variant_is_refused(variant: str) -> None:
    param = nn.Parameter(torch.ones(4, 8))
    param.grad = torch.ones(4, 8)
    theirs = torch.optim.AdamW([param], **{variant: True})
    theirs.step()
    for ours in (PagedAdamW([param]), AdamW([param])):
        with pytest.raises(CheckpointError, match=f"made with {variant}=True"):
            ours.load_state_dict(theirs.state_dict())


def test_a_moment_of_another_shape_is_refused() -> None:
    first, second = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(8, 4))
    first.grad = torch.ones(4, 8)
    optimizer = PagedAdamW([first])
    optimizer.step()
    with pytest.raises(CheckpointError, match=r"does not fit a parameter of \(8, 4\)"):
        PagedAdamW([second]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps])
def test_it_cannot_be_copied_and_says_what_to_do(take: Callable[[object], object]) -> None:
    with pytest.raises(ConfigError, match="give it the state_dict of this one"):
        take(PagedAdamW([nn.Parameter(torch.ones(3))]))


def test_defaults_are_torchs() -> None:
    start = torch.linspace(-1, 1, 50)
    made = [nn.Parameter(start.clone()) for _ in range(3)]
    optimizers = PagedAdamW([made[0]]), AdamW([made[1]]), torch.optim.AdamW([made[2]], foreach=False, fused=False)
    for _ in range(3):
        for param, optimizer in zip(made, optimizers, strict=True):
            param.grad = start.clone()
            optimizer.step()
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[2])
