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
from importlib.util import find_spec
from pathlib import Path

from minilora.bench.models import checkpoint_of
from minilora.bench.rows import Row, Settings
from minilora.bench.sides import Task, take_turns
from minilora.errors import ConfigError
from minilora.llama.config import LlamaConfig, linear_parameters
from minilora.memory import Peaks, Workload, predict
from minilora.plots import BLUE, GREY
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


def _said(point: Point) -> int:
    """Bytes that `minilora memory` says it takes."""
    setting = {"length": "seq"}.get(point.sweep, point.sweep)
    work = Workload("qlora", batch=BASE.batch, seq=BASE.length)
    if setting == "layers":
        shapes = (_shape(value) for value in SWEEPS["layers"])
        return max(Peaks.of(predict(next(shape for shape in shapes if linear_parameters(shape) / 1e6 == point.at), work)))
    return max(Peaks.of(predict(_shape(LAYERS), replace(work, **{setting: int(point.at)}))))     # type: ignore[arg-type]


def check_figure(path: str | Path, measured: bool = True) -> None:
    """Find what would stop `draw`, before half an hour of measurements.

    Args: measured: whether there are, or will be, rows to draw.
    Raises: ConfigError: no such rows, a name of another format, or matplotlib is not there.
    """
    if not measured:
        raise ConfigError("--figure draws the rows of scaling: run it with --only scaling, or without --only and --quick")
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--figure {path}: give it a name that ends in .png (or .svg, .pdf)")
    if find_spec("matplotlib") is None:
        raise ConfigError("--figure needs matplotlib: pip install 'minilora[plots]'")


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """Time and memory over each setting; dashed, time in proportion to the last point, and what memory should be added.

    Raises: ConfigError: as `check_figure`.
    """
    measured = points(rows)
    check_figure(path, bool(measured))
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = [sweep for sweep in SWEEPS if any(point.sweep == sweep for point in measured)]
    figure, axes = plt.subplots(2, len(sweeps), figsize=(3.1 * len(sweeps), 5.4), layout="constrained", squeeze=False,
                                sharey="row")
    for (above, below), sweep in zip(axes.T, sweeps, strict=True):
        line = [point for point in measured if point.sweep == sweep]
        at, seconds, peaks = ([getattr(point, name) for point in line] for name in ("at", "seconds", "peak_bytes"))
        above.plot(at, seconds, "o-", color=BLUE, label="measured")
        if sweep != "r":
            above.plot(at, [seconds[-1] * x / at[-1] for x in at], "--", color=GREY, label="proportional")
        above.set(xscale="log", yscale="log", title=AXES[sweep])
        above.set_xticks(at, [f"{x:,.0f}" for x in at])
        above.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
        above.set_ylim(0.8 * min(point.seconds for point in measured), 1.25 * max(point.seconds for point in measured))
        below.plot(at, [peak / 1e9 for peak in peaks], "o-", color=BLUE, label="measured")
        said = [_said(point) for point in line]
        below.plot(at, [(peaks[0] + more - said[0]) / 1e9 for more in said], "--", color=GREY, label="said to be added")
        below.set_xticks(at, [f"{x:,.0f}" for x in at])
        below.set_ylim(0, 1.1 * max(point.peak_bytes for point in measured) / 1e9)
        for panel in (above, below):
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds a step")
    axes[1][0].set_ylabel("peak of the process (GB)")
    for row in axes:
        row[0].legend(frameon=False, loc="upper left")
    figure.suptitle("A QLoRA step of a 110M Llama: 2 notes of 128 tokens, r = 16, 12 layers, one setting changed at a time",
                    fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
