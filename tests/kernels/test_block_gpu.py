"""SwiGLU and rotations of a GPU, in Triton's interpreter, against their formulas in float64; and every way around them."""
from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import kernels
from minilora.kernels import block_gpu, gpu
from minilora.llama import frugal
from tests.kernels.interpreter import WITHOUT_TRITON, InterpretedBlock, running
from tests.kernels.test_equal_bits import FLOATS
from tests.kernels.test_gpu import HALF_A_STEP

CPU = torch.device("cpu")
EACH_FLOAT = pytest.mark.parametrize("dtype", FLOATS)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[InterpretedBlock]:
    yield from running(InterpretedBlock)


@pytest.fixture
def in_place_of_torchs(interpreted: InterpretedBlock, monkeypatch: pytest.MonkeyPatch) -> InterpretedBlock:
    """The model takes these kernels for tensors on the CPU, of any size."""
    monkeypatch.setattr(frugal, "_fast_swiglu", lambda gate, up: interpreted)
    monkeypatch.setattr(frugal.block, "takes_rotation", lambda *_: False)
    monkeypatch.setattr(block_gpu, "takes_rotation", lambda *_: True)
    monkeypatch.setattr(block_gpu, "kernel", lambda device: interpreted)
    interpreted.launched.clear()
    return interpreted


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_rounded_once(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Half a step of the type, and of float32 some steps: the formulas have up to seven roundings, and a power."""
    assert ours.shape == exact.shape
    allowed = exact.abs() * (HALF_A_STEP[ours.dtype] * (ours.dtype != torch.float32) + 2.0 ** -20)
    assert ((ours.double() - exact).abs() <= allowed + 2.0 ** -25).all()


def assert_rotated(ours: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Half a step of the type, and in float32 what each of two products, which may cancel, is rounded by."""
    half, x, cos, sin = x.shape[-1] // 2, x.double(), cos.double(), sin.double()
    along, across = x * cos, torch.cat([-x[..., half:], x[..., :half]], -1) * sin
    exact, size = along + across, along.abs() + across.abs()
    assert ((ours.double() - exact).abs() <= HALF_A_STEP[ours.dtype] * exact.abs() + 2.0 ** -22 * size + 2.0 ** -25).all()


@EACH_FLOAT
@settings(max_examples=25)
@given(shape=st.sampled_from([(1,), (3, 5), (2, 2048), (7, 1000), (1, 4097)]), scale=st.sampled_from([0.1, 1.0, 20.0]),
       seed=st.integers(0, 99))
def test_swiglu_and_its_gradients(interpreted: InterpretedBlock, dtype: torch.dtype, shape: tuple[int, ...], scale: float,
                                  seed: int) -> None:
    gate, up, grad = (normal(*shape, seed=seed + i, scale=scale).to(dtype) for i in range(3))
    gate64, up64 = gate.double().requires_grad_(), up.double().requires_grad_()
    y64 = F.silu(gate64) * up64
    y64.backward(grad.double())
    assert_rounded_once(interpreted.swiglu(gate, up), y64.detach())
    for ours, theirs in zip(interpreted.swiglu_backward(grad, gate, up), (gate64.grad, up64.grad), strict=True):
        assert theirs is not None
        # ∂L/∂gate has a sum of two terms that may cancel: float32 errs by what each is, not by what is left.
        size = (grad.double() * up.double()).abs() + theirs.abs()
        assert ((ours.double() - theirs).abs() <= HALF_A_STEP[dtype] * theirs.abs() * (dtype != torch.float32)
                + 2.0 ** -20 * size + 2.0 ** -25).all()


def test_swiglu_of_large_and_broken_numbers(interpreted: InterpretedBlock) -> None:
    gate = torch.tensor([0.0, -0.0, 1e30, -1e30, 100.0, -100.0, torch.inf, torch.nan, 1.0])
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-3, 1.0, 1.0, 1.0, torch.nan])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)         # NumPy's, of NaN
        y = interpreted.swiglu(gate, up)
        grads = interpreted.swiglu_backward(torch.ones(9), gate, up)
    torch.testing.assert_close(y, F.silu(gate) * up, rtol=1e-6, atol=1e-38, equal_nan=True)
    # No NaN from a finite number.
    torch.testing.assert_close(grads[0][:6], torch.tensor([0.5, 0.5, 1.0, 0.0, 1e-3, 0.0]), rtol=1e-6, atol=1e-38)
    assert grads[1][3] == 0 and all(bool(grad[7].isnan()) for grad in grads)


@EACH_FLOAT
@settings(max_examples=25)
@given(batch=st.integers(1, 3), heads=st.sampled_from([1, 2, 3, 5, 8]), length=st.integers(1, 9),
       half=st.sampled_from([16, 32, 64]), same=st.booleans(), lying=st.sampled_from(["by head", "by position"]),
       seed=st.integers(0, 99))
def test_rotations(interpreted: InterpretedBlock, dtype: torch.dtype, batch: int, heads: int, length: int, half: int,
                   same: bool, lying: str, seed: int) -> None:
    x = normal(batch, heads, length, 2 * half, seed=seed).to(dtype)
    if lying == "by position":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    angles = normal(1 if same else batch, 1, length, half, seed=seed + 1, scale=3.0)
    cos, sin = (torch.cat([part, part], -1).to(dtype) for part in (angles.cos(), angles.sin()))
    ours = interpreted.rotation(x, cos, sin)
    assert_rotated(ours, x, cos, sin)
    assert ours.transpose(1, 2).is_contiguous(), "it lies as projections want it"


def test_angles_that_do_not_fit_are_refused(interpreted: InterpretedBlock) -> None:
    x, angles = normal(2, 3, 5, 32), normal(2, 1, 5, 32)
    for other in (angles.double(), angles[:, :, :4], angles.transpose(0, 2), normal(2, 1, 10, 32)[:, :, ::2]):
        with pytest.raises(ValueError, match="the kernel takes"):
            interpreted.rotation(x, angles, other)


def test_the_model_takes_them_forward_and_back(in_place_of_torchs: InterpretedBlock) -> None:
    gate, up = (normal(3, 40, seed=i).requires_grad_() for i in range(2))
    x, angles = normal(2, 3, 5, 32, seed=2).requires_grad_(), normal(1, 1, 5, 16, seed=3)
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    found = []
    for fast in (True, False):
        for tensor in (gate, up, x):
            tensor.grad = None
        y = frugal.swiglu(gate, up) if fast else F.silu(gate) * up
        turned = torch.cat([-x[..., 16:], x[..., :16]], -1)
        z = frugal.rotate(x, cos, sin) if fast else x * cos + turned * sin
        (y.square().sum() + (z * z.detach().roll(1, -1)).sum()).backward()
        found.append([y, z, gate.grad, up.grad, x.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert in_place_of_torchs.launched == {"swiglu": 1, "swiglu_backward": 1, "rotation": 2}


def test_what_is_small_or_of_another_kind_stays_with_torch() -> None:
    class OnAGPU(torch.Tensor):
        is_cuda = True              # type: ignore[assignment]

    def there(x: torch.Tensor) -> torch.Tensor:
        return x.as_subclass(OnAGPU)

    rows = there(torch.empty(1 << 10, 1 << 10, dtype=torch.bfloat16))
    assert block_gpu.takes_rows(rows, rows) and not block_gpu.takes_rows(rows.as_subclass(torch.Tensor), rows)
    for other in (rows[:-1], rows.T, there(rows.double()), there(rows.float())):
        assert not block_gpu.takes_rows(rows, other) and not block_gpu.takes_rows(other, rows)
    x, angles = there(torch.empty(1, 32, 512, 64)), there(torch.empty(1, 1, 512, 64))
    assert block_gpu.takes_rotation(x, angles, angles)
    for other in (x[:, :, :256], x.double(), x.transpose(2, 3), there(torch.empty(1, 64, 512, 48)),
                  x.as_subclass(torch.Tensor)):
        assert not block_gpu.takes_rotation(other, angles, angles)
    assert not block_gpu.takes_rotation(x, angles.bfloat16(), angles)
    assert not block_gpu.takes_rotation(x, angles, angles.transpose(2, 3))


@pytest.mark.parametrize("wrong", ["swiglu", "swiglu_backward", "rotation"])
def test_the_proof_finds_a_wrong_number_of_each_kernel(interpreted: InterpretedBlock, monkeypatch: pytest.MonkeyPatch,
                                                       wrong: str) -> None:
    block_gpu.prove(interpreted, CPU)
    original = InterpretedBlock._launch

    def one_step_off(self: InterpretedBlock, name: str, grid: tuple[int, ...], out: torch.Tensor, *arguments: Any,
                     **sizes: Any) -> None:
        original(self, name, grid, out, *arguments, **sizes)
        if name == wrong:
            out.view(torch.int16).view(-1)[-1] += 2

    monkeypatch.setattr(InterpretedBlock, "_launch", one_step_off)
    with pytest.raises(RuntimeError, match="other numbers"):
        block_gpu.prove(interpreted, CPU)


@pytest.mark.parametrize("capability", [75, 80, 90, 120])
@pytest.mark.parametrize(("name", "sizes"), [
    ("swiglu", {"TILE": block_gpu.TILE}), ("swiglu_backward", {"TILE": block_gpu.TILE}),
    ("rotation", {"SAME": True, "HEADS": 32, "HALF": 64})])
def test_they_compile_for_every_generation_and_read_many_numbers_at_once(name: str, sizes: dict[str, Any],
                                                                         capability: int) -> None:
    pytest.importorskip("triton", reason=WITHOUT_TRITON)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minilora.kernels import block_triton

    function = getattr(block_triton, name)
    counts = ("n", "heads", "length", "x_batch", "x_head", "x_row")
    signature = {argument: "constexpr" if argument in sizes else "i32" if argument in counts else "*bf16"
                 for argument in function.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind != "constexpr"}
    ptx = triton.compile(ASTSource(function, signature, sizes, aligned), target=GPUTarget("cuda", capability, 32),
                         options=gpu.OPTIONS).asm["ptx"]
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx and ".ftz" not in ptx


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: what machine code computes is seen on one")
@EACH_FLOAT
def test_on_a_gpu_they_give_the_formulas_numbers(dtype: torch.dtype) -> None:
    device = torch.zeros(1, device="cuda").device
    kernel = block_gpu.kernel(device)
    assert kernel is not None
    gate, up, grad = (normal(300, 11008, seed=i).to(device, dtype) for i in range(3))
    assert block_gpu.takes_rows(gate, up)
    assert_rounded_once(kernel.swiglu(gate, up), F.silu(gate.double()) * up.double())
    assert_rounded_once(kernel.swiglu_backward(grad, gate, up)[1], F.silu(gate.double()) * grad.double())
    x = normal(2, 512, 32, 128).to(device, dtype).transpose(1, 2)
    cos, sin = (normal(1, 1, 512, 64, seed=i).repeat(1, 1, 1, 2).to(device, dtype) for i in (3, 4))
    assert block_gpu.takes_rotation(x, cos, sin)
    assert_rotated(kernel.rotation(x, cos, sin), x, cos, sin)


def test_without_triton_torch_is_used_and_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_gpu, "_tried", {})
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("block_triton", "nf4_triton", "product_triton"):
        monkeypatch.delitem(sys.modules, f"minilora.kernels.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)           # where another test imported it
    with pytest.warns(RuntimeWarning, match=r"torch's operations on the GPU: .*triton") as caught:
        assert [block_gpu.kernel(torch.device("cuda", index)) for index in (0, 1, 0)] == [None] * 3
    assert len(caught) == 1
    monkeypatch.setattr(block_gpu, "_tried", {})
    monkeypatch.setenv("MINILORA_KERNELS", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert block_gpu.kernel(torch.device("cuda", 0)) is None
