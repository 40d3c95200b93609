"""An exercise as a whole, and the way through the course."""
from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from minilora.course.grading import Task, Verdict, grade, load_answers
from minilora.course.lesson import lesson_paths, lessons_folder, read_lesson
from minilora.errors import ConfigError, MiniloraError

EXERCISES = tuple(sorted(int(path.stem[-2:]) for path in Path(__file__).parent.glob("exercise_[0-9][0-9].py")))
HERE = ("lessons/exercises", "exercises")       # where a course that somebody copied keeps them
SIGNS = {"right": "right", "open": "open ", "wrong": "WRONG"}


def tasks_of(number: int) -> tuple[Task, ...]:
    """The tasks of an exercise.

    Raises: ConfigError: there is none of that number.
    """
    if number not in EXERCISES:
        raise ConfigError(f"there is no exercise {number}; there are {', '.join(map(str, EXERCISES))}")
    tasks: tuple[Task, ...] = importlib.import_module(f"minilora.course.exercise_{number:02d}").TASKS
    return tasks


def stub_of(number: int) -> Path:
    """The file in which the exercise is written: in the folder one is in, or else in the checkout.

    Raises: ConfigError: neither is there.
    """
    name = f"{number:02d}.py"
    here = next((path for folder in HERE if (path := Path.cwd() / folder / name).is_file()), None)
    return here or lessons_folder() / "exercises" / name


def check(number: int, path: str | Path | None = None) -> list[Verdict]:
    """Grade a file; default `stub_of` the exercise.

    Raises: ConfigError: no such exercise or file, or the file cannot be run.
    """
    tasks = tasks_of(number)
    path = Path(path) if path is not None else stub_of(number)
    answers = load_answers(path)
    return [grade(task, getattr(answers, task.name, None), path) for task in tasks]


def format_verdicts(number: int, verdicts: list[Verdict], path: Path) -> str:
    """The file, and a line for each task; what is wrong stands under it."""
    lines = [f"exercise {number:02d}, {path}"]
    for verdict in verdicts:
        lines.append(f"  {SIGNS[verdict.state]}  {verdict.task}" + ("  (not written yet)" if verdict.state == "open" else ""))
        if verdict.state == "wrong":
            lines.append(f"         {verdict.message}")
    return "\n".join(lines)


def print_verdicts(number: int, path: str | None = None) -> None:
    """Grade a file and say what became of it.

    Raises: ConfigError: as `check`. MiniloraError: not all of it is right.
    """
    tasks_of(number)                        # refuses a number that is none
    file = Path(path) if path is not None else stub_of(number)
    verdicts = check(number, file)
    print(format_verdicts(number, verdicts, file))
    right = sum(verdict.state == "right" for verdict in verdicts)
    if right < len(verdicts):
        raise MiniloraError(f"exercise {number}: {right} of {len(verdicts)} right")


@dataclass(frozen=True)
class Standing:
    """How far the reader is with one exercise."""

    number: int
    title: str
    right: int
    tasks: int
    trouble: str = ""
    path: Path | None = None

    @property
    def done(self) -> bool:
        """Whether all of it is right."""
        return self.right == self.tasks


def standings() -> list[Standing]:
    """Every exercise of the course, graded."""
    titles = {number: read_lesson(path).title for number, path in lesson_paths().items()}
    found = []
    for number in EXERCISES:
        trouble, path = "", stub_of(number)
        try:
            verdicts = check(number, path)
        except ConfigError as error:
            verdicts, trouble = [], str(error)
        wrong = next((verdict for verdict in verdicts if verdict.state == "wrong"), None)
        if wrong is not None:
            trouble = f"{wrong.task}: {wrong.message}"
        found.append(Standing(number, titles.get(number, ""), sum(verdict.state == "right" for verdict in verdicts),
                              len(tasks_of(number)), trouble, path))
    return found


def format_standings(found: list[Standing]) -> str:
    """A line for each exercise, and what comes next."""
    lines = []
    for each in found:
        bar = "#" * each.right + "." * (each.tasks - each.right)
        lines.append(f"  {each.number:02d}  [{bar:<4}]  {each.title}")
        if each.trouble:
            lines.append(" " * 14 + each.trouble)
    folders = dict.fromkeys(str(each.path.parent) for each in found if each.path is not None)
    lines += [f"graded: {', '.join(folders)}"] if folders else []
    done, following = sum(each.done for each in found), next((each for each in found if not each.done), None)
    lines.append(f"{done} of {len(found)} exercises done" + ("" if following is None else
                 f"; next: minilora lesson {following.number}, lessons/exercises/{following.number:02d}.py, "
                 f"minilora check {following.number}"))
    return "\n".join(lines)
