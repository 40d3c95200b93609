"""The pages of the book: one for each lesson, one for the myths, an index, and the page on which NF4 is played with.

A page is one file: style, pictures and script stand in it, and its policy lets nothing be loaded from anywhere, so that it
reads the same from a disk, a server or a mail.  Where a lesson asks for a guess, what computes the answer is folded away
(``<details>``, which needs no script; print shows it).
"""
from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minilora.course.book.prose import Prose, code, printed
from minilora.course.lesson import PREDICT, Lesson
from minilora.course.map import TABLE, Row
from minilora.report.markup import Child, Markup, join, tag

INDEX, MYTHS, NF4 = "index.html", "myths.html", "nf4.html"
PLAYS_WITH_NF4 = (4, 5, 6)          # lessons that send the reader to the page of sliders


@dataclass(frozen=True)
class Place:
    """A page among others: its file, and what its link says."""

    file: str
    title: str


@cache
def beside(name: str) -> str:
    """A file of this folder: style, script, the body of the page of sliders."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def page(title: str, body: Child, before: Place | None = None, after: Place | None = None, script: str = "") -> str:
    """A whole document.

    Args: body: what stands in it. before, after: its neighbours. script: plain JavaScript, or nothing.
    """
    allowed = ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"]
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed.append(f"script-src 'sha256-{digest}'")
    head = tag("head", tag("meta", charset="utf-8"),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("meta", http_equiv="Content-Security-Policy", content="; ".join(allowed)),
               tag("title", title), tag("style", Markup(beside("style.css"))))
    top = tag("nav", tag("a", "minilora: the lessons", href=INDEX), _links(before, after, short=True), class_="top",
              aria_label="the book")
    foot = tag("nav", _links(before, after), class_="bottom", aria_label="next and previous page")
    main = tag("main", Markup("\n"), body, Markup("\n"))
    end = tag("script", Markup(script)) if script else None
    return f'<!DOCTYPE html>\n{tag("html", head, Markup(chr(10)), tag("body", top, main, foot, end), lang="en")}\n'


def _links(before: Place | None, after: Place | None, short: bool = False) -> Markup:
    links = []
    if before is not None:
        links.append(tag("a", "← ", "previous" if short else before.title, href=before.file, rel="prev", class_="prev"))
    if after is not None:
        links.append(tag("a", "next" if short else after.title, " →", href=after.file, rel="next", class_="next"))
    return tag("span", links, class_="links")


def lesson_body(lesson: Lesson, row: Row, prose: Prose, results: Sequence[str], stub: str) -> Markup:
    """A lesson: prose, code, what the code printed, the stub of its exercise.

    Args: row: its line of the map. results: what each cell printed, "" for nothing. stub: the text of the stub's file.
    """
    out: list[Markup] = []
    folded: list[Markup] | None = None          # what answers the question that was asked last
    for cell, result in zip(lesson.cells, results, strict=True):
        if not cell.prose:
            (out if folded is None else folded).extend([code(cell.text), *([printed(result)] if result.strip() else [])])
            continue
        text, question = _without_question(cell.text)
        if cell is lesson.cells[0]:
            text = text.partition("\n")[2]      # the heading, which `_heading` sets
        if folded is not None:
            answer, text = _up_to_heading(text)
            out.append(_fold([*folded, prose.html(answer, lesson.number)]))
            folded = None
        out.append(prose.html(text, lesson.number))
        if question:
            out.append(_guess(prose.html(question, lesson.number), f"{lesson.number:02d}-{cell.line}"))
            folded = []
    return join([_heading(lesson, row), *out, _fold(folded) if folded else None,
                 tag("h3", "What there is to write: ", tag("code", f"lessons/exercises/{lesson.number:02d}.py")), code(stub)])


def _without_question(text: str) -> tuple[str, str]:
    """A prose cell, and the question that it ends with, if it does."""
    before, _, last = text.rstrip().rpartition("\n\n")
    return (before, last) if last.startswith(PREDICT) else (text, "")


def _up_to_heading(text: str) -> tuple[str, str]:
    found = re.search(r"^#+ ", text, re.MULTILINE)
    at = len(text) if found is None else found.start()
    return text[:at], text[at:]


def _heading(lesson: Lesson, row: Row) -> Markup:
    sources = [] if row.sources == "–" else [f"follows {row.sources}"]
    files = [part for file in row.explains for part in (", ", tag("code", file))][1:]
    play = [tag("a", "drag the weights yourself", href=NF4)] if lesson.number in PLAYS_WITH_NF4 else []
    facts = [part for each in [join(["explains ", *files]), *sources, *play] for part in (" · ", each)][1:]
    return join([tag("p", f"Lesson {lesson.number:02d}", class_="number"), tag("h1", lesson.title),
                 tag("p", facts, class_="facts")])


def _guess(question: Markup, name: str) -> Markup:
    return tag("div", question, tag("label", "Your guess ", tag("input", autocomplete="off", name=name)), class_="guess")


def _fold(parts: Sequence[Markup]) -> Markup:
    return tag("details", tag("summary", "I have a guess: compute it"), *parts)


def index_body(text: str, rows: dict[int, Row], prose: Prose, pages: dict[int, str]) -> Markup:
    """The index: the map's text, its table as a list that a phone can show.

    Args: text: of ``lessons/README.md``. pages: the file of each lesson.
    """
    before, _, after = TABLE.sub("\0", text, count=1).partition("\0")
    entries = [tag("li", tag("a", tag("span", f"{row.number:02d}", class_="number"), " ", row.title, href=pages[row.number]),
                   tag("p", "explains ", [part for file in row.explains for part in (", ", tag("code", file))][1:],
                       None if row.sources == "–" else f" · follows {row.sources}", " · you write ",
                       [part for task in row.tasks for part in (", ", tag("code", task))][1:]))
               for row in rows.values()]
    play = tag("p", tag("a", "NF4 by hand", href=NF4), ": drag a distribution of weights and a block size, and watch codes, "
               "error and bits.", class_="play")
    return join([prose.html(before), play, tag("ol", entries, class_="contents"), prose.html(after)])
