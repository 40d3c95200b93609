"""The lessons as shipped: each runs, shows what it says, and redefines nothing that the package has."""
from __future__ import annotations

import ast
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

import minilora
from minilora.cli import main
from minilora.course.lesson import Lesson, lesson_paths, lessons_folder, read_lesson, run_lesson, wrapped
from minilora.course.map import ROW
from minilora.course.progress import EXERCISES, tasks_of
from minilora.errors import ConfigError
from minilora.memory import Workload
from minilora.memory_shared import shares
from minilora.shapes import shape_of

FOLDER = lessons_folder()
LESSONS = [pytest.param(read_lesson(path), id=path.stem) for path in lesson_paths().values()]
EACH = pytest.mark.parametrize("lesson", LESSONS)
PARTS = ("## The question", "**Predict.**", "## The picture", "## Where it lives", "## The trap", "## Your turn")
LARGEST_PICTURE = 60_000        # bytes
EXTRAS = ("mlflow", "pandas", "pyspark", "triton")              # which a reader need not have
NUMBER = re.compile(r"(?<![\w.,/-])\d[\d,]*(?:\.\d+)?(?![\w/])")


def prose(lesson: Lesson) -> str:
    return "\n".join(cell.text for cell in lesson.cells if cell.prose)


def code(lesson: Lesson) -> str:
    return "\n".join(cell.text for cell in lesson.cells if not cell.prose)


def numbers(text: str) -> set[str]:
    """Numbers of three digits or more, without their commas."""
    found = (number.replace(",", "") for number in NUMBER.findall(text.replace("_", "")))
    return {number.rstrip(".") for number in found if sum(digit.isdigit() for digit in number) >= 3}


def unexplained(lesson: Lesson, printed: str) -> set[str]:
    """Numbers of the prose that the code neither holds nor prints; identifiers of papers and threads aside."""
    text = " ".join(re.sub(r"\n    .*", " ", prose(lesson)).split())      # without formulas and commands
    text = re.sub(r"arXiv \d+\.\d+(, \d+\.\d+)*|[\w-]+ ?#\d+|#\d+|`[^`]*`|figures/\S+", " ", text)
    return numbers(text) - numbers(code(lesson)) - numbers(printed)


@EACH
@pytest.mark.timeout(120)
def test_a_lesson_runs_offline_draws_its_picture_and_computes_its_numbers(
        lesson: Lesson, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a lesson reached for the network")

    monkeypatch.setenv("MINILORA_FIGURES", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)            # as if it were not installed
    namespace = run_lesson(lesson, show=lambda text: None)
    printed = capsys.readouterr().out
    drawn, named = {path.name for path in tmp_path.iterdir()}, set(re.findall(r"\(figures/(\S+?)\)", prose(lesson)))
    assert drawn == named and drawn, "the picture that the text shows is the one that the code draws"
    assert unexplained(lesson, printed) == set()
    shadowed = {name for name in minilora.__all__ if name in namespace and namespace[name] is not getattr(minilora, name)}
    assert shadowed == set()


@EACH
def test_a_lesson_has_the_shape_of_a_lesson(lesson: Lesson) -> None:
    assert re.match(rf"# {lesson.number:02d} · \S", lesson.cells[0].text) and lesson.title
    at = [prose(lesson).find(part) for part in PARTS]
    assert -1 not in at and at == sorted(at), dict(zip(PARTS, at, strict=True))
    assert f"minilora check {lesson.number}" in prose(lesson)


@EACH
def test_a_prediction_comes_before_its_answer(lesson: Lesson) -> None:
    for cell, following in zip(lesson.cells, [*lesson.cells[1:], None], strict=True):
        if "**Predict" in cell.text:
            assert following is not None and not following.prose, "code that computes it comes next"
            assert cell.text.rstrip().rpartition("\n\n")[2].startswith("**Predict"), "and nothing stands between"


@EACH
def test_a_lesson_states_what_it_shows_and_asserts_it(lesson: Lesson) -> None:
    tree = ast.parse(code(lesson))
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(tree)) >= 3
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
        "minilora") for alias in node.names}
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert imported and not defined & (imported | set(minilora.__all__))


@EACH
def test_the_files_that_a_lesson_points_to_exist(lesson: Lesson) -> None:
    pointed = re.findall(r"`((?:minilora|tests|scripts|lessons)/[\w/.-]+)`", prose(lesson))
    assert any(path.startswith("minilora/") for path in pointed)
    assert [path for path in pointed if not (FOLDER.parent / path).exists()] == []


@EACH
def test_the_committed_picture_is_small(lesson: Lesson) -> None:
    for name in re.findall(r"\(figures/(\S+?)\)", prose(lesson)):
        picture = FOLDER / "figures" / name
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size < LARGEST_PICTURE, name


# -- the reader of lessons --------------------------------------------------------------------------------------------
def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "07_x.py"
    path.write_text(text)
    return path


def test_cells_are_cut_and_run_in_order_with_the_lines_of_the_file(tmp_path: Path) -> None:
    lesson = read_lesson(write(tmp_path, "# %% [markdown]\n# # 07 · A title\n#\n# Text.\n\n# %%\n\nx = 1\n\n# %%\n1 / 0\n"))
    assert (lesson.number, lesson.title) == (7, "A title")
    assert [(cell.prose, cell.line) for cell in lesson.cells] == [(True, 2), (False, 8), (False, 11)]
    shown: list[str] = []
    with pytest.raises(ZeroDivisionError) as caught:
        run_lesson(lesson, show=shown.append)
    assert caught.traceback[-1].lineno + 1 == 11
    assert "Text." in shown[0] and "| x = 1" in shown[1]


def test_a_prediction_is_waited_for_before_the_code_runs(tmp_path: Path) -> None:
    lesson = read_lesson(write(tmp_path, "# %% [markdown]\n# # 07 · T\n#\n# **Predict.** How many?\n\n# %%\nprint(3)\n"))
    events: list[str] = []
    run_lesson(lesson, show=lambda text: events.append("show"), ask=lambda text: events.append("ask"))
    assert events == ["show", "ask", "show"]


@pytest.mark.parametrize(("text", "words"), [
    ("x = 1\n# %%\n", "line 1: a lesson begins with"),
    ("# %% [markdown]\n# # 07 · T\nx = 1\n", "line 3: prose lines are comments")])
def test_a_file_that_is_no_lesson_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_lesson(write(tmp_path, text))


def test_paragraphs_are_joined_and_all_else_is_left_as_it_is() -> None:
    assert wrapped("One\ntwo.\n\n| a |\n| b |\n\n    y = x") == "One two.\n\n| a |\n| b |\n\n    y = x"


def test_the_check_of_numbers_finds_one_that_is_made_up(tmp_path: Path) -> None:
    said = "It is 4.127 or 1,024, not 0.373 (arXiv 2305.14314)."
    lesson = read_lesson(write(tmp_path, f"# %% [markdown]\n# # 07 · T\n#\n# {said}\n\n# %%\nx = 1024\n"))
    assert unexplained(lesson, "4.127 bits") == {"0.373"}


def test_the_command_lists_lessons_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lesson"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(LESSONS)
    assert main(["lesson", "99"]) == 2
    assert "there is no lesson 99; there are " in capsys.readouterr().err


def test_an_installed_package_says_where_the_lessons_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(minilora, "__file__", str(tmp_path / "site" / "minilora" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["lesson", "2"]) == 2
    assert "they come with the source" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text("def trained_numbers(i, o, r):\n    return r * (i + o)\n")
    assert main(["check", "2", "--file", "mine.py"]) == 2, "a file can be graded without a checkout"
    assert "right  trained_numbers" in capsys.readouterr().out


# -- the map ----------------------------------------------------------------------------------------------------------


def test_the_map_has_a_row_for_each_lesson_with_its_title_files_sources_and_tasks() -> None:
    rows = ROW.findall((FOLDER / "README.md").read_text(encoding="utf-8"))
    assert [row[2] for row in rows] == [path.name for path in lesson_paths().values()]
    for number, title, name, files, sources, tasks in rows:
        lesson = read_lesson(FOLDER / name)
        assert (int(number), title) == (lesson.number, lesson.title)
        text = prose(lesson)
        for file in re.findall(r"`(\S+?)`", files):
            assert file in text and (FOLDER.parent / file).is_file(), f"lesson {number} does not speak of {file}"
        for paper in re.findall(r"arXiv (\S+?)(?:,|$)", sources):
            module_texts = [(FOLDER.parent / file).read_text(encoding="utf-8") for file in re.findall(r"`(\S+?)`", files)]
            assert paper in text or any(paper in module for module in module_texts), f"lesson {number}: {paper}"
        assert re.findall(r"`(\w+)`", tasks) == [task.name for task in tasks_of(int(number))]


@pytest.mark.parametrize(("number", "said", "never"), [
    (3, "tuning it is roughly the same as tuning the learning rate", "Alpha is not a learning rate"),
    (3, "Gaussian in the paper (section 4.1), uniform within 1/√in in loralib, in PEFT and here", None),
    (9, "the package maps a tensor at a time, and lets it go while the next is read", "readinto"),
    (9, "two where the next is read while one is quantized, as the package does", "and one in 16 bits."),
    (18, "The paper writes the norm of each *column*, because its W is (in, out)", None),
    (19, "that takes one gathering for both: two in all, as without", "computed with three times")])
def test_a_lesson_says_of_papers_and_package_what_they_say(number: int, said: str, never: str | None) -> None:
    text = " ".join(prose(read_lesson(lesson_paths()[number])).split())
    assert said in text and (never is None or never not in text)


def test_lesson_19_sends_what_the_package_counts() -> None:
    ddp, fsdp = shares(shape_of("70b"), Workload("qlora", batch=4, gradient_checkpointing=True), 4)
    gathered = fsdp.sent - ddp.sent
    said = f"{gathered / 1e9:.0f}, which is {gathered / ddp.sent:.0f} times the adapters' traffic"
    assert said in prose(read_lesson(lesson_paths()[19]))


def test_every_lesson_has_an_exercise_and_every_exercise_a_lesson() -> None:
    assert tuple(lesson_paths()) == EXERCISES


def test_the_way_in_is_in_the_readme_and_works_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    learn = readme.partition("## Learn")[2].partition("\n## ")[0]
    commands = re.findall(r"^minilora (\w+) (\S+)", learn, re.MULTILINE)
    assert "[Nineteen lessons](lessons/README.md)" in learn and len(LESSONS) == 19
    assert ("lesson", "2") in commands and ("check", "2") in commands and "lessons/exercises/02.py" in learn
    assert main(["check", "2"]) == 2 and "not written yet" in capsys.readouterr().out
