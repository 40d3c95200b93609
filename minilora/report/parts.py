"""Pieces that every section uses: a figure with its caption, a legend, an axis of steps, units."""
from __future__ import annotations

from collections.abc import Sequence

from minilora.report.markup import Child, Markup, tag
from minilora.report.runfiles import Metrics
from minilora.report.svg import Axis, linear_axis


def figure(title: str, drawn: Markup, caption: Child, key: Markup | None = None) -> Markup:
    """A chart under its title and above the sentence that says how to read it."""
    key = key or tag("p", class_="legend")      # room for one, so that charts side by side stand at one height
    return tag("figure", tag("h3", title), key, drawn, tag("figcaption", caption))


def legend(entries: Sequence[tuple[str, str]]) -> Markup | None:
    """What each style (a class of the stylesheet; "…-dots" for dots) stands for."""
    def swatch(style: str) -> Markup:
        drawn = (tag("circle", cx=10, cy=5, r=3.5, class_=f"dot {style.removesuffix('-dots')}") if style.endswith("-dots")
                 else tag("line", x1=1, y1=5, x2=19, y2=5, class_=f"line {style}"))
        return tag("svg", drawn, viewBox="0 0 20 10", class_="swatch", aria_hidden="true")

    return tag("p", [tag("span", swatch(style), name) for style, name in entries], class_="legend") if entries else None


def steps_axis(metrics: Metrics) -> Axis:
    """Optimizer steps, from the first to the last."""
    first, last = float(metrics.steps[0]), float(metrics.steps[-1])
    return linear_axis(0.0 if first <= 1 + last / 20 else first, max(last, 1.0), "optimizer step", most=6, whole=True,
                       outward=False)


def byte_unit(largest: float) -> tuple[str, float]:
    """The unit in which a number of bytes is said, and its size."""
    return next((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
                if largest >= size or size == 1)


def byte_text(size: float) -> str:
    """A number of bytes in three digits: 1.59 GB, 891 MB."""
    unit, one = byte_unit(size)
    return f"{size / one:.3g} {unit}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 41 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * value:.{digits}f}%"


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters; what is cut off is an ellipsis."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
