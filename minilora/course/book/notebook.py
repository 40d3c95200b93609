"""A lesson as a Jupyter notebook: the same cells, in nbformat 4.5.

    {"cells": [{"cell_type": "markdown" | "code", "id": …, "source": [lines], …}, …], "metadata": …, "nbformat": 4, …}

Pictures travel as attachments of their cell, so that a notebook is one file wherever it lies.  Outputs are left out: a lesson
asks for a guess before it computes, and a notebook that has been run has no questions left.

Source: the notebook file format, nbformat.readthedocs.io/en/latest/format_description.html
"""
from __future__ import annotations

import base64
import json
import re
from typing import Any

from minilora.course.lesson import Cell, Lesson
from minilora.errors import ConfigError

PICTURE = re.compile(r"\]\(figures/([\w.-]+)\)")


def notebook(lesson: Lesson) -> str:
    """The lesson as the text of an .ipynb file.

    Raises: ConfigError: a picture that the text shows is not there.
    Guarantee: its cells are the script's, in order, and its code runs as the script does (tests/test_lesson_book.py).
    """
    content = {"cells": [_cell(lesson, index, cell) for index, cell in enumerate(lesson.cells)],
               "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                            "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
                            "title": f"{lesson.number:02d} · {lesson.title}"},
               "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _cell(lesson: Lesson, index: int, cell: Cell) -> dict[str, Any]:
    text = cell.text.rstrip("\n")
    found: dict[str, Any] = {"cell_type": "markdown" if cell.prose else "code", "id": f"cell-{index:02d}", "metadata": {}}
    if not cell.prose:
        return found | {"execution_count": None, "outputs": [], "source": text.splitlines(keepends=True)}
    names = PICTURE.findall(text)
    if names:
        found["attachments"] = {name: {"image/png": _picture(lesson, name)} for name in names}
    return found | {"source": PICTURE.sub(r"](attachment:\1)", text).splitlines(keepends=True)}


def _picture(lesson: Lesson, name: str) -> str:
    path = lesson.path.parent / "figures" / name
    if not path.is_file():
        raise ConfigError(f"{path}: no such picture; run the lesson that draws it")
    return base64.b64encode(path.read_bytes()).decode()
