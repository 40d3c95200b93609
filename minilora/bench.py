"""The figures of the README, measured on the machine at hand: ours beside a peer, in turns, as a ratio.

Timings of a shared machine wander, so the two sides alternate within one process and medians are compared; memory is the peak
of a process of its own for each side, less that of a process that only makes the parameters.

    ratio    peer's / ours for times and bytes: above 1 is better for us
    limit    what the ratio must reach; null where the figure is for information
"""
from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minilora.errors import MiniloraError
from minilora.llama.recompute import recompute
from minilora.measured import measure
from minilora.memory import Peaks, Workload, predict
from minilora.optim.adamw import AdamW
from minilora.optim.paged_adamw import PagedAdamW
from minilora.runs import peak_bytes
from minilora.shapes import shape_of

ELEMENTS, TENSORS = 2 ** 21, 12                 # 25 million parameters: 201 MB of moments in 32 bits
STATE_BYTES = 8 * ELEMENTS * TENSORS
QUARTER = STATE_BYTES // 4
SMALL_BUDGET = 16 * 2 ** 20


@dataclass(frozen=True)
class Row:
    """One figure. `ours` and `peer` in `unit`; `peer` None where none ran."""

    name: str
    unit: str
    ours: float
    peer: float | None
    ratio: float | None
    limit: float | None = None
    ours_peak_bytes: int | None = None
    peer_peak_bytes: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the limit is reached, where there is one."""
        return self.limit is None or (self.ratio is not None and self.ratio >= self.limit)


def in_turns(ours: Callable[[], object], peer: Callable[[], object], rounds: int = 9) -> tuple[float, float]:
    """Median seconds of each, called alternately after one warm-up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for side, call in enumerate((ours, peer)):
            started = time.perf_counter()
            call()
            if turn:
                seconds[side].append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def parameters() -> list[nn.Parameter]:
    """What the optimizers update: float32, with gradients."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(ELEMENTS, generator=generator)) for _ in range(TENSORS)]
    for param in made:
        param.grad = torch.randn(ELEMENTS, generator=generator)
    return made


def optimizer(kind: str) -> torch.optim.Optimizer:
    """The optimizers that are compared, by name."""
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "unpaged": lambda: AdamW(parameters(), lr=1e-3),
        "resident": lambda: PagedAdamW(parameters(), lr=1e-3, resident_bytes=2 * STATE_BYTES),
        "quarter_host": lambda: PagedAdamW(parameters(), lr=1e-3, resident_bytes=QUARTER),
        "quarter_disk": lambda: PagedAdamW(parameters(), lr=1e-3, resident_bytes=QUARTER, backing="disk"),
        "small_disk": lambda: PagedAdamW(parameters(), lr=1e-3, resident_bytes=SMALL_BUDGET, backing="disk")}
    return made[kind]()


def paged_steps() -> Iterator[Row]:
    """A step of the paged optimizer against one without pages."""
    plain = optimizer("unpaged")
    for kind, limit in (("resident", 1 / 1.15), ("quarter_host", None), ("quarter_disk", None)):
        ours, peer = in_turns(optimizer(kind).step, plain.step)
        yield Row(f"paged_adamw_{kind}", "s", ours, peer, peer / ours, limit)


def paged_memory() -> Iterator[Row]:
    """Peak memory of three steps, beside parameters and gradients: the share of the state that is not resident must go."""
    base, ours, peer = (_peak(kind) for kind in ("none", "small_disk", "unpaged"))
    not_resident = STATE_BYTES - SMALL_BUDGET
    kept = peer - base - 0.9 * not_resident         # bytes that may be left when nine tenths of that are gone
    yield Row("paged_adamw_peak", "bytes", ours - base, peer - base, (peer - base) / max(ours - base, 1), (peer - base) / kept,
              ours, peer)


def paged_training() -> Iterator[Row]:
    """The peak of full fine-tuning at 110 million weights, with 128 MiB of moments in memory and with all of them.

    Raises: MiniloraError: the losses differ.
    """
    work = Workload("full", batch=4, seq=256, compute=torch.float32, gradient_checkpointing=True)
    ours, peer = measure("110m", replace(work, resident_bytes=128 << 20)), measure("110m", work)
    if ours.losses != peer.losses:
        raise MiniloraError(f"losses over pages {ours.losses}, without {peer.losses}: they must be the same")
    kept = peer.peak - 0.9 * ours.parts.paged
    yield Row("full_110m_paged", "bytes", ours.peak, peer.peak, peer.peak / ours.peak, peer.peak / kept, ours.peak, peer.peak)


def memory_predicted() -> Iterator[Row]:
    """What `minilora memory` says a run takes (ours) against what it took (peer), as the smaller over the larger."""
    small, large = Workload("qlora", batch=4, seq=256), Workload("qlora", batch=1, seq=128, gradient_checkpointing=True)
    for name, model, work in (("110m_qlora", "110m", small),
                              ("110m_qlora_ckpt", "110m", replace(small, gradient_checkpointing=True)),
                              ("110m_lora", "110m", replace(small, kind="lora")),
                              ("110m_full", "110m", replace(small, kind="full", compute=torch.float32)),
                              ("1b_qlora_ckpt", "1.1b", large), ("1b_lora_ckpt", "1.1b", replace(large, kind="lora")),
                              ("1b_qlora", "1.1b", replace(large, batch=4, gradient_checkpointing=False))):
        said, took = max(Peaks.of(predict(shape_of(model), work))), measure(model, work).peak
        yield Row(f"memory_{name}", "bytes", said, took, min(said, took) / max(said, took), 0.9)


def _peak(kind: str) -> int:
    """Peak bytes of a process that takes three steps with an optimizer, or none."""
    call = f"import minilora.bench; minilora.bench.print_peak({kind!r})"
    return int(subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True).stdout)


def print_peak(kind: str) -> None:
    """For `_peak`: run in a process of its own."""
    small = nn.Parameter(torch.zeros(1))
    small.grad = torch.zeros(1)
    AdamW([small]).step()           # torch loads 150 MB of its own at the first step of any optimizer
    held = parameters() if kind == "none" else optimizer(kind)
    for _ in range(3):
        if isinstance(held, AdamW):
            held.step()
    print(peak_bytes(torch.device("cpu")))


def recomputation() -> Iterator[Row]:
    """Forward and backward of a block through checkpointing by hand, against torch's."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    x = torch.randn(512, 768, requires_grad=True)
    ours, peer = in_turns(lambda: recompute(block, x).sum().backward(),
                          lambda: checkpoint(block, x, use_reentrant=False).sum().backward())
    yield Row("recompute", "s", ours, peer, peer / ours)


BENCHES: tuple[Callable[[], Iterator[Row]], ...] = (paged_steps, paged_memory, paged_training, recomputation,
                                                       memory_predicted)


def bench(only: list[str] | None = None) -> Iterator[Row]:
    """Measure, one row after another.

    Args: only: parts of the names of the functions that are run; default all.
    """
    for rows in BENCHES:
        if not only or any(part in rows.__name__ for part in only):
            yield from rows()


def format_row(row: Row) -> str:
    """A line for the terminal."""
    def value(number: float | None) -> str:
        return "-" if number is None else f"{number:,.0f}" if row.unit == "bytes" else f"{number:.4g}"

    verdict = "" if row.limit is None else f"   at least {row.limit:.2f}: {'ok' if row.ok else 'MISSED'}"
    ratio = "" if row.ratio is None else f"   ratio {row.ratio:.2f}"
    return f"{row.name:<26} ours {value(row.ours)} {row.unit}, peer {value(row.peer)} {row.unit}{ratio}{verdict}"
