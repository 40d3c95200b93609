"""What can go wrong for a user, in one line each.

Every exception that a bad input can cause is one of these.  Its text is a single line: what is wrong, where (file, row,
key) and what to do.  The command line prints that line and ends with exit code 2; nothing else of minilora catches them.
Note text is patient data: no message quotes it.  What a message quotes of a file may hold line breaks and the codes that move a
terminal's cursor; they come out as they are written in Python.
"""
from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class MiniloraError(Exception):
    """Base of the package's errors; ``str(error)`` is one line for the user.

    Guarantee: no control character is in it, whatever it quotes (tests/llama/test_strange_files.py).
    """

    def __str__(self) -> str:
        return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], super().__str__())


class DataError(MiniloraError):
    """A table of notes is missing, malformed, or lacks a column, a label or rows."""


class CheckpointError(MiniloraError):
    """A model folder, weight file, tokenizer, adapter or 4-bit state cannot be used."""


class ConfigError(MiniloraError):
    """A hyper-parameter, flag or run.toml entry is out of its range or contradicts another."""


class HubError(MiniloraError):
    """A hub id cannot be turned into files: offline, missing, gated, wrong token or revision."""


class OutputError(MiniloraError):
    """An output exists already, is in use by another run, or cannot be written."""


class StoppedError(MiniloraError):
    """A run was asked to stop by a signal, and did: its checkpoint is written.

    Args: message: the line. signal: number of the signal; the command line ends with 128 + signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class QuantizationError(MiniloraError, ValueError):
    """A tensor cannot be quantized: not finite, not floating point, or an impossible block size."""


TO_TAKE_LESS = ("lower --batch-size and raise --accumulate, lower --max-length, or add --gradient-checkpointing and, on a GPU, "
                "--activation-offloading")          # memory, in training


def memory_reason(error: BaseException) -> str | None:
    """What was said when no memory was left, in one line; None for any other error.

    Trap: on a CPU torch says it in a plain RuntimeError, on a GPU in an error of its own, and of pinned host memory as CUDA
    does.
    """
    said = (str(error).splitlines() or [""])[0]
    known = (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in said
             or "CUDA error: out of memory" in said)
    return (said or "no memory left")[:100] if known else None
