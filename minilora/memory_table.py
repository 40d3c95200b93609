"""Full fine-tuning, LoRA and QLoRA side by side: bytes by what they hold, a bar for each, and the machine it takes.

A bar is the peak: of the three moments of a step that can be it, the one that is, cut into its parts.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from minilora.errors import ConfigError
from minilora.llama.config import LlamaConfig, num_parameters
from minilora.measured import Measured, measure
from minilora.memory import KINDS, Kind, Memory, Moment, Peaks, Workload, predict
from minilora.runs import resident_bytes

TITLES: dict[Kind, str] = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
PARTS = {"weights": "W", "absmax": "c", "adapters": "a", "gradients": "g", "optimizer": "O", "activations": "x", "logits": "l",
         "scratch": "s"}
MOMENTS: dict[Moment, str] = {"begin": "the backward begins", "end": "the backward ends", "step": "the optimizer steps"}
SIZES = (4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)      # GB, as sold
WIDTH = 60


@dataclass(frozen=True)
class Column:
    """One kind of run: what is predicted and, where it was asked for, what was measured."""

    work: Workload
    parts: Memory
    peaks: Peaks
    measured: Measured | None = None

    @property
    def moment(self) -> Moment:
        """The moment of the peak."""
        return max(MOMENTS, key=lambda moment: int(getattr(self.peaks, moment)))


def plan(model: str, config: LlamaConfig, work: Workload, kinds: Sequence[Kind] = KINDS, measured: Sequence[Kind] = (),
         device: str = "cpu", folder: str | None = None) -> list[Column]:
    """Predict a run of each kind, and take those that are to be measured.

    Args:
        model: as for `shape_of`, which gives its config.
        work: its kind is replaced by each of `kinds`, and its compute type by float32 for full.

    Raises: ConfigError: more tokens than positions. MiniloraError: a run failed.
    """
    if work.seq > config.max_position_embeddings:
        raise ConfigError(f"{work.seq} tokens exceed the model's {config.max_position_embeddings} positions")
    columns = []
    for kind in kinds:
        this = replace(work, kind=kind, compute=torch.float32 if kind == "full" else work.compute)
        parts = predict(config, this)
        columns.append(Column(this, parts, Peaks.of(parts, this.accumulate),
                              measure(model, this, device, folder) if kind in measured else None))
    return columns


def describe(model: str, config: LlamaConfig, work: Workload) -> str:
    """A line: what is planned."""
    state = "32-bit AdamW" if work.state_bits == 32 else "8-bit AdamW"
    pages = "" if work.resident_bytes is None else f" over pages, {work.resident_bytes / 2 ** 20:g} MiB of them in memory"
    return (f"{model}: {num_parameters(config):,} parameters in {config.num_hidden_layers} blocks of {config.hidden_size}; "
            f"{work.accumulate} x {work.batch} x {work.seq} tokens a step, {work.label_tokens} of a note with loss; "
            f"r = {work.r}; {state}{pages}" + ("; checkpointing" if work.gradient_checkpointing else "")
            + (" with offloading" if work.activation_offloading else ""))


def table(columns: Sequence[Column]) -> str:
    """Rows of parts, the peak, and the memory to have; then a bar for each column."""
    heads = [cell for column in columns for cell in
             ((TITLES[column.work.kind],) if column.measured is None else (TITLES[column.work.kind], "measured"))]
    lines = ["  " + f"{'':<16}" + "".join(f"{head:>14}" for head in heads)]
    for name, symbol in PARTS.items():
        lines.append(_row(f"{symbol} {name}", [_both(column, name) for column in columns]))
    lines.append(_row("= peak", [(max(column.peaks), None if column.measured is None else column.measured.peak)
                                 for column in columns]))
    if any(column.parts.paged for column in columns):
        lines.append(_row("  paged out", [_both(column, "paged") for column in columns]))
    if any(column.parts.offloaded for column in columns):
        lines.append(_row("  offloaded", [_both(column, "offloaded") for column in columns]))
    lines.append(f"  {'to have':<16}" + "".join(f"{to_have(column):>14}" + ("" if column.measured is None else " " * 14)
                                                for column in columns))
    largest = max(max(column.peaks) for column in columns)
    lines += ["", *(bar(column, largest) for column in columns), "",
              f"  To have: room for Python and torch ({size(resident_bytes())} here) as well, and for activations, logits and",
              "  scratch once more, since allocators hold freed memory back.  Not counted: dropout, DoRA."]
    return "\n".join(lines)


def to_have(column: Column) -> str:
    """The smallest memory, as sold, that holds the peak, Python and torch, and what is made and dropped twice over.

    Allocators hold some of that back when it is freed: glibc's malloc 0.4 to 0.95 of it in runs of 110 million weights.
    """
    parts = column.parts
    needed = max(column.peaks) + parts.activations + parts.logits + parts.scratch + resident_bytes()
    return next((f"{size} GB" for size in SIZES if size * 1e9 >= needed), f"over {SIZES[-1]} GB")


def bar(column: Column, largest: int) -> str:
    """The peak of a column, a letter for each part, against the largest peak of the table."""
    moment = column.moment
    held = column.parts.held(column.work.accumulate)[moment]
    drawn, text, total = 0, "", 0
    for name, symbol in PARTS.items():
        total += getattr(held, name)
        upto = round(WIDTH * total / largest)       # the sum is rounded, not each part, so the lengths add up
        text, drawn = text + symbol * (upto - drawn), upto
    return f"{TITLES[column.work.kind]:>7} {text or '|'} {size(max(column.peaks))}, when {MOMENTS[moment]}"


def as_object(column: Column) -> dict[str, Any]:
    """A column for a file: bytes by name."""
    told: dict[str, Any] = {"kind": column.work.kind, "predicted": column.parts._asdict(), "peaks": column.peaks._asdict()}
    if column.measured is not None:
        told |= {"measured": column.measured.parts._asdict(),
                 "measured_peaks": {"backward": column.measured.backward, "step": column.measured.step}}
    return told


def size(count: float) -> str:
    """Bytes in MB or GB, powers of ten."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _both(column: Column, name: str) -> tuple[int, int | None]:
    """A part as predicted and, where there is one, as measured."""
    return getattr(column.parts, name), None if column.measured is None else getattr(column.measured.parts, name)


def _row(name: str, cells: Sequence[tuple[int, int | None]]) -> str:
    return f"  {name:<16}" + "".join(f"{size(value):>14}" for pair in cells for value in pair if value is not None)
