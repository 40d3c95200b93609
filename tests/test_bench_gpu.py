"""The benchmarks of the GPU kernels compare like with like: run here with small layers, on the CPU, and no clock."""
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minilora.bench import events
from minilora.bench import gpu as bench_gpu
from minilora.bench.gpu_models import fitting
from minilora.bench.rows import Settings
from minilora.kernels import cpu, gpu, reference


def unpacked_product(x: torch.Tensor, packed: torch.Tensor, constants: cpu.Constants, code: torch.Tensor, blocksize: int,
                     out_features: int) -> torch.Tensor:
    """`Kernel.product` in plain torch."""
    assert constants.codes is not None and constants.nested is not None and constants.dynamic is not None
    absmax = reference.dequantize_blocks(constants.codes, constants.nested, constants.dynamic, constants.blocksize)
    w = torch.empty(out_features, x.shape[1], dtype=x.dtype)
    reference.dequantize_packed(packed, absmax + constants.offset, code, blocksize, w.view(-1))
    return x @ w.T


def test_the_longest_note_is_told_from_the_two_lengths_around_it() -> None:
    def peak(tokens: float) -> float:           # steep up to 4,096, slow behind
        return 6e9 + 3e5 * min(tokens, 4096) + 1e5 * max(tokens - 4096, 0)

    lengths = (2048, 4096, 8192, 16384)
    peaks = [peak(tokens) for tokens in lengths]
    for tokens in (1000, 2048, 3000, 4096, 5000, 8192, 10000, 16384, 90000):
        assert fitting(peak(tokens), lengths, peaks) == pytest.approx(tokens, abs=1)
    assert fitting(9e9, (1, 2), (8e9, 8e9)) > 2         # flat: no line to follow, and no error


def test_without_a_gpu_there_are_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(bench_gpu.gpu_kernels(Settings())) == []


def test_both_sides_of_a_row_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def equal(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int = 30) -> list[float]:
        found, expected = ours(), peer()
        if isinstance(found, tuple):            # torch.autograd.grad
            found = found[0]
        if expected.dtype == torch.uint8:       # a copy: of as many bytes as are read and written
            assert 2 * expected.nbytes == pytest.approx(found.nbytes + 0.516 * found.numel(), rel=0.01)
        else:
            assert found.shape == expected.shape and found.dtype == expected.dtype
            assert torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.1)
        compared.append(found)
        return [1.0, 2.0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_gpu, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench_gpu, "LAYER", (96, 128))
    monkeypatch.setattr(bench_gpu, "in_turns", equal)
    monkeypatch.setattr(bench_gpu, "host_seconds", lambda call: float(call().numel()))
    monkeypatch.setattr(gpu, "kernel", lambda device: SimpleNamespace(product=unpacked_product))
    rows = list(bench_gpu.gpu_kernels(Settings()))
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) and {"gpu_dequant_bf16", "gpu_linear_rows_1", "gpu_gradient_rows_16",
                                              "gpu_launch_rows_1"} <= set(names)
    assert all((row.limit == 2) if "dequant" in row.name else (row.ratio == 2) for row in rows if "launch" not in row.name)
    assert len(compared) == len(rows) - 1
    with_targets = {row.name.removeprefix("gpu_") for row in rows if row.targets}
    assert with_targets == {*(f"dequant_{name}" for name in ("fp32", "bf16", "fp16")),
                            *(f"linear_rows_{count}" for count in (1, 4, 16, 32))}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: nothing to time")
def test_times_on_a_gpu_are_longer_for_more_bytes() -> None:
    small, large = (torch.zeros(size, device=bench_gpu.DEVICE) for size in (1 << 12, 1 << 28))
    less, more = events.in_turns(lambda: small.fill_(1), lambda: large.fill_(1), rounds=5)
    assert 0 < less < more
