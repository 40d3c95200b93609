"""The Triton kernels in the interpreter, and every way to and around them (compiled, and on a GPU: test_gpu_compiled.py)."""
from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora import NF4Linear, kernels, quantize_nf4
from minilora.kernels import cpu, gpu, reference
from minilora.kernels.cpu import Constants
from minilora.layers import nf4_linear
from minilora.quant import nf4
from minilora.quant.codebooks import DYNAMIC_8BIT, NF4_CODE
from minilora.quant.nf4 import NF4Tensor
from tests.kernels.interpreter import WITHOUT_TRITON, InterpretedKernel, running
from tests.kernels.test_equal_bits import FLOATS, anything, by_reference, generator, same_bits
from tests.models import write_model

sizes = st.one_of(st.integers(1, 300), st.sampled_from((4095, 4096, 4097, 8192 + 31)))
blocksizes = st.one_of(st.sampled_from((1, 2, 3, 16, 31, 32, 64, 96, 128, 4096, 1 << 50)), st.integers(1, 300))
SHAPES = [(1, 64), (5, 128), (40, 96), (33, 1500), (9, 33), (6, 1), (64, 640), (130, 256)]
ROWS = (1, 2, 16, 17, 33, 65, 129)
HALF_A_STEP = {torch.float32: 2.0 ** -24, torch.bfloat16: 2.0 ** -8, torch.float16: 2.0 ** -11}
FORWARD_AND_BACK = pytest.mark.parametrize("transposed", [False, True])
EACH_FLOAT = pytest.mark.parametrize("dtype", FLOATS)


@pytest.fixture(scope="session")
def interpreted() -> Iterator[InterpretedKernel]:
    yield from running(InterpretedKernel)


@pytest.fixture
def in_place_of_the_cpus(interpreted: InterpretedKernel, monkeypatch: pytest.MonkeyPatch) -> InterpretedKernel:
    """The package takes the Triton kernels for tensors on the CPU, for layers of any size."""
    monkeypatch.setattr(cpu, "kernel", lambda: interpreted)
    monkeypatch.setattr(nf4_linear, "FUSED_WEIGHTS", 0)
    interpreted.launched.clear()
    return interpreted


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def product(kernel: gpu.Kernel, q: NF4Tensor, x: torch.Tensor, transposed: bool = False,
            bias: torch.Tensor | None = None) -> torch.Tensor:
    weight = q.for_kernel()
    return kernel.product_transposed(x, *weight, q.shape[1]) if transposed else kernel.product(x, *weight, q.shape[0], bias)


def multiplied(q: NF4Tensor, dtype: torch.dtype, rows: int, transposed: bool) -> torch.Tensor:
    """The weight that meets so many rows of x: that of one row is not rounded to x's type."""
    return q.dequantize(dtype).T if transposed else q.dequantize(torch.float32 if rows == 1 else dtype)


def error_in_units_of_the_bound(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """|y − y*| over the bound that `Kernel.product` states and one rounding to y's type; y* is x wᵀ + b in float64."""
    exact, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    cut = 1 if y.dtype == torch.float32 or len(x) == 1 else 4
    sums, last = cut * (x.shape[1] + 3) * 2.0 ** -24 * size, HALF_A_STEP[y.dtype]
    smallest = 2.0 ** -25 if y.dtype == torch.float16 else 1e-36           # half a step of its subnormals
    return float(((y.double() - exact).abs() / (sums * (1 + last) + last * exact.abs() + smallest)).max())


@settings(max_examples=60)
@given(n=sizes, blocksize=blocksizes, nested=st.sampled_from((None, 1, 3, 256, 257)), dtype=st.sampled_from(FLOATS),
       offset=st.floats(-1, 1, width=32), seed=st.integers(0, 99))
def test_unpacked_weights_equal_the_reference_to_the_bit(interpreted: InterpretedKernel, n: int, blocksize: int,
                                                         nested: int | None, dtype: torch.dtype, offset: float,
                                                         seed: int) -> None:
    blocks = -(-n // blocksize)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator(seed))
    if nested is None:
        absmax = normal(blocks, seed=seed).abs()
        constants = Constants(absmax)
    else:
        codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator(seed))
        scales = torch.rand(-(-blocks // nested), generator=generator(seed))
        absmax = reference.dequantize_blocks(codes, scales, DYNAMIC_8BIT, nested) + offset
        constants = Constants(None, codes, DYNAMIC_8BIT, scales, offset, nested)
    ours = interpreted.dequantize(packed, constants, NF4_CODE, blocksize, torch.full((n,), 7.0, dtype=dtype))
    assert same_bits(ours, by_reference(packed, absmax, NF4_CODE, blocksize, n, dtype))


@settings(max_examples=40)
@given(code=st.lists(anything, min_size=16, max_size=16), absmax=st.one_of(st.sampled_from((0.0, 1.0, 1e-38, 1e-45)), anything),
       dtype=st.sampled_from(FLOATS))
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_every_float32_is_rounded_as_torch_rounds_it(interpreted: InterpretedKernel, code: list[float], absmax: float,
                                                     dtype: torch.dtype) -> None:
    table, constant = torch.tensor(code), torch.tensor([absmax])
    packed = torch.arange(256, dtype=torch.uint8)[17:170].contiguous()
    ours = interpreted.dequantize(packed, Constants(constant), table, 1 << 40, torch.empty(305, dtype=dtype))
    assert same_bits(ours, by_reference(packed, constant, table, 1 << 40, 305, dtype))


def test_nothing_is_written_behind_the_last_element(interpreted: InterpretedKernel) -> None:
    for n, blocksize in ((1, 64), (33, 7), (100, 64), (4097, 64)):
        q = quantize_nf4(normal(n), blocksize)
        around = torch.full((n + 100,), 7.0)
        interpreted.dequantize(q.packed, q._constants(), NF4_CODE, blocksize, around[50 : 50 + n])
        assert torch.equal(around[50 : 50 + n], q.dequantize()) and (around[:50] == 7).all() and (around[50 + n :] == 7).all()


@settings(max_examples=60)
@given(shape=st.sampled_from(SHAPES), rows=st.sampled_from(ROWS), blocksize=st.sampled_from((7, 32, 64, 96, 128, 4096)),
       double_quant=st.booleans(), biased=st.booleans(), transposed=st.booleans(), dtype=st.sampled_from(FLOATS))
def test_products_lie_within_the_rounding_of_their_sums(interpreted: InterpretedKernel, shape: tuple[int, int], rows: int,
                                                        blocksize: int, double_quant: bool, biased: bool, transposed: bool,
                                                        dtype: torch.dtype) -> None:
    q = quantize_nf4(normal(*shape), blocksize, double_quant)
    w = multiplied(q, dtype, rows, transposed)
    x = normal(rows, w.shape[1], seed=1).to(dtype)
    bias = normal(shape[0], seed=2) if biased and not transposed else None
    y = product(interpreted, q, x, transposed, bias)
    assert y.shape == (rows, w.shape[0]) and y.dtype == dtype
    worst = error_in_units_of_the_bound(w, x, y, bias)
    assert worst <= 1, f"off by {worst:.2f} times the bound"


@EACH_FLOAT
@FORWARD_AND_BACK
def test_each_weight_meets_its_own_element_of_x(interpreted: InterpretedKernel, transposed: bool, dtype: torch.dtype) -> None:
    """x is a unit vector, so every sum is one weight: exact, whatever its order."""
    for out, columns, blocksize in ((40, 130, 64), (7, 256, 64), (70, 33, 16), (3, 96, 5)):
        q = quantize_nf4(normal(out, columns), blocksize)
        w = q.dequantize(dtype) if transposed else q.dequantize(dtype).T
        unit = torch.eye(len(w), dtype=dtype)
        assert torch.equal(product(interpreted, q, unit, transposed), w)
        for rows, first in ((1, 0), (1, len(w) - 1), (2, 1)):
            assert torch.equal(product(interpreted, q, unit[first : first + rows].contiguous(), transposed),
                               w[first : first + rows])


@EACH_FLOAT
@FORWARD_AND_BACK
def test_infinities_and_nan_in_x_reach_their_own_rows_only(interpreted: InterpretedKernel, transposed: bool,
                                                           dtype: torch.dtype) -> None:
    q = quantize_nf4(normal(72, 130))
    for value in (float("nan"), float("inf")):
        x = normal(20, 72 if transposed else 130, seed=1).to(dtype)
        x[1, 71] = value
        y = product(interpreted, q, x, transposed)
        assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2:].isfinite().all()


def test_the_choice_of_tiles_covers_every_row_and_is_counted_in_powers_of_two() -> None:
    for rows in range(1, 300):
        for dtype in FLOATS:
            for transposed in (False, True):
                tile = gpu.tiles(rows, dtype, transposed)
                assert min(rows, 64 if dtype == torch.float32 else 128) <= tile.rows
                assert all(size & (size - 1) == 0 and size >= 16 for size in tile)


def test_sums_are_cut_into_parts_only_where_programs_are_few_and_steps_enough() -> None:
    assert gpu.parts_of(programs=1, enough=1024, steps=86) == gpu.MOST_PARTS
    assert gpu.parts_of(programs=1, enough=1024, steps=3) == 3
    assert gpu.parts_of(programs=86, enough=256, steps=32) == 3, "258 programs"
    parts = [gpu.parts_of(programs, 256, steps) for programs in (0, 1, 64, 172, 256, 5000) for steps in (1, 32)]
    assert min(parts) == 1 and max(parts) == gpu.MOST_PARTS


@pytest.mark.parametrize(("sizes", "expected"), [((64,), 64), ((4096, 11008), 64), ((96, 4096), 32), ((7, 64), 1),
                                                 ((64, 33), 1), ((1 << 50,), 64), ((6, 10), 2)])
def test_a_run_is_the_largest_power_of_two_that_divides_all(sizes: tuple[int, ...], expected: int) -> None:
    assert gpu.run_length(*sizes) == expected


def test_wrong_types_sizes_gaps_and_devices_are_refused_before_a_kernel_sees_them(interpreted: InterpretedKernel) -> None:
    packed, absmax, out, x = torch.zeros(32, dtype=torch.uint8), Constants(torch.ones(1)), torch.empty(64), torch.ones(2, 8)
    codes, nested = torch.zeros(1, dtype=torch.uint8), torch.ones(1)
    launches = dict(interpreted.launched)
    for bad in (lambda: interpreted.dequantize(packed.int(), absmax, NF4_CODE, 64, out),
                lambda: interpreted.dequantize(packed, Constants(torch.ones(1).double()), NF4_CODE, 64, out),
                lambda: interpreted.dequantize(packed, Constants(torch.ones(2)), NF4_CODE, 64, out),
                lambda: interpreted.dequantize(packed, absmax, NF4_CODE[:15], 64, out),
                lambda: interpreted.dequantize(packed, absmax, NF4_CODE, 64, torch.empty(64, 2)[:, 0]),
                lambda: interpreted.dequantize(packed, absmax, NF4_CODE, 64, torch.empty(66)),
                lambda: interpreted.dequantize(packed, absmax, NF4_CODE, 64, torch.empty(64, dtype=torch.float64)),
                lambda: interpreted.dequantize(packed, absmax, NF4_CODE, 64, torch.empty(64, device="meta")),
                lambda: interpreted.dequantize(packed, Constants(None, codes, DYNAMIC_8BIT[:9], nested), NF4_CODE, 64, out),
                lambda: interpreted.dequantize(packed, Constants(None, codes, DYNAMIC_8BIT, torch.ones(2)), NF4_CODE, 64, out),
                lambda: interpreted.product(x.double(), packed, absmax, NF4_CODE, 64, 8),
                lambda: interpreted.product(x, packed, absmax, NF4_CODE, 64, 8, torch.ones(7)),
                lambda: interpreted.product(x, packed, absmax, NF4_CODE, 64, 9),
                lambda: interpreted.product_transposed(x.T.contiguous().T, packed, absmax, NF4_CODE, 64, 8)):
        with pytest.raises(ValueError, match="the kernel takes"):
            bad()
    with pytest.raises(ValueError, match="found neither"):
        interpreted.dequantize(packed, Constants(), NF4_CODE, 64, out)
    assert interpreted.launched == launches


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_the_layer_takes_the_kernels_forward_and_back(in_place_of_the_cpus: InterpretedKernel, rows: int,
                                                      double_quant: bool) -> None:
    layer = NF4Linear(quantize_nf4(normal(40, 96), 32, double_quant), normal(40, seed=3))
    x = normal(rows, 96, seed=1).bfloat16().requires_grad_()
    y = layer(x)
    y.backward(normal(rows, 40, seed=2).bfloat16())
    # Above some rows the weight is unpacked for torch's product, here as well as on the way back.
    expected = {1: {"row_product": 1, "product": 1}, 5: {"operand_product": 1, "product": 1}, 200: {"dequantize": 2}}
    assert in_place_of_the_cpus.launched == expected[rows]
    grad = normal(rows, 40, seed=2).bfloat16()
    forward, back = (multiplied(layer.quantized, torch.bfloat16, rows, transposed) for transposed in (False, True))
    assert error_in_units_of_the_bound(forward, x.detach(), y.detach(), layer.bias.bfloat16().float()) <= 1
    assert error_in_units_of_the_bound(back, grad, x.grad) <= 1


def step(folder: Path, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    """A step of QLoRA over a small Llama: its loss, and the gradient of every adapter."""
    model = minilora.load_model(folder, quantize="nf4", dtype=torch.float32)
    minilora.add_lora(model, minilora.LoRAConfig(r=4, alpha=8), torch.Generator().manual_seed(0))
    for name, param in model.named_parameters():
        if "lora_B" in name:        # starts at zero, where no gradient would reach A
            param.data = normal(*param.shape, seed=len(name)).mul_(0.1)
    model.to(device)
    tokens = torch.randint(0, 250, (2, 9), generator=generator(0)).to(device)
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return float(loss.detach()), {name: param.grad.cpu() for name, param in model.named_parameters() if param.grad is not None}


def same_step(ours: tuple[float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and ours[1].keys() == theirs[1].keys() and len(ours[1]) == 28
    for name, grad in theirs[1].items():
        assert grad.abs().max() > 0 and (ours[1][name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_a_step_of_training_is_that_of_the_reference(in_place_of_the_cpus: InterpretedKernel, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    ours = step(tmp_path / "model", "cpu")
    assert in_place_of_the_cpus.launched["product"] == 2 * 14 - 3      # nothing is before the first q, k and v
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "kernel", lambda: None)
        same_step(ours, step(tmp_path / "model", "cpu"))


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device was asked about yet; each has tensor cores."""
    monkeypatch.setattr(gpu, "_tried", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_only_tensors_on_a_gpu_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(gpu, "kernel", lambda device: asked.append(device) or "the kernels")
    monkeypatch.setattr(cpu, "kernel", lambda: "the CPU's")
    for dtype in FLOATS:
        assert nf4._kernel(torch.device("cuda", 1), dtype) == "the kernels" and asked.pop() == torch.device("cuda", 1)
        assert nf4._kernel(torch.device("cpu"), dtype) == "the CPU's" and nf4._kernel(torch.device("meta"), dtype) is None
    assert nf4._kernel(torch.device("cuda"), torch.float64) is None and not asked


def test_weights_on_another_device_bring_their_tables_along() -> None:
    code, dynamic = nf4._tables(torch.device("meta"))
    assert code.device.type == dynamic.device.type == "meta" and nf4._tables(torch.device("meta"))[0] is code
    with torch.inference_mode():
        assert not nf4._tables(torch.device("meta", 0))[0].is_inference()
    assert nf4._tables(torch.device("cpu"))[0] is NF4_CODE and nf4._tables(torch.device("cpu"))[1] is DYNAMIC_8BIT


@pytest.mark.usefixtures("untried")
def test_without_triton_the_reference_is_used_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("nf4_triton", "product_triton"):
        monkeypatch.delitem(sys.modules, f"minilora.kernels.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)           # where another test imported it
    with pytest.warns(RuntimeWarning, match=r"slow path in plain torch on the GPU: .*triton") as caught:
        assert [gpu.kernel(torch.device("cuda", index)) for index in (0, 1, 0)] == [None] * 3
    assert len(caught) == 1


@pytest.mark.usefixtures("untried")
def test_kernels_that_fail_or_give_other_bits_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_bits(*_: Any) -> None:
        raise RuntimeError("Triton's kernel does not give the reference's bits\nand more")

    monkeypatch.setattr(gpu, "Kernel", lambda tensor_cores: SimpleNamespace())
    monkeypatch.setattr(gpu, "prove", other_bits)
    with pytest.warns(RuntimeWarning, match="does not give the reference's bits$"):
        assert gpu.kernel(torch.device("cuda", 0)) is None

    def no_memory(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu, "prove", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        gpu.kernel(torch.device("cuda", 1))
    monkeypatch.setattr(gpu, "prove", lambda *_: None)
    assert gpu.kernel(torch.device("cuda", 1)) is not None, "one failure for want of memory is not the last word"


def test_the_proof_finds_a_fused_operation(interpreted: InterpretedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.prove(interpreted, torch.device("cpu"))
    original = InterpretedKernel._launch

    def fused(self: InterpretedKernel, name: str, grid: tuple[int, ...], out: torch.Tensor, *arguments: Any,
              **sizes: Any) -> None:
        """The constants with one rounding instead of two, as a fused multiply-add gives them."""
        n, packed, table, codes, dynamic, nested, offset = arguments
        once = (dynamic[codes.int()].double() * nested.repeat_interleave(256).double() + offset).float()
        original(self, name, grid, out, n, packed, table, once, table, table, 0.0, **{**sizes, "NESTED": 0})

    monkeypatch.setattr(InterpretedKernel, "_launch", fused)
    with pytest.raises(RuntimeError, match=r"bits in torch\.float32"):
        gpu.prove(interpreted, torch.device("cpu"))


@pytest.mark.parametrize("wrong", ["row_product", "operand_product", "product", "dequantize"])
def test_the_proof_finds_a_wrong_bit_of_each_kernel(interpreted: InterpretedKernel, monkeypatch: pytest.MonkeyPatch,
                                                    wrong: str) -> None:
    original = InterpretedKernel._launch

    def one_bit_off(self: InterpretedKernel, name: str, grid: tuple[int, ...], out: torch.Tensor, *arguments: Any,
                    **sizes: Any) -> None:
        original(self, name, grid, out, *arguments, **sizes)
        first = out.view(-1, *out.shape[-2:])[0]            # of the parts, or all there is
        if name == wrong and out.dtype == torch.bfloat16:
            first.view(torch.int16)[-1, -1] ^= 1
        elif name == wrong == "product":                    # the way back, in parts of float32: the same bit
            first.view(torch.int32)[-1, -1] ^= 1 << 16

    monkeypatch.setattr(InterpretedKernel, "_launch", one_bit_off)
    with pytest.raises(RuntimeError, match=r"bits in torch\.bfloat16"):
        gpu.prove(interpreted, torch.device("cpu"))


@pytest.mark.usefixtures("untried")
def test_the_reference_can_be_asked_for_and_then_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILORA_KERNELS", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.kernel(torch.device("cuda", 0)) is None


@pytest.mark.usefixtures("untried")
def test_a_gpu_without_tensor_cores_for_triton_unpacks_for_all_but_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason=WITHOUT_TRITON)
    monkeypatch.setattr(gpu, "prove", lambda *_: None)
    assert gpu.kernel(torch.device("cuda", 0)).fused_rows == gpu.FUSED_ROWS
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert gpu.kernel(torch.device("cuda", 1)).fused_rows == {torch.bfloat16: 1, torch.float16: 1, torch.float32: 1}


def test_nothing_of_triton_is_imported_for_the_cpu() -> None:
    call = """
import sys, torch, minilora
layer = minilora.NF4Linear.from_linear(torch.nn.Linear(1024, 1024))
layer(torch.randn(2, 1024, requires_grad=True)).sum().backward()
print("minilora.kernels.nf4_triton" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True).stdout.strip() == "False"
