"""A lesson is a script in percent cells; this reads one, and runs it as a reader would: prose, code, what the code prints.

    # %% [markdown]         the comment lines that follow are prose
    # %%                    the lines that follow are code

Jupyter and VS Code open the same file as a notebook.  All code cells share one namespace, as there.
"""
from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minilora
from minilora.errors import ConfigError

MARK = re.compile(r"^# %%(?P<prose> \[markdown\])?\s*$")
PREDICT = "**Predict"           # a prose cell with this asks for a number
WIDTH = 100


@dataclass(frozen=True)
class Cell:
    """Prose (Markdown, without the comment signs) or code, and the number of the line in the file where its text begins."""

    prose: bool
    text: str
    line: int


@dataclass(frozen=True)
class Lesson:
    """One file of the course."""

    number: int
    path: Path
    cells: list[Cell]

    @property
    def title(self) -> str:
        """What stands behind the number in the first heading."""
        return self.cells[0].text.splitlines()[0].lstrip("# ").partition("·")[2].strip()


def lessons_folder() -> Path:
    """The checkout's ``lessons``: beside the package, or in the folder one is in.

    Raises: ConfigError: there is none.
    """
    for folder in (Path(minilora.__file__).resolve().parents[1] / "lessons", Path.cwd() / "lessons"):
        if (folder / "exercises").is_dir():
            return folder
    raise ConfigError("the lessons are not here: they come with the source and not with the installed package; clone the "
                      "repository, and run this in it")


def lesson_paths(folder: Path | None = None) -> dict[int, Path]:
    """The lessons by number."""
    return {int(path.name[:2]): path for path in sorted((folder or lessons_folder()).glob("[0-9][0-9]_*.py"))}


def list_lessons() -> str:
    """A line for each lesson."""
    return "\n".join(f"{number:2d}  {read_lesson(path).title}" for number, path in lesson_paths().items())


def find_lesson(number: int) -> Lesson:
    """The lesson of that number.

    Raises: ConfigError: there is none; says which there are.
    """
    paths = lesson_paths()
    if number not in paths:
        raise ConfigError(f"there is no lesson {number}; there are {', '.join(map(str, paths))}")
    return read_lesson(paths[number])


def read_lesson(path: Path) -> Lesson:
    """Cut a file into cells.

    Raises: ConfigError: text before the first cell, or a prose line that is no comment.
    """
    cells: list[Cell] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        mark = MARK.match(line)
        if mark:
            cells.append(Cell(bool(mark["prose"]), "", number + 1))
        elif not cells:
            raise ConfigError(f"{path}, line {number}: a lesson begins with # %% [markdown]")
        else:
            last = cells[-1]
            if last.prose and line.strip() and not line.startswith("#"):
                raise ConfigError(f"{path}, line {number}: prose lines are comments; begin code with # %%")
            cells[-1] = Cell(last.prose, last.text + (line[1:].removeprefix(" ") if last.prose else line) + "\n", last.line)
    blank = [len(cell.text) - len(cell.text.lstrip("\n")) for cell in cells]
    return Lesson(int(path.name[:2]), path, [Cell(cell.prose, cell.text.strip("\n") + "\n", cell.line + above)
                                             for cell, above in zip(cells, blank, strict=True)])


def run_lesson(lesson: Lesson, show: Callable[[str], object] = print, ask: Callable[[str], object] | None = None
               ) -> dict[str, Any]:
    """Show the prose, show and run the code.

    Args:
        show: what is called with each piece of text. ask: called with a question where a prediction is wanted, and waited
            for; None goes on.

    Returns: the names that the lesson has defined.
    Raises: whatever the code raises; its line numbers are those of the file.
    """
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(lesson.path)}
    for cell in lesson.cells:
        if cell.prose:
            show("\n" + wrapped(cell.text))
            if ask is not None and PREDICT in cell.text:
                ask("your guess (Enter goes on): ")
            continue
        show("\n" + textwrap.indent(cell.text.rstrip(), "    | ", lambda _: True) + "\n")
        # Line breaks in front, so that a traceback names the line in the file.
        exec(compile("\n" * (cell.line - 1) + cell.text, str(lesson.path), "exec"), namespace)
    return namespace


def wrapped(markdown: str) -> str:
    """Prose for a terminal: paragraphs joined and cut at `WIDTH`; headings, lists, tables and indented lines as they are."""
    out: list[str] = []
    for block in re.split(r"\n\s*\n", markdown.strip("\n")):
        lines = block.splitlines()
        plain = not any(re.match(r"(#|\||    |[-*] |\d+\. |!\[|```)", line) for line in lines)
        out.append(textwrap.fill(" ".join(lines), WIDTH, break_long_words=False, break_on_hyphens=False) if plain else block)
    return "\n\n".join(out)
