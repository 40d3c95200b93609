"""The figures of the GPU kernels, measured on the GPU at hand: ours beside what the same GPU does without 4 bits, in turns.

Times are those of `bench.events`, on the GPU alone; `launching` has what Python takes.  With peers, bitsandbytes unpacks the
same layer in a process of its own.  `crossing` is what `kernels.gpu.FUSED_ROWS` is set by.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.bench.events import WARM_UP, in_turns
from minilora.bench.kernels import LAYER, against_peer
from minilora.bench.rows import Row, Settings, Target
from minilora.bench.sides import Task
from minilora.kernels import gpu
from minilora.layers.nf4_linear import NF4Linear
from minilora.quant.nf4 import NF4Tensor, quantize_nf4

DEVICE = torch.device("cuda", 0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def host_seconds(call: Callable[[], object], calls: int = 200) -> float:
    """Seconds until Python has put a call into the GPU's queue, the mean of many."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize(DEVICE)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    taken = (time.perf_counter() - started) / calls
    torch.cuda.synchronize(DEVICE)
    return taken


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _weight(*shape: int) -> NF4Tensor:
    return quantize_nf4(_normal(*shape)).to(DEVICE)


def unpacking(settings: Settings) -> Iterator[Row]:
    """A 7B model's largest layer out of 4 bits, against copying as many bytes as that reads and writes (limit)."""
    weight = _weight(*LAYER)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        out = torch.empty(LAYER, dtype=dtype, device=DEVICE)
        source = torch.zeros((weight.nbytes + out.nbytes) // 2, dtype=torch.uint8, device=DEVICE)     # read, and written
        ours, limit = in_turns(partial(weight.dequantize, out=out), partial(torch.empty_like(source).copy_, source))
        row = Row(f"gpu_dequant_{name}", "s", ours, limit=limit, limit_is="copy",
                  targets=(Target("of copying", limit / ours, 0.8),))
        task = Task("unpack", shape=LAYER, dtype=str(dtype).removeprefix("torch."), device="cuda")
        yield against_peer(row, task, settings, 2.0)


def products(_: Settings) -> Iterator[Row]:
    """The same layer over rows of bfloat16 (ours), against its weight in bfloat16 (peer); then the way back."""
    layer = NF4Linear(_weight(*LAYER))
    dense = layer.dense_weight(torch.bfloat16)
    with torch.no_grad():
        for rows, least in ((1, 2.0), (4, 2.0), (16, 2.0), (32, 2.0), (128, None), (512, None)):
            x = _normal(rows, LAYER[1]).to(DEVICE, torch.bfloat16)
            ours, peer = in_turns(partial(layer, x), partial(F.linear, x, dense))
            yield Row(f"gpu_linear_rows_{rows}", "s", ours, peer, peer / ours, against="dense",
                      targets=() if least is None else (Target("times dense", peer / ours, least),))
    for rows in (16, 128, 512):
        x = _normal(rows, LAYER[1]).to(DEVICE, torch.bfloat16).requires_grad_()
        grad = _normal(rows, LAYER[0]).to(DEVICE, torch.bfloat16)
        back = partial(torch.autograd.grad, layer(x), x, grad, retain_graph=True)
        ours, peer = in_turns(back, partial(torch.matmul, grad, dense))
        yield Row(f"gpu_gradient_rows_{rows}", "s", ours, peer, peer / ours, against="dense")


def launching(_: Settings) -> Iterator[Row]:
    """What a call of a small layer costs Python (ours), against torch's own (peer): the floor of a token's time in decoding."""
    layer = NF4Linear(_weight(1024, 1024))
    dense = layer.dense_weight(torch.bfloat16)
    x = _normal(1, 1024).to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        ours, peer = host_seconds(partial(layer, x)), host_seconds(partial(F.linear, x, dense))
    yield Row("gpu_launch_rows_1", "s", ours, peer, peer / ours, against="dense")


def crossing(_: Settings) -> Iterator[Row]:
    """The product with the weight in registers (ours), against unpacking it for torch's product (peer), for more and more rows.

    `FUSED_ROWS` should be the last number of rows where the ratio is above 1.
    """
    kernel = gpu.kernel(DEVICE)
    if kernel is None:
        return
    weight = _weight(*LAYER)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for rows in ROWS:
            x = _normal(rows, LAYER[1]).to(DEVICE, dtype)
            fused = partial(kernel.product, x, *weight.for_kernel(), LAYER[0])
            ours, peer = in_turns(fused, partial(_unpacked, x, weight), rounds=10)
            yield Row(f"gpu_fused_{name}_rows_{rows}", "s", ours, peer, peer / ours, against="unpacked")


def _unpacked(x: Tensor, weight: NF4Tensor) -> Tensor:
    return F.linear(x, weight.dequantize(x.dtype))


def gpu_kernels(settings: Settings) -> Iterator[Row]:
    """All of these; no rows without a GPU."""
    if torch.cuda.is_available():
        for rows in (unpacking, products, launching, crossing):
            yield from rows(settings)
