"""What a long prediction has answered so far, so that a killed one goes on and ends with the bytes of one that was not.

The output appears whole or not at all, and a Parquet file cannot be appended to.  So the answers alone go to a file beside it,
a line for each chunk of rows, synced as soon as the chunk is done:

    {"of": hash of model and settings, "pid": 4711}
    {"notes": SHA-256 of the chunk's notes, "answers": [["CT Brain", 0.93, null, "MR Brain", 0.04], ...]}

To resume is to read the input again from its first row and to take the answers from there as far as they go: whole chunks
only, because numbers of a batch depend in their last bits on who shares it.  A chunk whose notes have changed, and all that
follow, are asked again.  Answers may say what is wrong with somebody: the file is its owner's alone.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from minilora.errors import OutputError
from minilora.files import disk_reason
from minilora.locks import locked

Answer = list[Any]      # the cells that are added to a row, in their order


def journal_path(out: str | Path) -> Path:
    """Where the answers of an unfinished output are kept."""
    return Path(out).with_name(f".{Path(out).name}.answers")


def check_unfinished(out: str | Path, resume: bool, overwrite: bool) -> None:
    """Refuse to begin an output anew that was interrupted, unless that is what is asked for.

    Raises: OutputError.
    """
    if journal_path(out).exists() and not resume and not overwrite:
        raise OutputError(f"{out}: an earlier prediction of it was interrupted, or is still running; go on with --resume, or "
                          "begin anew with --overwrite")


def _digest(notes: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(notes)).encode()).hexdigest()


class Journal:
    """Context manager: the answers of an output, taken from an earlier run as far as they go and written down from there.

    Args:
        out: the output, whose journal it is. of: hash of everything that decides an answer beside the note.
        resume: use what is there; otherwise it is removed.

    Attributes: rows: that are written down.
    Raises: OutputError: another run holds it, it is of another model or other settings, or the disk refuses.
    Guarantee: a chunk is either there whole or not at all (tests/test_resume.py).
    """

    def __init__(self, out: Path, of: str, resume: bool) -> None:
        self.out, self.path, self.of, self.resume, self.rows = out, journal_path(out), of, resume, 0
        self._file: IO[bytes] | None = None
        self._reading = False

    def __enter__(self) -> Journal:
        self._file = self._earlier()
        if self._file is not None and not self.resume:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
        if self._file is not None:
            head = self._line()
            if head is None or head.get("of") != self.of:
                self._file.close()
                raise OutputError(f"{self.out}: the interrupted prediction was of another model, adapter, label set, prompt or "
                                  "setting; name the same ones, or begin anew with --overwrite")
            if isinstance(head.get("pid"), int):        # whoever wrote it is gone, or the lock were taken
                self.out.with_name(f".tmp-{head['pid']}-{self.out.name}").unlink(missing_ok=True)
            self._reading = True
        return self

    def _earlier(self) -> IO[bytes] | None:
        """What an earlier run left, locked; None where there is nothing."""
        try:
            file = self.path.open("r+b")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"cannot read {self.path}: {disk_reason(error)}; remove it, and begin anew") from error
        self._lock(file)
        return file

    def _lock(self, file: IO[bytes]) -> None:
        if not locked(file.fileno()):
            file.close()
            raise self._taken()

    def _taken(self) -> OutputError:
        return OutputError(f"{self.out}: another prediction is writing it; wait for its end, or choose another --out")

    def _line(self) -> dict[str, Any] | None:
        """The next line, or None where there is none that is whole."""
        text = self._file.readline() if self._file is not None else b""
        try:
            value = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def recorded(self, notes: Sequence[str]) -> list[Answer] | None:
        """The answers to the next chunk if they are known; from the first that is not, none is."""
        if not self._reading or self._file is None:
            return None
        start, line = self._file.tell(), self._line()
        if line is None or line.get("notes") != _digest(notes) or len(line.get("answers", ())) != len(notes):
            self._file.seek(start)
            self._file.truncate()
            self._reading = False
            return None
        self.rows += len(notes)
        return list(line["answers"])

    def record(self, notes: Sequence[str], answers: Sequence[Answer]) -> None:
        """Write down the answers to the next chunk, and sync."""
        try:
            if self._file is None:                      # lazily: a short table leaves no trace
                self._file = os.fdopen(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "r+b")
                self._lock(self._file)
                self._file.write(json.dumps({"of": self.of, "pid": os.getpid()}).encode() + b"\n")
            line = json.dumps({"notes": _digest(notes), "answers": list(answers)}, allow_nan=False)
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except FileExistsError as error:
            raise self._taken() from error
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {disk_reason(error)}; make room and go on with --resume") from error
        self.rows += len(notes)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            if error is None and self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                self.path.unlink()
            self._file.close()
