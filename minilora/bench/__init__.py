"""The figures of the README, measured on the machine at hand: ours beside a peer, in turns, as a ratio.

Timings of a shared machine wander, so the two sides alternate and medians are compared.  With ``peers`` the other side is
bitsandbytes, peft and transformers, in a process of its own, as ours then is too; without, what the hardware allows.

    ratio    peer's / ours for times and bytes: above 1 is better for us
    limit    what the hardware allows, in the row's unit
    targets  what must be reached; a row that misses one ends the command with exit code 2
"""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from minilora.bench import gpu, gpu_models, kernels, limits, models, paging, scaling
from minilora.bench.rows import Row, Settings, format_row, markdown

Bench = Callable[[Settings], Iterator[Row]]
BENCHES: tuple[Bench, ...] = (
    limits.machine, kernels.unpacking, kernels.products, kernels.products_fp32, kernels.inference, models.steps,
    models.steps_all_labels, models.loading, models.prefill, models.decoding, models.scoring, paging.paged_steps,
    paging.paged_memory, paging.paged_training, paging.recomputation, paging.memory_predicted, scaling.scaling,
    gpu.gpu_kernels, gpu_models.gpu_steps, gpu_models.gpu_context, gpu_models.gpu_paging)
QUICK: tuple[Bench, ...] = (limits.machine, kernels.unpacking, kernels.products, models.steps, models.scoring)

__all__ = ["BENCHES", "QUICK", "Row", "Settings", "bench", "chosen", "format_row", "left_out", "markdown"]


def bench(only: list[str] | None = None, settings: Settings | None = None) -> Iterator[Row]:
    """Measure, one row after another.

    Args: only: parts of the names of the functions that are run; default all, or with `quick` some.
    """
    settings = settings or Settings()
    with tempfile.TemporaryDirectory(prefix="minilora-bench-") as folder:
        for rows in chosen(only, settings):
            yield from rows(replace(settings, folder=Path(folder)))


def chosen(only: list[str] | None, settings: Settings) -> list[Bench]:
    """The functions that are run."""
    some = QUICK if settings.quick and not only else BENCHES
    return [rows for rows in some if not only or any(part in rows.__name__ for part in only)]


def left_out(settings: Settings) -> list[str]:
    """Names of what a quick run doesn't measure."""
    return sorted({rows.__name__ for rows in BENCHES if rows not in QUICK}) if settings.quick else []
