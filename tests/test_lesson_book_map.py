"""The package points back to its lessons: who opens a file finds the lesson that explains it, and the other way round."""
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from minilora.course.lesson import lessons_folder, read_lesson
from minilora.course.map import read_map

FOLDER = lessons_folder()
ROOT = FOLDER.parent
ROWS = read_map()
COURSE = 19             # lessons of the whole course: a file may point to one that is still to be written
POINTER = re.compile(r"^(?:// )?Lessons? (\d\d(?:, \d\d)*(?: and \d\d)?) explains? it\.$", re.MULTILINE)
FILES = sorted(path for kind in ("*.py", "*.h", "*.cpp") for path in (ROOT / "minilora").rglob(kind))


def opening(path: Path) -> str:
    """The module's docstring, or the comment that a C++ file begins with."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    found = re.match(r"(?://.*\n)*", text)
    return "" if found is None else found[0]


def pointed_to(text: str) -> list[int]:
    """The lessons that an opening names, in its order."""
    return [int(number) for found in POINTER.findall(text) for number in re.findall(r"\d\d", found)]


@pytest.mark.parametrize("number", ROWS)
def test_every_file_that_a_lesson_explains_points_back_to_it(number: int) -> None:
    assert ROWS[number].explains
    assert [file for file in ROWS[number].explains if number not in pointed_to(opening(ROOT / file))] == []


def test_every_lesson_that_a_file_points_to_speaks_of_the_file() -> None:
    pointing = 0
    for path in FILES:
        numbers = pointed_to(opening(path))
        assert numbers == sorted(set(numbers)) and all(1 <= number <= COURSE for number in numbers), path
        pointing += bool(numbers)
        for number in numbers:
            if number in ROWS:
                prose = "\n".join(cell.text for cell in read_lesson(FOLDER / ROWS[number].file).cells if cell.prose)
                assert str(path.relative_to(ROOT)) in prose, f"lesson {number} does not speak of {path.relative_to(ROOT)}"
    assert pointing >= 30


def test_a_pointer_stands_once_and_in_one_form() -> None:
    for path in FILES:
        text = opening(path)
        assert len(POINTER.findall(text)) <= 1, path
        assert len(re.findall(r"^(?:// )?Lessons? \d\d", text, re.MULTILINE)) == len(POINTER.findall(text)), path


@pytest.mark.parametrize(("text", "numbers"), [
    ("Lesson 06 explains it.", [6]), ("// Lesson 17 explains it.", [17]), ("Lessons 02, 03 and 18 explain it.", [2, 3, 18]),
    ("A lesson 06 explains it.", []), ("Lesson 06 explains it, more or less.", [])])
def test_the_reader_of_pointers_finds_what_is_one(text: str, numbers: list[int]) -> None:
    assert pointed_to(f"The idea.\n\n{text}\n") == numbers
