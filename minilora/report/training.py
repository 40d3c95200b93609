"""How a run went: loss, rate, gradients, speed and memory over its steps."""
from __future__ import annotations

import numpy as np

from minilora.metrics import Floats
from minilora.report.markup import Child, Markup, tag
from minilora.report.parts import byte_text, byte_unit, figure, legend, percent, steps_axis
from minilora.report.runfiles import RunFiles
from minilora.report.svg import Frame, linear_axis, log_axis, smooth

WINDOWS = 20            # a smoothed line averages over a 20th of the run
SPREAD_FOR_LOG = 20     # largest over smallest from which the loss is drawn on a logarithmic axis
SMALLEST_FOR_LOG = 1e-9


def window(steps: int) -> int:
    """Steps that a smoothed line averages over."""
    return max(1, min(steps // WINDOWS, 500))


def training_section(run: RunFiles) -> Markup:
    """The charts of training."""
    charts: list[Markup | None] = [_loss(run)]
    for name, draw in (("lr", _rate), ("grad_norm", _norm), ("tokens", _speed), ("peak_bytes", _memory)):
        at, values = run.metrics.series(name)
        if len(at):
            charts.append(draw(run, at, values))
    columns = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens": "tokens", "seconds": "time of a step",
               "peak_bytes": "memory"}
    missing = [said for name, said in columns.items() if not len(run.metrics.series(name)[0])]
    gap = tag("p", f"Not in this run's metrics: {', '.join(missing)}.", class_="quiet") if missing else None
    return tag("section", tag("h2", "Training"), tag("div", charts, class_="charts"), gap)


def raw_and_smooth(frame: Frame, at: Floats, values: Floats) -> list[Child]:
    """Each step thin, the mean over a `window` bold."""
    width = window(len(values))
    return [frame.line(at, values, "raw" if width > 1 else "main"),
            frame.line(at, smooth(values, width), "main") if width > 1 else None]


def _loss(run: RunFiles) -> Markup:
    at, loss = run.metrics.series("loss")
    val_at, val = run.metrics.series("val_loss")
    everything = np.concatenate([loss, val])
    low, high = float(everything.min()), float(everything.max())
    logarithmic = low > SMALLEST_FOR_LOG and high / low > SPREAD_FOR_LOG
    title = "loss per label token (nats)"
    frame = Frame(steps_axis(run.metrics),
                  log_axis(low, high, title + ", logarithmic") if logarithmic else linear_axis(min(0.0, low), high, title))
    width = window(len(loss))
    key = [("raw", "each step"), ("main", f"mean of {width} steps")] if width > 1 else [("main", "training")]
    marks = raw_and_smooth(frame, at, loss)
    if len(val):
        marks += [frame.line(val_at, val, "second") if len(val) > 1 else None,
                  frame.dots(val_at, val, "second", [f"step {s:.0f}: validation loss {v:.4f}"
                                                     for s, v in zip(val_at, val, strict=True)])]
        key.append(("second-dots", "validation"))
        best = int(val.argmin())
        said = f"Lowest validation loss {val[best]:.4f} at step {val_at[best]:,.0f}"
        said += ", the last one measured." if val[-1] <= val[best] else f"; {val[-1]:.4f} at the last, so it rose since."
    else:
        said = "No validation loss was measured" + ("." if run.config.val else " (no --val).")
    return figure("Loss", frame.draw("Training and validation loss at each step", *marks), said, legend(key))


def _rate(run: RunFiles, at: Floats, rate: Floats) -> Markup:
    frame = Frame(steps_axis(run.metrics), linear_axis(0, float(rate.max()), "learning rate"))
    said = f"Warm-up over {percent(run.config.warmup, 0)} of the steps, then a cosine to zero; peak {rate.max():.3g}."
    return figure("Learning rate", frame.draw("Learning rate at each step", frame.line(at, rate, "main")), said)


def _norm(run: RunFiles, at: Floats, norm: Floats) -> Markup:
    bound, top = run.config.max_grad_norm, float(norm.max())
    logarithmic = float(norm.min()) > SMALLEST_FOR_LOG and top / float(norm.min()) > SPREAD_FOR_LOG * 5
    title = "norm of the gradient"
    frame = Frame(steps_axis(run.metrics), log_axis(float(norm.min()), top, title + ", logarithmic") if logarithmic
                  else linear_axis(0, top, title))
    drawn = bound and frame.y.low <= bound <= frame.y.high
    marks = [frame.level(bound, "bound", f"bound {bound:g}") if drawn else None, *raw_and_smooth(frame, at, norm)]
    said = "Gradients were not clipped (max_grad_norm 0)."
    if bound:
        clipped = int((norm > bound).sum())
        said = (f"Before clipping. {clipped:,} of {len(norm):,} steps ({percent(clipped / len(norm))}) were above "
                f"{bound:g} and scaled down to it.")
    return figure("Gradient norm", frame.draw("Gradient norm at each step", *marks), said,
                  legend([("bound", f"bound {bound:g}")]) if drawn else None)


def _speed(run: RunFiles, at: Floats, tokens: Floats) -> Markup | None:
    seconds = run.metrics.columns["seconds"][np.isin(run.metrics.steps, at)]
    timed = seconds > 0
    if not timed.any():
        return None
    speed = tokens[timed] / seconds[timed]
    frame = Frame(steps_axis(run.metrics), linear_axis(0, float(speed.max()), "tokens a second"))
    said = (f"{tokens[timed].sum() / seconds[timed].sum():,.0f} tokens a second over the whole run, prompt and label, "
            "without padding and without validation.")
    return figure("Speed", frame.draw("Tokens a second at each step", *raw_and_smooth(frame, at[timed], speed)), said)


def _memory(run: RunFiles, at: Floats, peak: Floats) -> Markup:
    unit, size = byte_unit(float(peak.max()))
    frame = Frame(steps_axis(run.metrics), linear_axis(0, float(peak.max()) / size, f"peak memory so far ({unit})"))
    said = (f"{byte_text(float(peak.max()))} at most: of the whole process on a CPU, of what torch allocated on a GPU. It "
            "never falls, except where the run was resumed.")
    return figure("Memory", frame.draw("Peak memory at each step", frame.line(at, peak / size, "main")), said)
