"""The graders: stubs are open, the package's functions are right, and every listed mistake gets its own hint."""
from __future__ import annotations

import ast
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.cli import main
from minilora.course import grading
from minilora.course.grading import Mistake, Task, difference, grade
from minilora.course.lesson import lesson_paths
from minilora.course.progress import EXERCISES, check, format_standings, standings, stub_of, tasks_of
from minilora.errors import ConfigError
from minilora.stopping import terminated_cleanly

TASKS = [pytest.param(task, id=f"{number:02d}-{task.name}") for number in EXERCISES for task in tasks_of(number)]
MISTAKES = [pytest.param(task, mistake, id=f"{number:02d}-{task.name}-{index}") for number in EXERCISES
            for task in tasks_of(number) for index, mistake in enumerate(task.mistakes)]
EACH = pytest.mark.parametrize("number", EXERCISES)


@EACH
def test_every_stub_is_open(number: int) -> None:
    assert {verdict.state for verdict in check(number)} == {"open"}


@EACH
def test_every_stub_has_the_tasks_of_its_grader_with_types_and_a_docstring(number: int) -> None:
    tree = ast.parse(stub_of(number).read_text(encoding="utf-8"))
    found = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert list(found) == [task.name for task in tasks_of(number)]
    for name, node in found.items():
        assert len((ast.get_docstring(node) or "").split()) >= 8, name
        functions = [node] if isinstance(node, ast.FunctionDef) else [n for n in node.body if isinstance(n, ast.FunctionDef)]
        for function in functions:
            arguments = [argument for argument in function.args.args if argument.arg not in ("self",)]
            assert function.returns is not None and all(argument.annotation for argument in arguments), name


@EACH
def test_every_exercise_belongs_to_a_lesson_and_knows_three_mistakes(number: int) -> None:
    assert number in lesson_paths()
    mistakes = [mistake for task in tasks_of(number) for mistake in task.mistakes]
    assert len(mistakes) >= 3 and len({mistake.hint for mistake in mistakes}) == len(mistakes)


@pytest.mark.parametrize("task", TASKS)
def test_the_package_is_right(task: Task) -> None:
    verdict = grade(task, task.solution)
    assert verdict.state == "right", verdict.message


@pytest.mark.parametrize(("task", "mistake"), MISTAKES)
def test_every_mistake_gets_its_own_hint(task: Task, mistake: Mistake) -> None:
    verdict = grade(task, mistake.answer)
    assert (verdict.state, verdict.message) == ("wrong", mistake.hint)


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_that_is_nothing_or_raises_is_wrong(task: Task) -> None:
    def nothing(*_: Any) -> None:
        return None

    def broken(*_: Any) -> None:
        raise ValueError("no idea")

    nothing.apply, broken.apply = nothing, broken       # type: ignore[attr-defined]    # where a class is asked for
    assert grade(task, nothing).state == "wrong"
    verdict = grade(task, broken)
    assert verdict.state == "wrong" and "ValueError: no idea" in verdict.message
    assert grade(task, None).state == "open"


DOUBLED = Task("double", lambda x: 2 * x, fixed=((torch.tensor([1.0, -2.0, 0.5]),),),
               mistakes=(Mistake("that is the square", lambda x: x * x),))


@pytest.mark.parametrize(("given", "words"), [
    (torch.tensor([2.0, -4.0]), "expected the shape (3,), found (2,)"),
    (torch.tensor([2, -4, 1]), "expected torch.float32, found torch.int64"),
    (torch.tensor([2.0, -4.0, float("nan")]), "1 of 3 entries differ; at [2] found nan, right is 1"),
    (torch.tensor([2.0, 4.0, 1.0]), "at [1] found 4, right is -4"),
    ([2.0, -4.0, 1.0], "expected a tensor of shape (3,), found [2.0, -4.0, 1.0]"),
    (torch.tensor([1.0, 4.0, 0.25]), "that is the square"),
])
def test_what_no_mistake_explains_is_told_by_its_first_difference(given: Any, words: str) -> None:
    verdict = grade(DOUBLED, lambda x: given)
    assert verdict.state == "wrong" and words in verdict.message


def test_an_answer_cannot_change_the_inputs_under_the_grader() -> None:
    assert grade(DOUBLED, lambda x: x.mul_(2)).state == "right"
    assert grade(DOUBLED, lambda x: x.zero_()).state == "wrong"
    assert grade(DOUBLED, lambda x: 2 * x).state == "right"


@pytest.mark.parametrize(("given", "right"), [
    (True, 1), (1, True), (1.0, 1), ([1, 2], [1, 2, 3]), ({"a": 1}, {"a": 1, "b": 2}), (None, [1]), ([1, None], [1, 2]),
    (float("nan"), 1.0), ("1", 1.0), (torch.tensor(1), torch.tensor(2)), ([1, 2], {"a": 1})])
def test_things_of_other_kinds_differ(given: Any, right: Any) -> None:
    assert difference(given, right, 1e-5) is not None
    assert difference(right, right, 1e-5) is None


def test_the_first_of_several_mistakes_is_the_one_that_explains_most_inputs() -> None:
    some, always = (lambda x: x if x < 2 else 7), (lambda x: x)
    task = Task("f", lambda x: x + 1, fixed=((1,), (2,), (3,)), mistakes=(Mistake("some", some), Mistake("always", always)))
    assert grade(task, always).message == "always"
    assert grade(task, some).message == "some"


def test_a_file_that_cannot_be_run_is_told_with_its_line(tmp_path: Path) -> None:
    divided = "ZeroDivisionError: division by zero (line 3)"
    for text, words in (("x = 1\ny = (\n", "line 2"), ("import torch\n\n1 / 0\n", divided)):
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(ConfigError, match="cannot be run") as caught:
            grading.load_answers(tmp_path / "a.py")
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="no file"):
        grading.load_answers(tmp_path / "b.py")
    with pytest.raises(ConfigError, match="no Python file"):
        (tmp_path / "c.txt").write_text("")
        grading.load_answers(tmp_path / "c.txt")


def test_the_command_grades_a_file_and_names_the_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def trained_numbers(i, o, r):\n    return r * i * o\n")
    assert main(["check", "2", "--file", str(file)]) == 2
    printed = capsys.readouterr()
    assert "their sizes are added" in printed.out and "open   low_rank" in printed.out
    assert printed.err == "minilora: exercise 2: 0 of 2 right\n"
    file.write_text("from minilora.layers.starts import low_rank\n\ndef trained_numbers(i, o, r):\n    return r * (i + o)\n")
    assert main(["check", "2", "--file", str(file)]) == 0
    assert capsys.readouterr().out == f"exercise 02, {file}\n  right  trained_numbers\n  right  low_rank\n"
    file.write_text("def trained_numbers(i, o, r):\n    return r / 0\n")
    assert main(["check", "2", "--file", str(file)]) == 2
    assert "ZeroDivisionError: division by zero (line 2)" in capsys.readouterr().out


def test_an_answer_that_ends_the_program_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import sys\n\ndef trained_numbers(i, o, r):\n    sys.exit(0)\n")
    assert main(["check", "2", "--file", str(file)]) == 2
    assert "WRONG  trained_numbers" in (out := capsys.readouterr().out) and "it ends the program (line 4)" in out
    file.write_text("import sys\nsys.exit(0)\n")
    assert main(["check", "2", "--file", str(file)]) == 2
    assert "mine.py cannot be run: it ends the program (line 2)" in capsys.readouterr().err


def test_a_signal_that_ends_the_command_is_no_answer() -> None:
    def killed(x: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return 2 * x

    with terminated_cleanly(), pytest.raises(SystemExit) as stop:
        grade(DOUBLED, killed)
    assert stop.value.code == 143


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such alarm on this system")
def test_an_answer_that_never_ends_is_stopped_and_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "LIMIT", 0.3)
    file, before = tmp_path / "mine.py", signal.getsignal(signal.SIGALRM)
    loop = "    while True:\n        try:\n            pass\n        except Exception:\n            pass\n"
    file.write_text(f"def trained_numbers(i, o, r):\n{loop}")
    assert main(["check", "2", "--file", str(file)]) == 2
    assert "WRONG  trained_numbers\n         it is still running after 0.3 s" in capsys.readouterr().out
    file.write_text("while True:\n    pass\n")
    assert main(["check", "2", "--file", str(file)]) == 2
    assert "mine.py cannot be run: it is still running after 0.3 s" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("folder", ["lessons/exercises", "exercises"])
def test_the_exercise_in_the_folder_one_is_in_is_graded_and_its_path_told(
        tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / folder / "02.py"
    mine.parent.mkdir(parents=True)
    mine.write_text("from minilora.layers.starts import low_rank\n\ndef trained_numbers(i, o, r):\n    return r * (i + o)\n")
    monkeypatch.chdir(tmp_path)
    assert main(["check", "2"]) == 0 and f"exercise 02, {mine}\n" in capsys.readouterr().out
    assert main(["check", "3"]) == 2, "which is not there"
    assert f"exercise 03, {checkout_folder() / '03.py'}\n" in capsys.readouterr().out
    assert main(["check", "--all"]) == 0 and f"graded: {checkout_folder()}, {mine.parent}" in capsys.readouterr().out


def checkout_folder() -> Path:
    return Path(grading.__file__).parents[2] / "lessons" / "exercises"


def test_the_command_refuses_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "99"]) == 2
    assert "there is no exercise 99; there are " in capsys.readouterr().err
    assert main(["check"]) == 2


def test_progress_is_shown_for_all_and_says_what_comes_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    first = EXERCISES[0]
    assert main(["check", "--all"]) == 0
    assert f"0 of {len(EXERCISES)} exercises done; next: minilora lesson {first}" in capsys.readouterr().out
    (tmp_path / "bad.py").write_text("raise KeyError('x')\n")
    (tmp_path / "half.py").write_text("def trained_numbers(i, o, r):\n    return r * (i + o)\n")
    files = {2: tmp_path / "half.py", EXERCISES[-1]: tmp_path / "bad.py"}
    monkeypatch.setattr("minilora.course.progress.stub_of", lambda number: files.get(number, stub_of(number)))
    found = {each.number: each for each in standings()}
    assert (found[2].right, found[2].done, found[2].trouble) == (1, False, "")
    assert found[EXERCISES[-1]].right == 0 and "KeyError" in found[EXERCISES[-1]].trouble
    assert "[#." in format_standings(list(found.values()))
