"""HTML and SVG as nested calls, escaped by construction.

A label may be ``<script>``, a column ``"onload=``: so text becomes `Markup` only through `tag`, which escapes every child
and attribute that is not `Markup` already.  What comes out is HTML5 that an XML parser reads as well.
"""
from __future__ import annotations

import html
import re
from collections.abc import Iterable

VOID = {"meta", "link", "br", "hr"}
SHAPES = {"line", "circle", "rect", "path", "polyline"}     # of SVG: close themselves when they hold nothing
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]")


class Markup(str):
    """Text that is HTML already."""


Child = str | int | None | Iterable["Child"]


def escape(text: str) -> Markup:
    """Text as HTML; characters that no HTML may hold become U+FFFD."""
    return Markup(html.escape(_CONTROL.sub("\ufffd", text)))


def join(children: Child) -> Markup:
    """Children one after the other; None is nothing, what is no `Markup` is escaped."""
    if children is None:
        return Markup()
    if isinstance(children, Markup):
        return children
    if isinstance(children, (str, int)):
        return escape(str(children))
    return Markup("".join(join(child) for child in children))


def tag(name: str, /, *children: Child, **attributes: str | int | float | None) -> Markup:
    """An element.

    Args:
        attributes: a trailing underscore is dropped and others become hyphens (``class_``, ``stroke_width``); None is left
            out. A float is rounded to a tenth: the pixels of a chart.
    """
    written = []
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.1f}" if isinstance(value, float) else str(value)
            written.append(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    inner = join(children)
    if name in VOID or (name in SHAPES and not inner):
        return Markup(f"<{name}{''.join(written)}/>")
    return Markup(f"<{name}{''.join(written)}>{inner}</{name}>")


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], numbers: Iterable[int] = (), class_: str | None = None
          ) -> Markup:
    """A table that scrolls sideways where the page is narrow.

    Args: numbers: columns, from 0, that are set as numbers (to the right, figures of one width).
    """
    right, titles = set(numbers), list(head)
    kind = ["num" if index in right else None for index in range(len(titles))]
    body = [tag("tr", [tag("td", cell, class_=kind[index]) for index, cell in enumerate(row)]) for row in rows]
    return tag("div", tag("table", tag("thead", tag("tr", [tag("th", cell, class_=kind[index], scope="col")
                                                           for index, cell in enumerate(titles)])),
                          tag("tbody", body), class_=class_), class_="scroll")
