"""A figure of the bench: what was measured, beside what, and what it must reach."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """Something a row must reach: `value` is at least `least`."""

    what: str
    value: float
    least: float

    @property
    def ok(self) -> bool:
        """Whether it is reached."""
        return self.value >= self.least


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        ours, peer: in `unit`; peer None where none ran. against: what the peer is.
        ratio: above 1 is better for us. spread: its quartiles over the turns.
        limit: what the hardware allows, in `unit`, where that was measured. limit_is: what it is.
        ours_peak_bytes, peer_peak_bytes: of a process of its own that did nothing else.
    """

    name: str
    unit: str
    ours: float
    peer: float | None = None
    ratio: float | None = None
    limit: float | None = None
    ours_peak_bytes: int | None = None
    peer_peak_bytes: int | None = None
    against: str = ""
    spread: tuple[float, float] | None = None
    limit_is: str = ""
    targets: tuple[Target, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every target is reached."""
        return all(target.ok for target in self.targets)


@dataclass(frozen=True)
class Settings:
    """Of one run of the bench.

    Attributes: peers: measure bitsandbytes, peft and transformers too. quick: fewer rounds. folder: for checkpoints.
    """

    peers: bool = False
    quick: bool = False
    folder: Path = Path()

    def rounds(self, many: int, few: int = 3) -> int:
        """Turns to take the median of."""
        return few if self.quick else many


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of a single value itself, twice."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def in_turns(ours: Callable[[], object], peer: Callable[[], object], rounds: int = 9) -> tuple[float, float]:
    """Median seconds of each, called alternately in this process after one warm-up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for side, call in enumerate((ours, peer)):
            started = time.perf_counter()
            call()
            if turn:
                seconds[side].append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def format_value(number: float, unit: str) -> str:
    """With its unit: seconds as milliseconds where they are few, bytes as megabytes."""
    if unit == "bytes":
        return f"{number / 1e6:,.0f} MB"
    return f"{number * 1e3:.3g} ms" if unit == "s" and number < 1 else f"{number:.3g} {unit}"


def format_ratio(row: Row) -> str:
    """How many times better, with its quartiles; empty where there is no peer."""
    between = f" [{row.spread[0]:.2f}, {row.spread[1]:.2f}]" if row.spread else ""
    return "" if row.ratio is None else f"{row.ratio:.2f} x{between}"


def format_row(row: Row) -> str:
    """A line for the terminal."""
    parts = [f"{row.name:<26} {format_value(row.ours, row.unit)}"]
    if row.peer is not None:
        parts += [f"{row.against or 'peer'} {format_value(row.peer, row.unit)}", format_ratio(row)]
    if row.limit is not None:
        parts.append(f"{row.limit_is} {format_value(row.limit, row.unit)}")
    if row.ours_peak_bytes is not None and row.unit != "bytes":
        peer = "" if row.peer_peak_bytes is None else f" against {row.peer_peak_bytes / 1e9:.2f}"
        parts.append(f"peak {row.ours_peak_bytes / 1e9:.2f}{peer} GB")
    parts += [f"{target.what} {target.value:.2f}, at least {target.least:.2f}: {'ok' if target.ok else 'MISSED'}"
              for target in row.targets]
    return ", ".join(parts)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    lines = ["| row | ours | peer | ratio [quartiles] | the hardware | peak, GB: ours / peer | reached |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        peaks = [f"{peak / 1e9:.2f}" for peak in (row.ours_peak_bytes, row.peer_peak_bytes) if peak is not None]
        missed = [f"{target.what} {target.value:.2f} of {target.least:.2f}" for target in row.targets if not target.ok]
        lines.append("| " + " | ".join((
            f"`{row.name}`", format_value(row.ours, row.unit),
            "" if row.peer is None else f"{row.against} {format_value(row.peer, row.unit)}", format_ratio(row),
            "" if row.limit is None else f"{row.limit_is} {format_value(row.limit, row.unit)}", " / ".join(peaks),
            "" if not row.targets else "yes" if row.ok else "no: " + "; ".join(missed))) + " |")
    return "\n".join(lines) + "\n"
