"""A lesson's text as HTML: Markdown by markdown-it-py, code coloured by Pygments, equations set here.

Equations are indented blocks, written as people type them,

    θ ← θ − lr · m̂ / (√v̂ + ε)      m̂ = m / (1 − 0.9ᵗ)

and are set in the browser's own fonts, so that no library has to be loaded: a letter that stands alone is a variable, in
italics, and what three spaces or more keep apart are columns, which a phone shows one under the other.  An indented block in
which nothing stands in relation to anything is a command.
"""
from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.errors import ConfigError
from minilora.report.markup import Markup, escape, join, tag

try:
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
except ModuleNotFoundError as missing:
    raise ConfigError(f"the book of lessons needs {missing.name}: pip install -e '.[book]'") from None

RELATION = re.compile(r" [=←≈≤≥∝↦] ")           # an indented block without one is for the terminal
COLUMNS = re.compile(r" {3,}")
NAME = re.compile(r"[^\W\d_]\w*")
RAISED = "ᵀᵗⁿⁱʳ⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ₜ₀₁₂₃₄₅₆₇₈₉"      # exponents and indices that are characters of their own
LESSON = re.compile(r"\b([Ll]esson )(\d\d)\b")


class Prose:
    """Markdown of one folder of lessons.

    Args:
        folder: where pictures lie. links: the page for each file that the text may link to; pages: for each lesson's number.
    """

    def __init__(self, folder: Path, links: Mapping[str, str], pages: Mapping[int, str]) -> None:
        self.folder, self.links, self.pages = folder, links, pages
        # Raw HTML stays text: a lesson that speaks of <s> means the token.
        self._markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
        self._renderer = RendererHTML()
        self._markdown.renderer = self._renderer
        for name in ("code_block", "fence", "image", "text", "link_open", "table_open", "table_close"):
            self._renderer.rules[name] = getattr(self, f"_{name}")

    def html(self, text: str, here: int = 0) -> Markup:
        """Markdown as HTML.

        Args: here: the lesson that it belongs to, which does not link to itself.
        Raises: ConfigError: a link to what is no page of the book, or a picture that is not there.
        """
        return Markup(self._markdown.render(text, {"here": here}))

    def _code_block(self, tokens: Sequence[Any], at: int, options: Any, env: Any) -> str:
        text = tokens[at].content.strip("\n")
        return equation(text) if RELATION.search(text) else command(text)

    def _fence(self, tokens: Sequence[Any], at: int, options: Any, env: Any) -> str:
        text = tokens[at].content.strip("\n")
        return code(text) if tokens[at].info.strip() == "python" else command(text)

    def _image(self, tokens: Sequence[Any], at: int, options: Any, env: Any) -> str:
        return tag("span", tag("img", src=inlined(self.folder / tokens[at].attrs["src"]), alt=tokens[at].content),
                   class_="picture")

    def _text(self, tokens: Sequence[Any], at: int, options: Any, env: Any) -> str:
        def linked(found: re.Match[str]) -> str:
            page = self.pages.get(int(found[2]))
            return found[0] if page is None or int(found[2]) == env["here"] else tag("a", found[0], href=page)

        return LESSON.sub(linked, escape(tokens[at].content))

    def _link_open(self, tokens: Sequence[Any], at: int, options: Any, env: Any) -> str:
        href = tokens[at].attrs["href"]
        if not href.startswith("https://"):
            if href not in self.links:
                raise ConfigError(f"a lesson links to {href}, which is no page of the book")
            tokens[at].attrs["href"] = self.links[href]
        return str(self._renderer.renderToken(tokens, at, options, env))

    def _table_open(self, *_: Any) -> str:
        return '<div class="scroll"><table>\n'

    def _table_close(self, *_: Any) -> str:
        return "</table></div>\n"


def inlined(path: Path) -> str:
    """A PNG as a data URL, so that a page is one file.

    Raises: ConfigError: it is not there.
    """
    try:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such picture; run the lesson that draws it") from None


def command(text: str) -> Markup:
    """What is typed into a terminal."""
    return tag("pre", text, class_="command")


def code(text: str) -> Markup:
    """Python, coloured."""
    return tag("pre", tag("code", Markup(highlight(text, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip("\n"))),
               class_="code", tabindex=0)


def printed(text: str) -> Markup:
    """What a cell wrote."""
    return tag("pre", tag("samp", text.rstrip("\n")), class_="printed", tabindex=0)


def equation(text: str) -> Markup:
    """An indented block of equations, a line each, in columns."""
    rows = [COLUMNS.split(line.strip()) for line in text.splitlines() if line.strip()]
    lines = [tag("div", [tag("span", typeset(cell)) for cell in row], class_="line") for row in rows]
    return tag("div", lines, class_="equation" if len(rows) == 1 else "equation aligned", role="math",
               aria_label="; ".join(map(", ".join, rows)))


def typeset(text: str) -> Markup:
    """One equation: letters that stand alone become variables, ``x_i`` gets its index below the line, all else stays."""
    out, end = [], 0
    for found in NAME.finditer(text := unicodedata.normalize("NFC", text)):
        if found.start() < end:
            continue
        out.append(escape(text[end : found.start()]))
        end = found.end()
        while end < len(text) and unicodedata.combining(text[end]):     # the hat of v̂ is a character of its own
            end += 1
        out.append(_name(text[found.start() : end]))
    return join([*out, escape(text[end:])])


def _name(word: str) -> Markup:
    """A name: Δ stands upright before it, exponents behind it; Σ is no name."""
    if word == "Σ":
        return escape(word)
    sign = word[0] if word[0] == "Δ" and len(word) > 1 else ""
    base, _, index = word[len(sign) :].partition("_")
    letters = base.rstrip(RAISED)
    alone = sum(not unicodedata.combining(character) for character in letters) == 1
    if index and not alone:                                             # nested_absmax
        return escape(word)
    return join([escape(sign), tag("var", letters) if alone else escape(letters), escape(base[len(letters) :]),
                 tag("sub", index) if index else None])
