"""Being asked to stop: Ctrl-C, `kill`, a cluster's time limit, a terminal that closes.

While steps are taken the first signal only asks: the step is finished, a checkpoint is written, and the run ends with a line
that says how to go on.  The second ends at once; what is lost are the steps since the last checkpoint.  Everywhere else SIGTERM
ends a command as Ctrl-C does, through the blocks that remove half-written files, and not in the middle of one.
"""
from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


OURS = ("minilora", "minilora.exe", "-m")       # what a program is called; the last while python -m looks for the module


class Request:
    """Whether one was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def asked_to_stop(quiet: bool = False) -> Iterator[Request]:
    """In the block the first signal is noted, the second raises KeyboardInterrupt.

    Args: quiet: say nothing when the first one comes.

    Signals that the process was started to ignore (nohup, a shell's background jobs) stay ignored.
    """
    request = Request()

    def ask(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)
        if not quiet:
            _say(f"\nminilora: {request.signal.name}: the step is finished and saved; a second signal ends at once\n")

    with _handled(ASKING, ask):
        yield request


@contextmanager
def terminated_cleanly() -> Iterator[None]:
    """In the block SIGTERM raises SystemExit(143), so that what is half written is removed."""
    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handled((signal.SIGTERM,), leave):
        yield


def reader_gone() -> bool:
    """Whether nobody reads the standard output any more; what it still holds goes nowhere then.

    Trap: the interpreter flushes it once more when it ends, and would say a second time that it can't.
    """
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):       # none, or one that is no file of the system
        return False
    watched = select.poll()
    watched.register(output, 0)                         # whether it is broken is told unasked
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    return True


@contextmanager
def imports() -> Iterator[None]:
    """Around imports, which take seconds: Ctrl-C in the middle of them ends the command in one line, with exit code 130.

    In any other program than ours (``minilora``, ``python -m minilora``) it is raised as ever.
    """
    try:
        yield
    except KeyboardInterrupt:
        if os.path.basename(sys.argv[0] if getattr(sys, "argv", None) else "") not in OURS:
            raise
        _say("minilora: stopped\n")
        raise SystemExit(130) from None


@contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Put a handler on signals for the length of the block; in other threads than the first nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    mine = [number for number, was in before.items() if was not in (signal.SIG_IGN, None)]
    try:
        for number in mine:
            signal.signal(number, handler)
        yield
    finally:
        for number in mine:
            if signal.getsignal(number) is handler:     # else the block has decided otherwise, for what comes after it too
                signal.signal(number, before[number])


def _say(text: str) -> None:
    """Write to the error stream from within a handler: Python's own stream may be in the middle of a line."""
    with suppress(OSError):     # the terminal is gone
        os.write(2, text.encode())
