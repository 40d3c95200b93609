"""The map of the course, read from ``lessons/README.md``: which files of the package a lesson explains, and what it asks for.

    | [06 Double quantization](06_double_quantization.py) | `minilora/quant/nf4.py` | arXiv 2305.14314 | `encode_absmax` |
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from minilora.course.lesson import lesson_paths, lessons_folder
from minilora.errors import ConfigError

ROW = re.compile(r"^\| \[(\d\d) (.+?)\]\((\S+?)\) \| (.*?) \| (.*?) \| (.*?) \|$", re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*\n?)+", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One lesson.

    Attributes:
        file: its script. explains: files of the package. sources: papers, as text. tasks: what the reader writes.
    """

    number: int
    title: str
    file: str
    explains: tuple[str, ...]
    sources: str
    tasks: tuple[str, ...]


def read_map(folder: Path | None = None) -> dict[int, Row]:
    """The rows by the lesson's number.

    Raises: ConfigError: a lesson has no row, or a row no lesson.
    """
    folder = folder or lessons_folder()
    text = (folder / "README.md").read_text(encoding="utf-8")
    rows = {int(number): Row(int(number), title, file, tuple(re.findall(r"`(\S+?)`", explains)), sources,
                             tuple(re.findall(r"`(\w+)`", tasks)))
            for number, title, file, explains, sources, tasks in ROW.findall(text)}
    if rows.keys() != lesson_paths(folder).keys():
        odd = sorted(rows.keys() ^ lesson_paths(folder).keys())
        raise ConfigError(f"{folder / 'README.md'}: the table and the lessons beside it differ in {', '.join(map(str, odd))}")
    return rows
