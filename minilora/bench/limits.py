"""What the hardware at hand allows: the speed of filling, copying and reading memory, and of torch's own products.

Beside a figure this says how much there is left to gain.  Measured once a process, on buffers of the size in question.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from minilora.bench.rows import Row, Settings
from minilora.layers import dense
from minilora.llama.config import LlamaConfig, linear_parameters

BUFFER_BYTES = 256 << 20        # several times any cache
SIDE = 2048                     # of the square matrices


def seconds(call: Callable[[], object], rounds: int = 9) -> float:
    """Median of several calls after a warm-up."""
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


@cache
def bytes_per_second(how: str) -> float:
    """Of filling a buffer, of copying it (bytes read, and as many written), or of reading it."""
    buffer = torch.zeros(BUFFER_BYTES // 4)
    calls: dict[str, Callable[[], object]] = {
        "fill": partial(buffer.fill_, 1.0), "copy": partial(torch.empty_like(buffer).copy_, buffer), "read": buffer.sum}
    return BUFFER_BYTES / seconds(calls[how])


@cache
def operations_per_second(dtype: torch.dtype) -> float:
    """Multiplications and additions of a large product: torch's, or where those of 16 bits are slower, float32's."""
    a, b = torch.ones(SIDE, SIDE, dtype=dtype), torch.ones(SIDE, SIDE, dtype=dtype)
    return 2 * SIDE ** 3 / seconds(partial(dense.linear, a, b))


def forward_operations(config: LlamaConfig, tokens: int) -> int:
    """Of a model's linears, the head left out."""
    return 2 * linear_parameters(config) * tokens


def machine(_: Settings) -> Iterator[Row]:
    """The limits themselves."""
    for how in ("fill", "copy", "read"):
        yield Row(f"machine_{how}", "GB/s", bytes_per_second(how) / 1e9)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        yield Row(f"machine_matmul_{name}", "TFLOP/s", operations_per_second(dtype) / 1e12)
