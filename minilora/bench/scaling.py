"""How a step's cost grows: with the length of the notes, their number, the rank, and the size of the model.

    time ∝ batch; ∝ length, but for attention, whose share grows with its square
    time ∝ weights of the linears
    time over r: a constant, and a small part that grows: r · (in + out) beside in · out
    memory: what is stored, and activations ∝ batch · length

Each point is a step of a model of random weights in a process of its own; `draw` makes the picture.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minilora.bench.models import checkpoint_of
from minilora.bench.rows import Row, Settings
from minilora.bench.sides import Task, take_turns
from minilora.errors import ConfigError
from minilora.llama.config import LlamaConfig, linear_parameters
from minilora.shapes import SHAPES

BASE = Task("step", batch=2, length=128)
LAYERS = 12
SWEEPS: dict[str, tuple[int, ...]] = {"length": (64, 128, 256, 512), "batch": (1, 2, 4, 8), "r": (4, 16, 64, 256),
                                      "layers": (3, 6, 12, 24)}
AXES = {"length": "tokens of a note", "batch": "notes of a step", "r": "rank of the adapters",
        "layers": "weights of the linears (millions)"}


@dataclass(frozen=True)
class Point:
    """A step's seconds and peak bytes at one value of one setting."""

    sweep: str
    at: float
    seconds: float
    peak_bytes: int


def scaling(settings: Settings) -> Iterator[Row]:
    """Steps of the 110 million with one setting changed at a time."""
    for sweep, values in SWEEPS.items():
        for value in values[:2] if settings.quick else values:
            task = BASE if sweep == "layers" else replace(BASE, **{sweep: value})       # type: ignore[arg-type]
            path = checkpoint_of(_shape(value if sweep == "layers" else LAYERS), settings.folder)
            taken, _ = take_turns(replace(task, model=str(path)), settings.rounds(5), peers=False)
            yield Row(f"scaling_{sweep}_{value}", "s", taken.median, ours_peak_bytes=taken.peak_bytes)


def _shape(layers: int) -> LlamaConfig:
    return LlamaConfig.from_dict({**SHAPES["110m"], "num_hidden_layers": layers})


def points(rows: Sequence[Row]) -> list[Point]:
    """The points among a bench's rows; sizes in millions of weights."""
    found = []
    for row in rows:
        _, sweep, value = row.name.rsplit("_", 2) if row.name.startswith("scaling_") else ("", "", "0")
        if sweep in SWEEPS and row.ours_peak_bytes is not None:
            at = float(value)
            if sweep == "layers":
                at = linear_parameters(_shape(int(value))) / 1e6
            found.append(Point(sweep, at, row.ours, row.ours_peak_bytes))
    return found


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """Time and memory over each setting, with the line of proportional growth from the first point.

    Raises: ConfigError: no such rows, or matplotlib is not there.
    """
    measured = points(rows)
    if not measured:
        raise ConfigError("--figure draws the rows of scaling: run it with --only scaling, or without --only")
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("--figure needs matplotlib: pip install 'minilora[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = [sweep for sweep in SWEEPS if any(point.sweep == sweep for point in measured)]
    figure, axes = plt.subplots(2, len(sweeps), figsize=(3.1 * len(sweeps), 5.4), layout="constrained", squeeze=False)
    for column, sweep in enumerate(sweeps):
        line = [point for point in measured if point.sweep == sweep]
        at = [point.at for point in line]
        for row, (values, label) in enumerate((([point.seconds for point in line], "seconds a step"),
                                               ([point.peak_bytes / 1e9 for point in line], "peak memory (GB)"))):
            panel = axes[row][column]
            panel.plot(at, values, "o-", color="#3366aa", label="measured")
            if row == 0 and sweep != "r":
                panel.plot(at, [values[-1] * x / at[-1] for x in at], "--", color="#b8bec8", label="proportional")
            panel.set(xscale="log", xlabel=AXES[sweep], ylabel=label if column == 0 else "",
                      yscale="log" if row == 0 else "linear")
            if row:
                panel.set_ylim(0, 1.15 * max(point.peak_bytes for point in measured) / 1e9)
            panel.set_xticks(at, [f"{x:,.0f}" for x in at])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
            if not column and not row:
                panel.legend(frameon=False)
    figure.suptitle("A QLoRA step of a 110M Llama: 2 notes of 128 tokens, r = 16, 12 layers, one setting changed at a time",
                    fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
