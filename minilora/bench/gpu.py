"""The figures of the GPU kernels, measured on the GPU at hand: ours beside what the same GPU does without 4 bits, in turns.

    time     between two CUDA events, one before the call and one behind it; medians
    cold     before each call a buffer larger than every cache is cleared, as in a model each layer's weight comes from memory;
             while that runs the call is put into the queue, so that Python's time does not count (`launching` has that)

`crossing` is what `kernels.gpu.FUSED_ROWS` is to be set by.  Nothing was measured yet: no row has a limit.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.bench.kernels import LAYER
from minilora.bench.rows import Row, Settings
from minilora.kernels import gpu
from minilora.layers.nf4_linear import NF4Linear
from minilora.quant.nf4 import NF4Tensor, quantize_nf4

DEVICE = torch.device("cuda", 0)
CLEARED_BYTES = 1 << 30             # a third of a millisecond on the fastest GPUs: several times what Python takes for a call
WARM_UP = 3                         # the first call compiles
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def in_turns(ours: Callable[[], object], peer: Callable[[], object], rounds: int = 30) -> tuple[float, float]:
    """Median seconds on the GPU of each, called alternately with nothing in the caches."""
    cleared = torch.empty(CLEARED_BYTES, dtype=torch.uint8, device=DEVICE)
    events: tuple[list[tuple[torch.cuda.Event, torch.cuda.Event]], ...] = ([], [])
    for turn in range(WARM_UP + rounds):
        for side, call in enumerate((ours, peer)):
            before, behind = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cleared.zero_()
            before.record()
            call()
            behind.record()
            if turn >= WARM_UP:
                events[side].append((before, behind))
    torch.cuda.synchronize(DEVICE)
    seconds = [statistics.median(before.elapsed_time(behind) / 1e3 for before, behind in side) for side in events]
    return seconds[0], seconds[1]


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


def unpacking() -> Iterator[Row]:
    """A 7B model's largest layer out of 4 bits (ours), against copying as many bytes as that reads and writes (limit)."""
    weight = _weight(*LAYER)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        out = torch.empty(LAYER, dtype=dtype, device=DEVICE)
        source = torch.zeros((weight.nbytes + out.nbytes) // 2, dtype=torch.uint8, device=DEVICE)     # read, and written
        ours, limit = in_turns(partial(weight.dequantize, out=out), partial(torch.empty_like(source).copy_, source))
        yield Row(f"gpu_dequant_{name}", "s", ours, limit=limit, limit_is="copy")


def products() -> Iterator[Row]:
    """The same layer over rows of bfloat16 (ours), against its weight in bfloat16 (peer); then the way back."""
    layer = NF4Linear(_weight(*LAYER))
    dense = layer.dense_weight(torch.bfloat16)
    with torch.no_grad():
        for rows in (1, 16, 32, 128, 512):
            x = _normal(rows, LAYER[1]).to(DEVICE, torch.bfloat16)
            ours, peer = in_turns(partial(layer, x), partial(F.linear, x, dense))
            yield Row(f"gpu_linear_rows_{rows}", "s", ours, peer, peer / ours, against="dense")
    for rows in (16, 128, 512):
        x = _normal(rows, LAYER[1]).to(DEVICE, torch.bfloat16).requires_grad_()
        grad = _normal(rows, LAYER[0]).to(DEVICE, torch.bfloat16)
        back = partial(torch.autograd.grad, layer(x), x, grad, retain_graph=True)
        ours, peer = in_turns(back, partial(torch.matmul, grad, dense))
        yield Row(f"gpu_gradient_rows_{rows}", "s", ours, peer, peer / ours, against="dense")


def launching() -> Iterator[Row]:
    """What a call of a small layer costs Python (ours), against torch's own (peer): the floor of a token's time in decoding."""
    layer = NF4Linear(_weight(1024, 1024))
    dense = layer.dense_weight(torch.bfloat16)
    x = _normal(1, 1024).to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        ours, peer = host_seconds(partial(layer, x)), host_seconds(partial(F.linear, x, dense))
    yield Row("gpu_launch_rows_1", "s", ours, peer, peer / ours, against="dense")


def crossing() -> Iterator[Row]:
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


def gpu_kernels(_: Settings) -> Iterator[Row]:
    """All of these; no rows without a GPU."""
    if torch.cuda.is_available():
        for rows in (unpacking, products, launching, crossing):
            yield from rows()
