"""The Triton kernels as machine code: compiled for GPUs that need not be here, and run on one that is.

The interpreter (test_gpu.py) shows what a kernel computes as it is written; a compiler may fuse operations, round otherwise, or
ask for more memory than a GPU has.
"""
from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minilora import NF4Linear, quantize_nf4
from minilora.kernels import gpu, reference
from minilora.kernels.cpu import Constants
from minilora.layers import nf4_linear
from minilora.quant import nf4
from minilora.quant.codebooks import DYNAMIC_8BIT, NF4_CODE
from tests.kernels.interpreter import WITHOUT_TRITON
from tests.kernels.test_equal_bits import FLOATS, same_bits
from tests.kernels.test_gpu import (
    FORWARD_AND_BACK,
    error_in_units_of_the_bound,
    multiplied,
    normal,
    product,
    same_step,
    step,
)
from tests.models import write_model

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Shared memory that a program may have: of each generation the GPUs with the least (CUDA C++ programming guide, "Compute
# capabilities"): Turing; Ampere and Ada; Hopper; Blackwell.
SHARED_BYTES = {75: 64 << 10, 86: 99 << 10, 90: 227 << 10, 120: 99 << 10}
HALVES, SINGLES = torch.bfloat16, torch.float32
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: what machine code computes is seen on one")
EVERY_GENERATION = pytest.mark.parametrize("capability", [75, 80, 90, 120])


def compiled(name: str, dtype: torch.dtype, capability: int = 80, *, fusion: bool = gpu.OPTIONS["enable_fp_fusion"],
             stages: int = 3, warps: int = 4, **sizes: Any) -> Any:
    """A kernel's machine code for a GPU of that compute capability; the numbers among `sizes` are compiled in."""
    pytest.importorskip("triton", reason=WITHOUT_TRITON)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minilora.kernels import product_triton

    function = getattr(product_triton, name)
    words = sizes.get("RUN", 32) >= 8 and not sizes.get("SHORT")
    sizes = {"BLOCKSIZE": 64, "NESTED": 256, "WORDS": words, "SHUFFLED": True, "PARTS": 1, "DIRECT": dtype != SINGLES,
             "EVEN": True, **sizes}
    sizes = {name: size for name, size in sizes.items() if name in function.arg_names}
    kinds = {**dict.fromkeys(("out", "x", "y"), f"*{NAMES[dtype]}"), "packed": "*u8", "offset": "fp32", "n": "i64",
             "constants": "*u8" if sizes["NESTED"] else "*fp32",
             **dict.fromkeys(("rows", "out_features", "in_features"), "i32")}
    signature = {name: "constexpr" if name in sizes else kinds.get(name, "*fp32") for name in function.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, (name, kind) in enumerate(signature.items())
               if kind.startswith("*") or (name.endswith("_features") and kind == "i32")}
    return triton.compile(ASTSource(function, signature, sizes, aligned), target=GPUTarget("cuda", capability, 32),
                          options={"enable_fp_fusion": fusion, "num_stages": stages, "num_warps": warps})


def dequantize(dtype: torch.dtype, capability: int, **options: Any) -> Any:
    return compiled("dequantize", dtype, capability, **{"RUN": 64, "SHORT": False, "TILE": gpu.TILE, **options})


def row_product(dtype: torch.dtype, capability: int, **options: Any) -> Any:
    return compiled("row_product", dtype, capability, warps=1, **{"RUN": 64, "BIAS": True, "OUT": 2, "IN": 1024, **options})


def operand_product(capability: int, rows: int = 16, dtype: torch.dtype = torch.bfloat16) -> Any:
    return compiled("operand_product", dtype, capability, warps=gpu.OPERAND_WARPS, stages=1, BIAS=False,
                    WARPS=gpu.OPERAND_WARPS, ROWS=rows, OUT=gpu.OPERAND_OUT)


@EVERY_GENERATION
def test_only_what_says_so_is_fused_with_an_addition(capability: int) -> None:
    assert re.search(r"\bFFMA", dequantize(torch.float32, capability, fusion=True).asm["sass"]), "what to look for"
    for dtype in FLOATS:
        unpacking, row = dequantize(dtype, capability), row_product(dtype, capability)
        assert not re.search(r"\bFFMA", unpacking.asm["sass"])
        single, double = (len(re.findall(rf"\bfma\.rn\.f32{pair} ", row.asm["ptx"])) for pair in ("", "x2"))
        assert single + 2 * double == 2 * 1024 // 32, "one for each weight of a thread, and none for constants"
        for code in (unpacking, row):
            assert ".ftz" not in code.asm["ptx"], "numbers below 1.2e-38 would become zero"


@EVERY_GENERATION
def test_a_level_is_asked_of_another_thread_of_the_warp(capability: int) -> None:
    for code in (dequantize(torch.bfloat16, capability), row_product(torch.bfloat16, capability), operand_product(capability)):
        assert code.asm["ptx"].count("shfl.sync.idx") >= 32
        assert code.asm["ptx"].count("ld.global.nc.f32") == 1, "a thread reads its own level once"


class Launch:
    """Stands in the place of Triton's functions, and keeps what a launch was told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Launch:
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Launch:
        return self

    def __call__(self, *arguments: Any, **sizes: Any) -> None:
        self.told = sizes


def test_each_launch_says_that_nothing_may_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason=WITHOUT_TRITON)
    kernel, launch = gpu.Kernel(), Launch()
    monkeypatch.setattr(kernel, "_programs", launch)
    q = quantize_nf4(normal(8, 64))
    for call in (lambda: kernel.dequantize(*q.for_kernel(), torch.empty(8, 64)), lambda: product(kernel, q, normal(1, 64)),
                 lambda: product(kernel, q, normal(2, 64)), lambda: product(kernel, q, normal(2, 8), transposed=True)):
        launch.told = {}
        call()
        assert launch.told["enable_fp_fusion"] is False


@EVERY_GENERATION
def test_bfloat16_is_rounded_to_nearest(capability: int) -> None:
    ptx = dequantize(torch.bfloat16, capability).asm["ptx"]
    if capability >= 80:
        assert "cvt.rn.bf16" in ptx and "cvt.rz" not in ptx
    else:                           # no such instruction: half a step is added, less one where the last bit kept is even
        assert ptx.count(", 32767;") == ptx.count("setp.nan.f32") == gpu.TILE // 128


def test_codes_are_read_sixteen_bytes_at_a_time() -> None:
    assert "ld.global.v4.b32" in dequantize(torch.bfloat16, 80).asm["ptx"]
    assert "ld.global.v4.b32" in row_product(torch.bfloat16, 80).asm["ptx"]
    assert operand_product(80).asm["ptx"].count("ld.global.v4.b32") >= 2


@FORWARD_AND_BACK
@pytest.mark.parametrize(("capability", "dtype", "run", "rows"), [
    *((86, HALVES, run, rows) for run in (64, 1) for rows in (16, 32, 64, 128)),
    *((86, SINGLES, run, rows) for run in (64, 1) for rows in (16, 32, 64)),
    (86, HALVES, 2, 32), (75, HALVES, 64, 1), (75, SINGLES, 64, 32), (75, SINGLES, 1, 32),
    *((capability, HALVES, 64, rows) for capability in (90, 120) for rows in (16, 128))])
def test_products_fit_into_the_memory_of_a_program(monkeypatch: pytest.MonkeyPatch, capability: int, dtype: torch.dtype,
                                                   run: int, rows: int, transposed: bool) -> None:
    """Launched over a weight whose runs are that long, and compiled as the launch says."""
    pytest.importorskip("triton", reason=WITHOUT_TRITON)
    kernel, launch = gpu.Kernel(), Launch()
    monkeypatch.setattr(kernel, "_programs", launch)
    q = quantize_nf4(normal(64, 64), blocksize={64: 64, 2: 6, 1: 7}[run])
    x = normal(rows, 64).to(dtype)
    weight = gpu._weight(*q.for_kernel(), 64 * 64, x.device)
    kernel._product(x, torch.empty(rows, 64, dtype=dtype), None, 64, 64, *weight, transposed)
    told = dict(launch.told)
    assert told["RUN"] == (min(run, told["IN"])), "the case that was meant"
    code = compiled("product", dtype, capability, fusion=told.pop("enable_fp_fusion"), stages=told.pop("num_stages"), **told)
    assert code.metadata.shared <= SHARED_BYTES[capability]
    assert "tf32" not in code.asm["ptx"], "float32 would lose thirteen bits"
    tensor_cores = re.search(r"mma(_async)?\.sync", code.asm["ptx"]) is not None
    assert tensor_cores == (dtype != torch.float32 and capability >= 80), "`gpu.TENSOR_CORES` says where there are any"


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_a_weight_goes_from_its_codes_to_hoppers_tensor_cores_in_one_thread(rows: int) -> None:
    """Older and newer ones take it so for a few rows, where Triton is 3.9 or later."""
    code = operand_product(90, rows)
    of_x, of_w = 2 * rows * gpu.OPERAND_COLUMNS, 2 * gpu.OPERAND_OUT * gpu.OPERAND_COLUMNS
    assert code.metadata.shared <= of_x + of_w // 8, "x and a few constants, and nothing of W, lie in shared memory"
    assert "wgmma.mma_async" in code.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 86, 90, 120])
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_operands_that_are_exchanged_after_all_fit_into_the_memory_of_a_program(capability: int, rows: int) -> None:
    assert operand_product(capability, rows).metadata.shared <= SHARED_BYTES[86 if capability == 80 else capability]


def test_of_one_row_a_thread_reads_its_own_elements() -> None:
    """Beside the levels only what sums up two rows over a warp goes between threads."""
    def exchanges(dtype: torch.dtype, direct: bool) -> int:
        return len(re.findall(r"\b(?:SHFL|LDS|STS)\b", row_product(dtype, 90, DIRECT=direct).asm["sass"])) - 64

    for dtype in (torch.bfloat16, torch.float16):
        assert exchanges(dtype, True) <= 16 < exchanges(dtype, False)


@pytest.mark.parametrize("ones", [{"in_features": 1}, {"out_features": 1}, {"in_features": 1, "out_features": 1}])
def test_a_size_of_one_is_compiled_in(ones: dict[str, int]) -> None:
    """Triton makes such an argument part of the code, where it is no longer a tensor."""
    run = 1 if "in_features" in ones else 32
    for transposed in (False, True):
        assert compiled("product", torch.bfloat16, RUN=run, BIAS=not transposed, TRANSPOSED=transposed, ROWS=16,
                        OUT=128 if transposed else 64, IN=64 if transposed else 128, stages=1, **ones).asm["cubin"]
    if run > 1:                     # codes that can't be read as words take `product`
        assert row_product(torch.bfloat16, 80, RUN=run, OUT=64, IN=64, **ones).asm["cubin"]
    assert dequantize(torch.bfloat16, 80, SHORT=True, n=1).asm["cubin"]


# What follows needs a GPU, and is one kind of evidence more: the same comparisons at the sizes of real models.

DEVICE = torch.device("cuda")
LAYERS = [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 8192), (1000, 333), (40, 96)]


@pytest.fixture
def on_a_gpu() -> gpu.Kernel:
    """The kernels of the GPU, which have passed `prove`: a warning that they did not is an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="4-bit weights take the slow path")
        made = gpu.kernel(torch.zeros(1, device=DEVICE).device)
    assert made is not None
    return made


@ON_A_GPU
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", LAYERS)
def test_weights_on_a_gpu_have_the_bits_of_the_cpu(on_a_gpu: gpu.Kernel, shape: tuple[int, int], double_quant: bool) -> None:
    q = quantize_nf4(normal(*shape), double_quant=double_quant)
    there = q.to(DEVICE)
    for dtype in FLOATS:
        expected = torch.empty(shape, dtype=dtype)
        reference.dequantize_packed(q.packed, q.absmax, NF4_CODE, q.blocksize, expected.view(-1))
        assert same_bits(there.dequantize(dtype).cpu(), expected)
        around = torch.full((expected.numel() + 100,), 7.0, dtype=dtype, device=DEVICE)
        there.dequantize(out=around[50:-50].view(shape))
        assert same_bits(around[50:-50].view(shape).cpu(), expected), "into a buffer that begins anywhere"
        assert (around[:50] == 7).all() and (around[-50:] == 7).all()


@ON_A_GPU
@pytest.mark.parametrize("shape", LAYERS)
def test_products_on_a_gpu_lie_within_their_bound(on_a_gpu: gpu.Kernel, shape: tuple[int, int]) -> None:
    q = quantize_nf4(normal(*shape)).to(DEVICE)
    for dtype in FLOATS:
        for transposed in (False, True):
            bias = None if transposed else normal(shape[0], seed=2).to(DEVICE)
            for rows in (1, 2, 16, 31, 64, 128):
                w = multiplied(q, dtype, rows, transposed)
                x = normal(rows, w.shape[1], seed=1).to(DEVICE, dtype)
                y = product(on_a_gpu, q, x, transposed, bias)
                worst = error_in_units_of_the_bound(w, x, y, bias)
                assert worst <= 1, f"{dtype}, {rows} rows, {transposed=}: off by {worst:.2f} times the bound"
                assert torch.equal(y, product(on_a_gpu, q, x, transposed, bias)), "the same sums every time"


@ON_A_GPU
def test_offsets_past_32_bits_reach_the_last_element(on_a_gpu: gpu.Kernel) -> None:
    out_features, in_features = (1 << 20) + 3, 4096                         # 4.3 billion weights: 2.1 GB packed, 8.6 unpacked
    if torch.cuda.mem_get_info()[0] < 14e9:
        pytest.skip("this GPU has less than 14 GB free")
    packed = torch.randint(0, 256, (out_features * in_features // 2,), dtype=torch.uint8, device=DEVICE)
    blocks = out_features * in_features // 64
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=DEVICE)
    nested = torch.rand(-(-blocks // 256), device=DEVICE)
    constants = Constants(None, codes, DYNAMIC_8BIT.to(DEVICE), nested, 0.5)
    weight = packed, constants, NF4_CODE.to(DEVICE), 64
    w = on_a_gpu.dequantize(*weight, torch.empty(out_features, in_features, dtype=torch.bfloat16, device=DEVICE))
    first = (out_features - 5) * in_features                                # a block begins there
    blocks_before = first // 64
    absmax = DYNAMIC_8BIT[codes[blocks_before:].cpu().int()] * nested.repeat_interleave(256)[blocks_before:blocks].cpu() + 0.5
    expected = torch.empty(5, in_features, dtype=torch.bfloat16)
    reference.dequantize_packed(packed[first // 2 :].cpu(), absmax, NF4_CODE, 64, expected.view(-1))
    assert torch.equal(w[-5:].cpu(), expected)
    unit = torch.zeros(16, in_features, dtype=torch.bfloat16, device=DEVICE)
    unit[:, 7] = 1
    for x in (unit, unit[:1].contiguous()):
        assert torch.equal(on_a_gpu.product(x, *weight, out_features)[-1, -5:].cpu(), expected[:, 7])


@ON_A_GPU
def test_a_layer_on_a_gpu_takes_the_kernels_in_both_directions(on_a_gpu: gpu.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    original = gpu.Kernel._launch

    def counted(self: gpu.Kernel, name: str, *arguments: Any, **sizes: Any) -> None:
        if name != "add_parts":
            launched.append(name)
        original(self, name, *arguments, **sizes)

    monkeypatch.setattr(gpu.Kernel, "_launch", counted)
    layer = NF4Linear(quantize_nf4(normal(1024, 2048)), normal(1024, seed=3)).to(DEVICE)
    w = layer.dense_weight(torch.float32)
    many = gpu.FUSED_ROWS[HALVES] + 1
    for rows, dtype, names in ((1, SINGLES, ["row_product", "product"]), (2, SINGLES, ["dequantize"] * 2),
                               (16, HALVES, ["operand_product", "product"]), (many, HALVES, ["dequantize"] * 2)):
        launched.clear()
        x = normal(rows, 2048, seed=1).to(DEVICE, dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.ones_like(y))
        assert launched == names
        close = {"rtol": 1e-4, "atol": 1e-3} if dtype == SINGLES else {"rtol": 2e-2, "atol": 1.0}     # sums of 2048 roundings
        assert torch.allclose(y.float(), F.linear(x.float(), w, layer.bias), **close)
        assert torch.allclose(x.grad.float(), torch.ones_like(y).float() @ w, **close)


@ON_A_GPU
def test_quantizing_on_a_gpu_gives_the_bytes_of_the_cpu(on_a_gpu: gpu.Kernel) -> None:
    w = normal(1000, 333)
    here, there = quantize_nf4(w), quantize_nf4(w.to(DEVICE))
    assert torch.equal(there.packed.cpu(), here.packed)
    assert torch.equal(quantize_nf4(w.to(DEVICE), double_quant=False).absmax.cpu(), quantize_nf4(w, double_quant=False).absmax)
    assert nf4._tables(there.device)[0].device == there.device


@ON_A_GPU
def test_a_step_of_training_on_a_gpu_is_that_on_the_cpu(on_a_gpu: gpu.Kernel, monkeypatch: pytest.MonkeyPatch,
                                                        tmp_path: Path) -> None:
    monkeypatch.setattr(nf4_linear, "FUSED_WEIGHTS", 0)
    write_model(tmp_path / "model")
    same_step(step(tmp_path / "model", "cuda"), step(tmp_path / "model", "cpu"))
