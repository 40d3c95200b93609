"""Charts as inline SVG: axes with round ticks, lines, dots, bars.  Colours are CSS classes, so that dark, light and print
each have their own (`minilora.report.page`).

A chart is `Frame` (two axes around a plot) plus marks placed with ``frame.at(x, y)``.  Every number that is drawn goes through
there, so that it lies inside the plot whatever the data say.
"""
from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from minilora.metrics import Floats
from minilora.report.markup import Child, Markup, tag

WIDTH, HEIGHT = 440, 230        # of a chart in its own units; a phone shows them about one to one
CHARACTER = 6.3                 # widest mean width of a character of a tick's label, in these units
MOST_POINTS = 600               # of a line: what is more is drawn as each stretch's lowest and highest


@dataclass(frozen=True)
class Axis:
    """A range and its ticks (value, text); `log` places values by their logarithm."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    title: str = ""
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between low (0) and high (1); what lies outside goes to the edge."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return min(max((value - low) / (high - low), 0.0), 1.0)


def tick_step(span: float, most: int) -> float:
    """The smallest of …, 0.1, 0.2, 0.5, 1, 2, 5, 10, … that cuts a span into at most `most` pieces."""
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= raw * (1 - 1e-9))


def tick_text(value: float, step: float) -> str:
    """A tick's value with the digits that its step needs: 0.25, 1,500, 2e-5."""
    if value == 0:
        return "0"
    if step < 1e-4 or step >= 1e6:
        digits = math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9)
        mantissa, _, exponent = f"{value:.{max(0, digits)}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def linear_axis(low: float, high: float, title: str = "", most: int = 5, whole: bool = False, percent: bool = False,
                outward: bool = True) -> Axis:
    """An axis with round ticks.

    Args:
        most: pieces between ticks. whole: only whole numbers are ticks. percent: values are shares.
        outward: the range grows to the next ticks.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    step = tick_step(high - low, most)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if outward:
        low, high = first * step, last * step
    slack = (high - low) * 1e-9
    values = [number * step for number in range(first, last + 1) if low - slack <= number * step <= high + slack]
    return Axis(low, high, [(value, f"{tick_text(100 * value, 100 * step)}%" if percent else tick_text(value, step))
                            for value in values], title)


def log_axis(low: float, high: float, title: str = "") -> Axis:
    """An axis over positive values: ticks at 1, 2 and 5 times the powers of ten, or at these alone where that is enough."""
    if high <= low:
        low, high = low / 2, high * 2
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    values = [factor * 10.0 ** power for power in powers for factor in (1, 2, 5)]
    first = max(value for value in values if value <= low * (1 + 1e-9))
    last = min(value for value in [*values, 10.0 ** (powers[-1] + 1)] if value >= high * (1 - 1e-9))
    inside = [value for value in values if first <= value * (1 + 1e-9) and value <= last * (1 + 1e-9)]
    if len(inside) > 7:
        inside = [10.0 ** power for power in powers if first <= 10.0 ** power * (1 + 1e-9) <= last * (1 + 1e-6)]
        inside = inside[:: math.ceil(len(inside) / 7)]
    return Axis(first, last, [(value, f"{value:g}") for value in inside], title, log=True)


@dataclass(frozen=True)
class Frame:
    """Two axes and the plot between them; the y axis has its title above, so that it can be read upright."""

    x: Axis
    y: Axis
    width: int = WIDTH
    height: int = HEIGHT
    top: float = 24.0
    right: float = 14.0
    bottom: float = 36.0
    left: float = field(init=False)

    def __post_init__(self) -> None:
        longest = max((len(text) for _, text in self.y.ticks), default=1)
        object.__setattr__(self, "left", max(26.0, 12 + CHARACTER * longest))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Values to coordinates."""
        return (self.left + self.x.share(x) * (self.width - self.left - self.right),
                self.height - self.bottom - self.y.share(y) * (self.height - self.top - self.bottom))

    def draw(self, label: str, *marks: Child) -> Markup:
        """The chart: grid, ticks, titles and marks.

        Args: label: what it shows, for who cannot see it.
        """
        bottom, end = self.height - self.bottom, self.width - self.right
        parts: list[Child] = [tag("text", self.y.title, x=2, y=12, class_="axis")]
        for value, text in self.y.ticks:
            y = self.at(self.x.low, value)[1]
            parts += [tag("line", x1=self.left, x2=float(end), y1=y, y2=y, class_="grid"),
                      tag("text", text, x=self.left - 6, y=y + 3.5, class_="tick end")]
        reach = -math.inf
        for value, text in self.x.ticks:
            x, half = self.at(value, self.y.low)[0], CHARACTER * len(text) / 2
            x_text = min(x, self.width - half)
            if x_text - half < reach:       # it would run into the one before
                continue
            reach = x_text + half + 6
            parts += [tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="base"),
                      tag("text", text, x=x_text, y=bottom + 16, class_="tick middle")]
        parts += [tag("line", x1=self.left, x2=float(end), y1=bottom, y2=bottom, class_="base"),
                  tag("text", self.x.title, x=float(end), y=self.height - 4.0, class_="axis end")]
        return picture(self.width, self.height, label, *parts, *marks)

    def line(self, x: Floats, y: Floats, style: str) -> Markup:
        """A line through points; a single one is a dot."""
        places = [self.at(float(a), float(b)) for a, b in zip(*thin(x, y), strict=True)]
        if len(places) == 1:
            return tag("circle", cx=places[0][0], cy=places[0][1], r=3, class_=f"dot {style}")
        return tag("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places), class_=f"line {style}")

    def dots(self, x: Floats, y: Floats, style: str, titles: Sequence[str], radius: float = 3.5) -> Markup:
        """A dot at each point, with what is said of it when it is pointed at."""
        places = [self.at(float(a), float(b)) for a, b in zip(x, y, strict=True)]
        return tag("g", [tag("circle", tag("title", title), cx=a, cy=b, r=radius, class_=f"dot {style}")
                         for (a, b), title in zip(places, titles, strict=True)])

    def upright(self, x: float, style: str, title: str) -> Markup:
        """A line from bottom to top: something that happened at x."""
        place = self.at(x, self.y.low)[0]
        return tag("line", tag("title", title), x1=place, x2=place, y1=self.top, y2=self.height - self.bottom,
                   class_=f"line {style}")

    def level(self, y: float, style: str, title: str) -> Markup:
        """A line from left to right: a bound."""
        place = self.at(self.x.low, y)[1]
        return tag("line", tag("title", title), x1=self.left, x2=float(self.width - self.right), y1=place, y2=place,
                   class_=f"line {style}")


def picture(width: int, height: int, label: str, *parts: Child, class_: str = "chart") -> Markup:
    """An SVG that takes the width it is given."""
    return tag("svg", tag("title", label), parts, viewBox=f"0 0 {width} {height}", role="img", class_=class_)


def text_width(text: str, size: float) -> float:
    """About how wide a text is in letters of a size; those of East Asia are square, capitals wider than small ones."""
    return size * sum(1.0 if unicodedata.east_asian_width(character) in "WF" else 0.72 if character.isupper() else 0.6
                      for character in text)


def thin(x: Floats, y: Floats, most: int = MOST_POINTS) -> tuple[Floats, Floats]:
    """At most `most` points that look the same: of each stretch the lowest and the highest, in their order.

    Guarantee: the overall lowest and highest stay; what is short already stays as it is.
    """
    if len(x) <= most:
        return x, y
    keep: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), most // 2):
        keep += sorted({int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])})
    return x[keep], y[keep]


def smooth(y: Floats, width: int) -> Floats:
    """The mean of `width` values around each; fewer near the ends."""
    index = np.arange(len(y))
    low, high = np.maximum(index - (width - 1) // 2, 0), np.minimum(index + width // 2 + 1, len(y))
    total = np.concatenate([[0.0], np.cumsum(y)])
    return np.asarray((total[high] - total[low]) / (high - low), dtype=np.float64)
