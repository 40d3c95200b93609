"""Grading an exercise: the reader's function against the package's, on fixed and on random inputs, with the mistake named.

A mistake is a function.  Whoever scales by r instead of alpha / r gives, for the same input, what such a formula gives; so
each exercise lists its common mistakes as functions, each with a hint, and the grader looks which of them the reader's answers
equal.  The tests hand in every mistake and see its own hint come back (tests/test_lessons_exercises.py).

What no mistake explains is told by its first difference: a shape, a dtype, a position.
"""
from __future__ import annotations

import importlib.util
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from minilora import stopping
from minilora.errors import ConfigError

LIMIT = 60.0                        # seconds that a task may take, and the file around it
ROUNDS = 12                         # random inputs a task, after the fixed ones
State = Literal["right", "open", "wrong"]
NUMBERS = (int, float)


@dataclass(frozen=True)
class Mistake:
    """A common wrong answer: what it computes, and what to tell whoever computed it."""

    hint: str
    answer: Any


class TookTooLong(BaseException):
    """An answer is still running after `LIMIT` seconds.  Not an Exception: a loop that catches those would go on."""

    def __str__(self) -> str:
        return f"still running after {LIMIT:g} s"


@contextmanager
def _limited() -> Iterator[None]:
    """Raise TookTooLong in the block when the time is up, and each second from there: what catches it is told again.

    Only where the system has such an alarm (not Windows) and in the first thread; else nothing is limited.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def up(*_: Any) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, up)
    try:
        signal.setitimer(signal.ITIMER_REAL, LIMIT, 1.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def call(answer: Callable[..., Any], *inputs: Any) -> Any:
    """The usual probe: what the function returns."""
    return answer(*inputs)


@dataclass(frozen=True)
class Task:
    """One function (or class) that the reader writes.

    Attributes:
        name: in the reader's file. solution: the package's.
        fixed: inputs worth looking at. random: draws one more. mistakes: see `Mistake`.
        probe: turns an answer and an input into what is compared: a tensor, a number, a list, a tuple or a dict of these.
        tolerance: of the largest right entry, for floating results; integers are compared exactly.
    """

    name: str
    solution: Any
    fixed: tuple[tuple[Any, ...], ...]
    mistakes: tuple[Mistake, ...]
    random: Callable[[torch.Generator], tuple[Any, ...]] | None = None
    probe: Callable[..., Any] = call
    tolerance: float = 1e-5

    def inputs(self) -> Iterator[tuple[Any, ...]]:
        """Fixed inputs, then random ones from seeds that never change; new tensors each time."""
        yield from (_copy(each) for each in self.fixed)
        if self.random is not None:
            for seed in range(ROUNDS):
                yield self.random(torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Verdict:
    """What became of one task: right, open (not written yet) or wrong, and what to tell the reader."""

    task: str
    state: State
    message: str


def load_answers(path: str | Path) -> ModuleType:
    """Run the reader's file.

    Raises: ConfigError: no such file, or it cannot be run; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}: start from the stub in lessons/exercises")
    spec = importlib.util.spec_from_file_location(f"exercise_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        with _limited():
            spec.loader.exec_module(module)
    except TookTooLong as error:
        raise ConfigError(f"{path} cannot be run: it is {error}") from None
    except (Exception, SystemExit) as error:
        _let_go(error)
        raise ConfigError(f"{path} cannot be run: it {_told(error, path)}") from error
    return module


def grade(task: Task, answer: Any, path: Path | None = None) -> Verdict:
    """Hold one answer against the package's.

    Args:
        answer: what the reader's file calls `task.name`, or None where it has no such name.
        path: the reader's file, whose line is named where it raises.

    Returns: the first thing that is wrong; where a listed mistake gives the same, its hint.
    """
    if answer is None:
        return Verdict(task.name, "open", f"the file has no {task.name}")
    try:
        with _limited():
            return _graded(task, answer, path)
    except TookTooLong as error:
        return Verdict(task.name, "wrong", f"it is {error}: is there a loop that never ends?")


def _graded(task: Task, answer: Any, path: Path | None) -> Verdict:
    for inputs, again in zip(task.inputs(), task.inputs(), strict=True):
        right = task.probe(task.solution, *inputs)
        try:
            given = task.probe(answer, *again)
        except (Exception, SystemExit) as error:
            _let_go(error)
            if isinstance(error, NotImplementedError) and _is_stub(error, path):
                return Verdict(task.name, "open", "not written yet")
            return Verdict(task.name, "wrong", f"for {shown(inputs)} it {_told(error, path)}")
        found = difference(given, right, task.tolerance)
        if found is not None:
            hint = _hint(task, answer, given, inputs)
            return Verdict(task.name, "wrong", hint or f"for {shown(inputs)}: {found}")
    return Verdict(task.name, "right", "right")


def _hint(task: Task, answer: Any, given: Any, inputs: tuple[Any, ...]) -> str | None:
    """The hint of the mistake that explains this answer, and of several the one that explains most inputs."""
    candidates = [mistake for mistake in task.mistakes
                  if difference(given, _quiet(task, mistake.answer, inputs), task.tolerance) is None]
    if len(candidates) > 1:
        everywhere = [(_quiet(task, answer, each), each) for each in task.inputs()]
        candidates.sort(key=lambda mistake: -sum(
            difference(said, _quiet(task, mistake.answer, each), task.tolerance) is None for said, each in everywhere))
    return candidates[0].hint if candidates else None


def _quiet(task: Task, answer: Any, inputs: tuple[Any, ...]) -> Any:
    try:
        return task.probe(answer, *_copy(inputs))
    except (Exception, SystemExit) as error:
        _let_go(error)
        return error


def _let_go(error: BaseException) -> None:
    """Raise again what no answer raised: a SIGTERM (`stopping.terminated_cleanly`)."""
    if isinstance(error, SystemExit) and traceback.extract_tb(error.__traceback__)[-1].filename == stopping.__file__:
        raise error


def difference(given: Any, right: Any, tolerance: float) -> str | None:
    """The first thing in which an answer differs from the right one, in words; None where nothing does."""
    if isinstance(right, Tensor):
        return _tensor_difference(given, right, tolerance)
    if isinstance(right, dict):
        found = given if isinstance(given, dict) else {}
        parts = ((f"{name}: ", found.get(name), right[name]) for name in right)
    elif isinstance(right, (tuple, list)):
        if not isinstance(given, (tuple, list)) or len(given) != len(right):
            have = f"{len(given)} of them" if isinstance(given, (tuple, list)) else _short(given)
            return f"expected {len(right)} values, found {have}"
        parts = ((f"value {index + 1} of {len(right)}: ", *pair)
                 for index, pair in enumerate(zip(given, right, strict=True)))
    elif isinstance(right, float):
        near = isinstance(given, NUMBERS) and abs(given - right) <= tolerance * max(abs(right), 1e-30)
        return None if near else _of_another_type(given, right) or f"found {_short(given)}, right is {right:.6g}"
    else:
        same = type(given) is type(right) and given == right
        return None if same else _of_another_type(given, right) or f"found {_short(given)}, right is {_short(right)}"
    for name, one, other in parts:
        inside = difference(one, other, tolerance)
        if inside is not None:
            return name + inside
    return None


def _of_another_type(given: Any, right: Any) -> str | None:
    """What to return instead of a number that torch or numpy made, or of a float that is a whole number."""
    if type(right) not in NUMBERS:
        return None
    wanted = "return an int: use int(...)" if isinstance(right, int) else "return a float: use float(...)"
    if isinstance(given, float):
        return f"found the float {_short(given)}, {wanted} or //" if given == right else None
    of_one = given.numel() == 1 if isinstance(given, Tensor) else hasattr(given, "__float__") and not isinstance(given, int)
    return f"found a {type(given).__name__.lower()}, {wanted}" if of_one else None


def _tensor_difference(given: Any, right: Tensor, tolerance: float) -> str | None:
    if not isinstance(given, Tensor):
        return f"expected a tensor of shape {tuple(right.shape)}, found {_short(given)}"
    if given.shape != right.shape:
        return f"expected the shape {tuple(right.shape)}, found {tuple(given.shape)}"
    if right.is_floating_point():
        if not given.is_floating_point():
            return f"expected {right.dtype}, found {given.dtype}"
        room = tolerance * float(right.abs().max()) if right.numel() else 0.0
        wrong = ~((given.double() - right.double()).abs() <= room)          # NaN is wrong as well
    else:
        if given.dtype != right.dtype:
            return f"expected {right.dtype}, found {given.dtype}"
        wrong = given != right
    if not wrong.any():
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    return f"{int(wrong.sum())} of {right.numel()} entries differ; at {list(at)} found {_short(given[at].item())}, " \
           f"right is {_short(right[at].item())}"


def shown(inputs: tuple[Any, ...]) -> str:
    """An input in a few words: small things as they are, tensors of more than eight numbers by their shape, others by type."""
    return "(" + ", ".join(_short(each) for each in inputs) + ")"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return str([float(f"{x:.4g}") for x in value.flatten().tolist()]) if value.numel() <= 8 and value.dim() == 1 else \
            f"<{kind} {'x'.join(map(str, value.shape))}>"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = repr(value)
    return text if len(text) <= 60 else f"<{type(value).__name__}>"


def _copy(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


def _is_of(frame: traceback.FrameSummary, path: Path | None) -> bool:
    return path is not None and Path(frame.filename).resolve() == path.resolve()


def _is_stub(error: NotImplementedError, path: Path | None) -> bool:
    """Whether the reader's file itself raises it: torch does so as well, for types that an operation doesn't take."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return _is_of(last, path) and "raise NotImplementedError" in (last.line or "")


def _told(error: BaseException, path: Path | None) -> str:
    """An exception in one line, with the last line of the reader's file on the way to it."""
    line = error.lineno if isinstance(error, SyntaxError) else next(
        (frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__)) if _is_of(frame, path)), None)
    words = (str(error).splitlines() or [""])[0]
    said = "ends the program" if isinstance(error, SystemExit) else f"raises {type(error).__name__}: {words}"
    return said + (f" (line {line})" if line else "")
