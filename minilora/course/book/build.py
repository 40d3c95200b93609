"""Both forms of the course from its scripts.

    OUT/notebooks/06_double_quantization.ipynb                                     `notebook`
    OUT/book/index.html, 06_double_quantization.html, …, nf4.html, myths.html      `pages`
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from minilora.course.book.notebook import notebook
from minilora.course.book.pages import INDEX, MYTHS, NF4, PLAYS_WITH_NF4, Place, beside, index_body, lesson_body, page
from minilora.course.book.prose import Prose
from minilora.course.lesson import Lesson, lesson_paths, lessons_folder, read_lesson
from minilora.course.map import read_map
from minilora.files import Kind, check_output, write_text
from minilora.quant.codebooks import DYNAMIC_8BIT, NF4_CODE
from minilora.report.markup import Markup

MADE_HERE = re.compile(r"\d\d_\w+\.(?:html|ipynb)")        # a lesson's, of this name or of one that it had before
TITLES = {INDEX: "The lessons", MYTHS: "What people get wrong about QLoRA", NF4: "NF4 by hand"}


def build(out: Path, results: Callable[[Lesson], Sequence[str]] | None = None) -> list[Path]:
    """Write notebooks and book.

    Args:
        out: a new folder, or one that this has written before; its files are replaced.
        results: what gives the printed text of each cell (`results.results`), or None for a book without it.

    Returns: the files, the book's index first.
    Raises:
        OutputError: `out` holds something else, or cannot be written.
        ConfigError: the lessons are not here, or link to what is not.
    """
    source = lessons_folder()
    lessons = [read_lesson(path) for path in lesson_paths(source).values()]
    check_output(out, overwrite=True, kind=Kind(f"book/{INDEX}"))
    made = _book(source, lessons, results)
    files = {out / "book" / name: text for name, text in made.items()}
    files |= {out / "notebooks" / f"{lesson.path.stem}.ipynb": notebook(lesson) for lesson in lessons}
    for folder in {path.parent for path in files}:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if MADE_HERE.fullmatch(path.name) and path not in files:
                path.unlink()
    for path, text in files.items():            # the index first: it marks the folder as this one's, should a kill come now
        write_text(path, text)
    return list(files)


def _book(source: Path, lessons: Sequence[Lesson], results: Callable[[Lesson], Sequence[str]] | None) -> dict[str, str]:
    """The text of every page, by its name, the index first."""
    rows = read_map(source)
    names = {lesson.number: f"{lesson.path.stem}.html" for lesson in lessons}
    links = {lesson.path.name: names[lesson.number] for lesson in lessons} | {"MYTHS.md": MYTHS, "README.md": INDEX}
    prose = Prose(source, links, names)
    places = [Place(INDEX, TITLES[INDEX]), *(Place(names[lesson.number], f"{lesson.number:02d} {lesson.title}")
                                             for lesson in lessons), Place(MYTHS, TITLES[MYTHS])]
    bodies = [index_body((source / "README.md").read_text(encoding="utf-8"), rows, prose, names)]
    for lesson in lessons:
        stub = (source / "exercises" / f"{lesson.number:02d}.py").read_text(encoding="utf-8")
        shown = results(lesson) if results is not None else [""] * len(lesson.cells)
        bodies.append(lesson_body(lesson, rows[lesson.number], prose, shown, stub))
    bodies.append(prose.html((source / "MYTHS.md").read_text(encoding="utf-8")))
    made = {}
    for at, (place, body) in enumerate(zip(places, bodies, strict=True)):
        made[place.file] = page(place.title, body, places[at - 1] if at else None,
                                places[at + 1] if at + 1 < len(places) else None)
    before, after = (places[number] for number in PLAYS_WITH_NF4[-2:])      # a lesson's number is its place: the index has 0
    made[NF4] = page(TITLES[NF4], Markup(beside("nf4.html")), before, after, script())
    return made


def script() -> str:
    """The JavaScript of the page of sliders: the package's own tables, the arithmetic, the drawing."""
    tables = {"NF4_CODE": NF4_CODE, "DYNAMIC_8BIT": DYNAMIC_8BIT}
    written = [f"const {name} = Float32Array.from({json.dumps(table.tolist())});\n" for name, table in tables.items()]
    return '"use strict";\n' + "".join(written) + beside("nf4.js") + beside("nf4_page.js")
