"""What paging costs and saves, what recomputation by hand costs, and what `minilora memory` says against what was taken.

Memory is the peak of a process of its own for each side, less that of a process that only makes the parameters.
"""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minilora.bench.rows import Row, Settings, Target, in_turns
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


def paged_steps(_: Settings) -> Iterator[Row]:
    """A step of the paged optimizer against one without pages."""
    plain = optimizer("unpaged")
    for kind, least in (("resident", 1 / 1.15), ("quarter_host", None), ("quarter_disk", None)):
        ours, peer = in_turns(optimizer(kind).step, plain.step)
        yield Row(f"paged_adamw_{kind}", "s", ours, peer, peer / ours, against="without pages",
                  targets=() if least is None else (Target("speed without pages", peer / ours, least),))


def paged_memory(_: Settings) -> Iterator[Row]:
    """Peak memory of three steps, beside parameters and gradients: the share of the state that is not resident must go."""
    base, ours, peer = (_peak(kind) for kind in ("none", "small_disk", "unpaged"))
    not_resident = STATE_BYTES - SMALL_BUDGET
    yield Row("paged_adamw_peak", "bytes", ours - base, peer - base, (peer - base) / max(ours - base, 1), None, ours, peer,
              "without pages", targets=(Target("share of the paged bytes that is gone", (peer - ours) / not_resident, 0.9),))


def paged_training(_: Settings) -> Iterator[Row]:
    """The peak of full fine-tuning at 110 million weights, with 128 MiB of moments in memory and with all of them.

    Raises: MiniloraError: the losses differ.
    """
    work = Workload("full", batch=4, seq=256, compute=torch.float32, gradient_checkpointing=True)
    ours, peer = measure("110m", replace(work, resident_bytes=128 << 20)), measure("110m", work)
    if ours.losses != peer.losses:
        raise MiniloraError(f"losses over pages {ours.losses}, without {peer.losses}: they must be the same")
    gone = (peer.peak - ours.peak) / ours.parts.paged
    yield Row("full_110m_paged", "bytes", ours.peak, peer.peak, peer.peak / ours.peak, None, ours.peak, peer.peak,
              "without pages", targets=(Target("share of the paged bytes that is gone", gone, 0.9),))


def memory_predicted(_: Settings) -> Iterator[Row]:
    """What `minilora memory` says a run takes (ours) against what it took (peer), as the smaller over the larger."""
    small, large = Workload("qlora", batch=4, seq=256), Workload("qlora", batch=1, seq=128, gradient_checkpointing=True)
    for name, model, work in (("110m_qlora", "110m", small),
                              ("110m_qlora_ckpt", "110m", replace(small, gradient_checkpointing=True)),
                              ("110m_lora", "110m", replace(small, kind="lora")),
                              ("110m_full", "110m", replace(small, kind="full", compute=torch.float32)),
                              ("1b_qlora_ckpt", "1.1b", large), ("1b_lora_ckpt", "1.1b", replace(large, kind="lora")),
                              ("1b_qlora", "1.1b", replace(large, batch=4, gradient_checkpointing=False))):
        said, took = max(Peaks.of(predict(shape_of(model), work))), measure(model, work).peak
        match = min(said, took) / max(said, took)
        yield Row(f"memory_{name}", "bytes", said, took, match, against="taken",
                  targets=(Target("of what was taken", match, 0.9),))


def _peak(kind: str) -> int:
    """Peak bytes of a process that takes three steps with an optimizer, or none."""
    call = f"import minilora.bench.paging; minilora.bench.paging.print_peak({kind!r})"
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


def recomputation(_: Settings) -> Iterator[Row]:
    """Forward and backward of a block through checkpointing by hand, against torch's."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    x = torch.randn(512, 768, requires_grad=True)
    ours, peer = in_turns(lambda: recompute(block, x).sum().backward(),
                          lambda: checkpoint(block, x, use_reentrant=False).sum().backward())
    yield Row("recompute", "s", ours, peer, peer / ours, against="torch.utils.checkpoint")
