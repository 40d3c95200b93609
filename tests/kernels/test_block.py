"""Attention, SwiGLU, RMSNorm and rotation as vector code against their formulas in float64, torch's, and differences."""
from __future__ import annotations

import ctypes
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.kernels import block, build
from minilora.llama.frugal import attention, plain_rms_norm, rms_norm, rotate, swiglu
from minilora.llama.recompute import recompute
from minilora.llama.rotary import rotation

FORMS = {"native": build.NATIVE, "AVX-512 without bfloat16 products": ("-mavx512f", "-mfma")}
ROUNDED = 0.0025        # rounding to bfloat16 moves a number by up to 2⁻⁸ of its size, the norm of many by 0.0017 of theirs
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def make(form: str) -> block.Kernel:
    """The kernel in one form, or a skip that says what is missing."""
    if platform.machine() not in ("x86_64", "AMD64") or "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512")
    try:
        made = block.Kernel(FORMS[form])
    except build.BuildError as error:
        pytest.skip(str(error))
    assert made.works
    return made


@pytest.fixture(scope="module", params=FORMS)
def kernel(request: pytest.FixtureRequest) -> block.Kernel:
    return make(request.param)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> block.Kernel:
    """The kernel that `frugal` takes, whatever the environment says."""
    made = make("native")
    monkeypatch.setattr(block, "_tried", [made])
    return made


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def heads(batch: int, count: int, length: int, dim: int, seed: int) -> Tensor:
    """(B, H, T, d) as a projection gives it: lying as (B, T, H · d)."""
    return normal(batch, length, count * dim, seed=seed).view(batch, length, count, dim).transpose(1, 2)


def operands(batch: int, count: int, shared: int, length: int, dim: int) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the result."""
    return tuple(heads(batch, n, length, dim, seed) for seed, n in enumerate((count, shared, shared, count)))


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q·kᵀ / √d of the keys that a row sees, in float64: (B, H, T, T)."""
    all_keys = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / q.shape[-1] ** 0.5
    return all_keys.masked_fill(~torch.ones(all_keys.shape[-2:], dtype=torch.bool).tril(), -torch.inf)


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """The formula in float64: result, and gradients of q, k and v."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    y = scores(q, k).softmax(-1) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), grad.double())]


def bounds(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[float]:
    """How far off result and gradients may be, as lengths.

    Each number is rounded, and the backward takes the result o as it was rounded: Σ grad · o of a row is off by up to
    2⁻⁸ Σ |grad o|, and its slopes P (dP - Σ) / √d by as much times P / √d.
    """
    right = exact(q, k, v, grad)
    group = q.shape[1] // k.shape[1]
    weights = scores(q, k).softmax(-1)
    moved = 2 ** -8 * (grad.double() * right[0]).abs().sum(-1, keepdim=True) / q.shape[-1] ** 0.5             # (B, H, T, 1)
    of_q = moved * (weights @ k.double().repeat_interleave(group, 1)).norm(dim=-1, keepdim=True)
    of_k = (weights.transpose(-1, -2) @ (moved * q.double().norm(dim=-1, keepdim=True))).unflatten(1, (-1, group)).sum(2)
    return [ROUNDED * float(x.norm()) + more for x, more in
            zip(right, (0.0, float(of_q.norm()), float(of_k.norm()), 0.0), strict=True)]


def ours(kernel: block.Kernel, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    y, log_sum = kernel.attention(q, k, v)
    return [y, *kernel.attention_backward(grad, q, k, v, y, log_sum)]


def off(found: Tensor, expected: Tensor) -> float:
    """The length of the error in units of what is expected."""
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", FORMS)
def test_powers_of_two_are_right_to_one_unit_in_the_last_place(form: str) -> None:
    make(form)
    exp2 = build.load(*block.SOURCES, machine=FORMS[form]).block_exp2
    exp2.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    x = torch.cat((torch.linspace(-125, 127, 1 << 20), torch.linspace(-1, 1, 1 << 20)))
    right = np.exp2(x.double().numpy())
    found = x.clone()
    exp2(found.data_ptr(), len(found))
    assert (np.abs(found.double().numpy() - right) <= np.spacing(right.astype(np.float32))).all()
    ends = torch.tensor([0.0, -200.0, -1e30, 200.0, torch.nan, 1.0, -3.0, -149.0] * 2)
    exp2(ends.data_ptr(), len(ends))
    torch.testing.assert_close(ends[:8], torch.tensor([1, 0, 0, torch.inf, torch.nan, 2, 0.125, 2.0 ** -149]), rtol=0, atol=0,
                               equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 2), shared=st.integers(1, 3), group=st.integers(1, 3), length=st.integers(2, 200),
       dim=st.sampled_from(block.HEAD_DIMS), lying=st.sampled_from(["projection", "heads", "gaps", "one buffer"]))
def test_attention_and_its_gradients_are_the_formula_rounded(kernel: block.Kernel, batch: int, shared: int, group: int,
                                                             length: int, dim: int, lying: str) -> None:
    q, k, v, grad = operands(batch, shared * group, shared, length, dim)
    if lying == "heads":
        q, k, v, grad = (x.contiguous() for x in (q, k, v, grad))
    elif lying == "gaps":
        q, k, v, grad = (torch.nn.functional.pad(x, (3, 5, 1, 2))[:, :, 1:-2, 3:-5] for x in (q, k, v, grad))
    elif lying == "one buffer":
        whole = torch.cat((q, k, v), dim=1).transpose(1, 2).contiguous().transpose(1, 2)
        q, k, v = whole.split((q.shape[1], shared, shared), dim=1)
    given_ = q, k, v, grad
    for found, right, bound in zip(ours(kernel, *given_), exact(*given_), bounds(*given_), strict=True):
        assert found.shape == right.shape and float((found.double() - right).norm()) < bound
        assert found.dtype == torch.bfloat16 and found.transpose(1, 2).is_contiguous(), "as projections want it"


@pytest.mark.parametrize("shape", [(2, 4, 4, 256, 64), (1, 2, 2, 130, 128)], ids=str)
def test_attention_is_closer_to_the_formula_than_torchs_in_bfloat16(kernel: block.Kernel, shape: tuple[int, ...]) -> None:
    q, k, v, grad = operands(*shape)
    y, log_sum = flash(q, k, v, 0.0, True)
    torchs = [y, *flash_backward(grad, q, k, v, y, log_sum, 0.0, True)]
    for mine, theirs, expected in zip(ours(kernel, q, k, v, grad), torchs, exact(q, k, v, grad), strict=True):
        assert off(mine, expected) < off(theirs, expected)


def test_the_first_position_takes_its_own_value_and_gives_no_gradient_to_keys(kernel: block.Kernel) -> None:
    q, k, v, grad = operands(2, 3, 3, 1, 64)
    y, d_q, d_k, d_v = ours(kernel, q, k, v, grad)
    assert torch.equal(y, v) and torch.equal(d_v, grad)
    assert d_q.abs().max() < 1e-5 and d_k.abs().max() < 1e-5


def test_gradients_pass_finite_differences(kernel: block.Kernel) -> None:
    """The loss Σ y · grad in float64, a step up and down along the gradients' signs: its slope is theirs."""
    q, k, v, grad = operands(1, 2, 1, 5, 64)
    _, *gradients = ours(kernel, q, k, v, grad)
    _, *allowed = bounds(q, k, v, grad)
    for at in range(3):
        direction = normal(*(q, k, v)[at].shape, seed=10 + at).double().abs() * gradients[at].double().sign()

        def loss(step: float, at: int = at, direction: Tensor = direction) -> float:
            moved = [x.double() for x in (q, k, v)]
            moved[at] = moved[at] + step * direction
            return float((exact(*moved, grad)[0] * grad.double()).sum())

        slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
        found = float((gradients[at].double() * direction).sum())
        assert abs(found - slope) < allowed[at] * float(direction.norm()) < abs(slope) / 3


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 3e4])
def test_scores_of_any_size_are_met(kernel: block.Kernel, scale: float) -> None:
    q, k, v, grad = operands(1, 2, 2, 100, 64)
    q = (q * scale).bfloat16()
    found, log_sum = kernel.attention(q, k, v)
    assert off(found, exact(q, k, v, grad)[0]) < ROUNDED
    expected = scores(q, k).logsumexp(-1) / math.log(2)
    torch.testing.assert_close(log_sum.double(), expected, rtol=1e-6, atol=1e-6)


def test_results_do_not_depend_on_threads_or_neighbours(kernel: block.Kernel, threads: Callable[[int], None]) -> None:
    q, k, v, grad = operands(3, 6, 2, 150, 64)
    threads(1)
    alone = ours(kernel, q, k, v, grad)
    one_sequence = ours(kernel, *(x[1:2] for x in (q, k, v, grad)))
    for count in (2, 3, 5):
        threads(count)
        for _ in range(3):
            assert all(torch.equal(x, y) for x, y in zip(ours(kernel, q, k, v, grad), alone, strict=True))
    assert all(torch.equal(x, y[1:2]) for x, y in zip(one_sequence, alone, strict=True))


def test_later_positions_do_not_reach_earlier_ones(kernel: block.Kernel) -> None:
    q, k, v, _ = operands(1, 2, 2, 140, 64)
    long, _ = kernel.attention(q, k, v)
    for length in (1, 63, 64, 65, 139):
        short, _ = kernel.attention(*(x[:, :, :length] for x in (q, k, v)))
        assert torch.equal(short, long[:, :, :length])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
def test_what_is_not_finite_comes_through(kernel: block.Kernel, bad: float, which: int) -> None:
    """Where the formula has no number, neither has the kernel, forward and backward; and rows before it don't change."""
    inputs = [x.clone() for x in operands(1, 1, 1, 90, 64)]
    clean, _ = kernel.attention(*inputs[:3])
    inputs[which][0, 0, 71, 5] = bad
    y, *gradients = ours(kernel, *inputs)
    expected, *_ = exact(*inputs)
    lost = ~expected.isfinite().all(-1)
    lost[..., :68] = False              # Trap: in float64 too, 0 · ∞ of a key that is not seen is NaN
    assert lost.any() and bool((~y.isfinite().all(-1))[lost].all())
    assert torch.equal(y[:, :, :68], clean[:, :, :68])
    assert not all(x.isfinite().all() for x in gradients)


def test_inputs_that_the_kernel_cannot_read_are_refused(kernel: block.Kernel) -> None:
    q, k, v, _ = operands(1, 4, 2, 10, 64)
    for call in (lambda: kernel.attention(q.float(), k, v), lambda: kernel.attention(q, k[:, :, :9], v),
                 lambda: kernel.attention(q[..., :32], k[..., :32], v[..., :32]),
                 lambda: kernel.attention(q[:, :3], k, v), lambda: kernel.attention(q, k, v.transpose(2, 3)),
                 lambda: kernel.rotation(q, *2 * [normal(1, 1, 9, 64, seed=0)]),
                 lambda: kernel.rotation(q, *2 * [normal(2, 1, 10, 64, seed=0)]),
                 lambda: kernel.norm(normal(3, 40, seed=0), normal(40, seed=1), 1e-5),
                 lambda: kernel.norm(normal(3, 64, seed=0), normal(48, seed=1), 1e-5),
                 lambda: kernel.swiglu(normal(3, 64, seed=0), normal(3, 128, seed=1)[:, ::2])):
        with pytest.raises(ValueError, match="the kernel takes"):
            call()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 70), pieces=st.integers(1, 80), scale=st.sampled_from([1e-3, 1.0, 20.0]))
def test_swiglu_and_its_gradients_are_the_formula_rounded(kernel: block.Kernel, rows: int, pieces: int, scale: float) -> None:
    gate, up, grad = (normal(rows, 16 * pieces, seed=seed) for seed in range(3))
    gate = (gate * scale).bfloat16()
    gate64, up64 = gate.double().requires_grad_(), up.double().requires_grad_()
    y = gate64 * torch.sigmoid(gate64) * up64
    expected = [y, *torch.autograd.grad(y, (gate64, up64), grad.double())]
    for mine, right in zip((kernel.swiglu(gate, up), *kernel.swiglu_backward(grad, gate, up)), expected, strict=True):
        # One rounding of each number, and float32's where 1 + g (1 - σ) cancels.
        torch.testing.assert_close(mine.double(), right.detach(), rtol=2 ** -7.99, atol=4e-6)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 70), pieces=st.integers(1, 80), scale=st.sampled_from([1e-3, 1.0, 20.0]))
def test_a_norm_and_its_gradient_are_the_formula_rounded(kernel: block.Kernel, rows: int, pieces: int, scale: float) -> None:
    x, grad, weight = normal(rows, 16 * pieces, seed=0), normal(rows, 16 * pieces, seed=1), normal(16 * pieces, seed=2)
    x = (x * scale).bfloat16()
    x64 = x.double().requires_grad_()
    expected = plain_rms_norm(x64, weight.double(), 1e-5)
    slope, = torch.autograd.grad(expected, x64, grad.double())
    y, inverse = kernel.norm(x, weight, 1e-5)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=2 ** -7.99, atol=1e-30)
    found = kernel.norm_backward(grad, x, weight, inverse).double()
    size = float(slope.abs().max())                     # two terms may cancel
    torch.testing.assert_close(found, slope, rtol=2 ** -7.99, atol=2e-6 * size + 2e-6 * float(inverse.max()))


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), count=st.integers(1, 5), length=st.integers(1, 40), dim=st.sampled_from(block.HEAD_DIMS),
       same=st.booleans(), turned=st.booleans())
def test_a_rotation_is_the_formula_rounded(kernel: block.Kernel, batch: int, count: int, length: int, dim: int, same: bool,
                                           turned: bool) -> None:
    x = heads(batch, count, length, dim, seed=0)
    x = x if turned else x.contiguous()
    cos, sin = (normal(1 if same else batch, 1, length, dim, seed=seed) for seed in (1, 2))
    first, second = x.double().chunk(2, dim=-1)
    expected = x.double() * cos.double() + torch.cat((-second, first), dim=-1) * sin.double()
    found = kernel.rotation(x, cos, sin)
    torch.testing.assert_close(found.double(), expected, rtol=2 ** -7.99, atol=1e-6)
    assert found.transpose(1, 2).is_contiguous()


def test_the_gradient_of_a_rotation_is_the_rotation_back(native: block.Kernel) -> None:
    x, grad = heads(2, 3, 20, 64, seed=0).requires_grad_(), heads(2, 3, 20, 64, seed=1)
    cos, sin = rotation(torch.arange(20).expand(2, 20), torch.rand(32, generator=torch.Generator().manual_seed(2)),
                        torch.bfloat16)
    y = rotate(x, cos, sin)
    assert torch.equal(y, native.rotation(x.detach(), cos, sin))
    found, = torch.autograd.grad(y, x, grad)
    assert torch.equal(found, native.rotation(grad, cos, -sin))
    assert off(native.rotation(y.detach(), cos, -sin), x.detach().double()) < 2 * ROUNDED


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_norm_and_swiglu_let_nan_and_infinity_through(kernel: block.Kernel, bad: float) -> None:
    x, weight = normal(3, 64, seed=0), normal(64, seed=1)
    x[1, 7] = bad
    y, inverse = kernel.norm(x, weight, 1e-5)
    assert y[1, 7].isnan() and y[0].isfinite().all() and y[2].isfinite().all()
    assert kernel.norm_backward(x.flip(1), x, weight, inverse)[1].isnan().all()
    assert not kernel.swiglu(x, x)[1, 7].isfinite() and not kernel.swiglu(normal(3, 64, seed=2), x)[1, 7].isfinite()


def test_norm_and_swiglu_do_not_depend_on_threads(kernel: block.Kernel, threads: Callable[[int], None]) -> None:
    x, grad, weight = normal(100, 768, seed=0), normal(100, 768, seed=1), normal(768, seed=2)
    found = []
    for count in (1, 2, 5):
        threads(count)
        y, inverse = kernel.norm(x, weight, 1e-5)
        found.append([y, kernel.norm_backward(grad, x, weight, inverse), kernel.swiglu(x, grad),
                      *kernel.swiglu_backward(y, x, grad)])
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_the_model_takes_the_kernel_where_it_is_made_for_its_tensors(native: block.Kernel) -> None:
    q, k, v, grad = operands(2, 4, 2, 70, 64)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attention(*leaves, None)
    for found, expected in zip((y, *torch.autograd.grad(y, leaves, grad)), ours(native, q, k, v, grad), strict=True):
        assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, None), y)
    mask = torch.ones(70, 70, dtype=torch.bool).tril()
    assert not torch.equal(attention(q, k, v, mask), y) and off(attention(q, k, v, mask), y.detach().double()) < 2 * ROUNDED


def test_only_keys_or_values_may_want_a_gradient(native: block.Kernel) -> None:
    q, k, v, grad = operands(1, 2, 2, 20, 64)
    expected = ours(native, q, k, v, grad)
    for at, x in ((2, k), (3, v)):
        x.requires_grad_()
        found, = torch.autograd.grad(attention(q, k, v, None), x, grad)
        assert torch.equal(found, expected[at])
        x.requires_grad_(False)


@pytest.mark.parametrize("half", ["attention", "norm", "swiglu"])
def test_recomputed_gradients_have_the_same_bits(native: block.Kernel, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    forward = native.attention
    monkeypatch.setattr(native, "attention", lambda *given: made.append(1) or forward(*given))
    weight = normal(768, seed=1)

    def part(x: Tensor) -> Tensor:
        if half == "norm":
            return rms_norm(x, weight, 1e-5) * 2
        if half == "swiglu":
            return swiglu(x * 2, x + 1) * 2
        split = x.view(2, 40, 12, 64).transpose(1, 2)
        return attention(split * 2, split + 1, split, None) * 2

    gradients = []
    for through in (lambda x: part(x), lambda x: recompute(part, x)):
        made.clear()
        x = normal(2, 40, 768, seed=0).requires_grad_()
        through(x).float().square().sum().backward()
        gradients.append(x.grad)
        assert len(made) == (half == "attention"), "it is remembered"
    assert torch.equal(*gradients)


@pytest.mark.parametrize("function", [lambda x, y: rms_norm(x, y[0], 1e-5), swiglu], ids=["norm", "swiglu"])
@pytest.mark.parametrize("width", [752, 768])
def test_narrow_rows_keep_torchs_bits(native: block.Kernel, function: Callable[..., Tensor], width: int,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(20, width, seed=0), normal(20, width, seed=1)
    found = function(x, y)
    monkeypatch.setattr(block, "_tried", [None])
    assert torch.equal(found, function(x, y)) == (width < block.NARROWEST)


def test_a_library_compiled_for_less_offers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        assert not block.Kernel(("-mavx2",)).works
    except build.BuildError as error:
        pytest.skip(str(error))


USE = """
import warnings
import torch
from minilora.kernels import block
from minilora.layers import dense
from minilora.llama.frugal import attention
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    q, k, v = (torch.randn(1, 2, 9, 64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    y, again = attention(q, k, v, None), attention(q, k, v, None)
    kind = q.dtype if dense.multiplies(q.dtype) else torch.float32
    expected = torch.nn.functional.scaled_dot_product_attention(q.to(kind), k.to(kind), v.to(kind), is_causal=True).to(q.dtype)
said = [str(w.message) for w in caught if "torch's operations" in str(w.message)]
print(block.kernel() is None, torch.equal(y, expected), len(said), *said)
"""


def use(**environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", USE], env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_compiler_torchs_operations_are_used_and_it_is_said_once(tmp_path: Path) -> None:
    said = use(PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"), MINILORA_KERNELS="")
    assert said.startswith("True True 1 attention, norms and SwiGLU take torch's operations: no C++ compiler")


def test_torchs_operations_can_be_asked_for_and_then_nothing_is_said(tmp_path: Path) -> None:
    assert use(MINILORA_KERNELS="reference", XDG_CACHE_HOME=str(tmp_path)) == "True True 0" and list(tmp_path.iterdir()) == []


def test_stepwise_swiglu_has_torchs_bits_for_every_bfloat16(kernel: block.Kernel) -> None:
    gate = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16).view(-1, 64)
    up = normal(*gate.shape, seed=0)
    torch.testing.assert_close(kernel.swiglu(gate, up, stepwise=True), torch.nn.functional.silu(gate) * up, rtol=0, atol=0,
                               equal_nan=True)


@pytest.mark.parametrize("size", [32, 96, 256, 480, 512, 544, 736])
def test_a_stepwise_norm_has_torchs_bits(kernel: block.Kernel, size: int) -> None:
    x, weight = normal(2000, size, seed=0) * torch.logspace(-3, 2, 2000)[:, None].bfloat16(), normal(size, seed=1)
    y, inverse = kernel.norm(x, weight, 1e-5, stepwise=True)
    assert torch.equal(y, plain_rms_norm(x, weight, 1e-5))
    assert torch.equal(inverse, torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5))


def test_a_stepwise_rotation_has_torchs_bits(kernel: block.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = heads(3, 5, 40, 32, seed=0)
    cos, sin = rotation(torch.arange(40).expand(3, 40), torch.rand(16, generator=torch.Generator().manual_seed(2)), x.dtype)
    found = kernel.rotation(x, cos, sin, stepwise=True)
    monkeypatch.setattr(block, "_tried", [None])
    assert torch.equal(found, rotate(x, cos, sin))


def test_the_model_takes_the_stepwise_forms_for_narrow_rows_without_gradients(native: block.Kernel,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    for name in ("norm", "swiglu", "rotation"):
        method = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args, method=method: (called.append(args[-1]), method(*args))[1])
    x, weight, angles = normal(3, 256, seed=0), normal(256, seed=1), normal(1, 1, 3, 32, seed=2)
    with torch.no_grad():
        rms_norm(x, weight, 1e-5), swiglu(x, x), rotate(heads(1, 2, 3, 32, seed=0), angles, angles)
    assert called == [True] * 3
    rms_norm(x.requires_grad_(), weight, 1e-5), swiglu(x, x)
    assert called == [True] * 3, "training keeps torch's operations"
