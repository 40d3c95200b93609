"""Who labelled what, when, with which model: a line for each run of `predict`, and no text of any note in it.

    predictions-audit.jsonl, beside the output     appended to and never rewritten; its owner's alone (0600)

    {"user": "mw", "host": "ward3", "started": "2026-01-31T08:00:00Z", "ended": "2026-01-31T08:02:10Z", "outcome": "done",
     "error": null, "model": "tiny", "model_sha256": …, "adapter": "/runs/7", "adapter_sha256": …, "labels_sha256": null,
     "registered": null, "version": null, "input": "/data/new.csv", "input_sha256": …, "output": "/data/labelled.csv",
     "output_sha256": …, "resumed": false, "spark": false, "rows_read": 9000, "rows_predicted": 8990, "rows_in_error": 10}

A file's hash is that which ``sha256sum FILE`` gives; a folder's is that of the list which ``sha256sum`` gives of its files by
name (`digest_of`), so an auditor needs nothing of this package.  A run that fails or is stopped has its line too.  One that
SIGKILL ends has none, nor an output: the run that goes on with it has one, and says that it did.
"""
from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import pwd
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError, OutputError, StoppedError
from minilora.files import disk_reason, file_sha256
from minilora.hub import resolve_model
from minilora.own_base import own_base

FILE = "predictions-audit.jsonl"
# What decides an answer, of a model's folder or an adapter's; a run folder also holds metrics, reports and evaluations.
DECIDING = ("config.json", "adapter_config.json", "adapter_model.safetensors", "minilora.json", "labels.txt", "tokenizer.json",
            "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.index.json")
HEAD = b'{"user": '             # how each line begins
KEYS = {"user", "host", "started", "ended", "outcome", "model"}         # that each line has had in every version


@dataclass
class Tally:
    """Rows of a run, counted while it goes on; None where nobody could count them."""

    rows_read: int | None = 0
    rows_predicted: int | None = 0
    rows_in_error: int | None = 0

    def count(self, errors: Iterable[str | None]) -> None:
        """Add rows, each with what was wrong with it, or None."""
        for error in errors:
            self.rows_read = (self.rows_read or 0) + 1
            self.rows_predicted = (self.rows_predicted or 0) + (error is None)
            self.rows_in_error = (self.rows_in_error or 0) + (error is not None)


@dataclass(frozen=True)
class Asked:
    """What a run of `predict` is asked for.

    Attributes:
        model, adapter, labels: as in `Predictor.load`. registered, version: name in a registry, and which of it.
        data, out: None for a single note. resume, spark: whether it goes on with an earlier one, and who does it.
    """

    model: str
    adapter: str | None = None
    labels: str | None = None
    registered: str | None = None
    version: str | None = None
    data: str | None = None
    out: str | None = None
    resume: bool = False
    spark: bool = False


def digest_of(path: Path, names: Iterable[str] | None = None) -> str | None:
    """Hex SHA-256 of a file, or of the list of a folder's files.

    Args: names: of the files that count, in any order; default all but those whose name begins with a dot or underscore.
    Returns: for a folder, what ``cd FOLDER && LC_ALL=C sha256sum FILES-BY-NAME | sha256sum`` gives; None where neither is.
    Guarantee: that command gives the same (tests/test_audit_log.py).
    """
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        return None
    if names is None:
        names = (str(inner.relative_to(path)) for inner in path.rglob("*") if inner.is_file() and inner.name[0] not in "._")
    lines = (f"{file_sha256(path / name)}  {name}\n" for name in sorted(names, key=os.fsencode))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def model_digest(folder: Path) -> str | None:
    """`digest_of` the files of a model's or an adapter's folder that decide what it answers, its own base among them."""
    inner = own_base(folder) if (folder / DECIDING[1]).is_file() else None
    names = {path.name for path in folder.iterdir() if path.is_file() and _decides(path.name)}
    if inner is not None:
        names |= {str(path.relative_to(folder)) for path in inner.iterdir() if path.is_file()}
    return digest_of(folder, names)


def _check_apart(path: Path, asked: Asked) -> None:
    """Refuse a log that is, or would be, something else that the run reads or writes; nothing is written.

    Raises: OutputError: so.
    """
    place = path.resolve()
    for name, used in (("--data", asked.data), ("--out", asked.out), ("--labels", asked.labels), ("--model", asked.model),
                       ("--adapter", asked.adapter)):
        if used is None or "://" in used:
            continue
        there = Path(used).resolve()
        if name != "--out" and not there.exists():      # a name, such as tiny
            continue
        same = place == there or (path.exists() and there.exists() and path.samefile(there))
        inside = there in place.parents and (name == "--out" or (name != "--data" and _decides(path.name)))
        if same or inside:
            raise OutputError(f"the audit log {path} {'lies in' if inside else 'is'} what {name} names; name another with "
                              "--audit FILE")


def _decides(name: str) -> bool:
    """Whether a file of this name in a model's folder is a part of the model."""
    return name in DECIDING or any(Path(name).match(pattern) for pattern in WEIGHTS)


def _is_log(start: bytes) -> bool:
    """Whether a file that begins so is empty or a log; a power cut may have left half of its first line."""
    line = start.partition(b"\n")[0]
    if not line.startswith(HEAD):
        return not start or (bool(line) and HEAD.startswith(line))
    try:
        found = json.loads(line)
    except ValueError:
        return True
    return isinstance(found, dict) and found.keys() >= KEYS


def _log(path: Path) -> int:
    """The log, open for lines to be added.

    Raises: OutputError: it cannot be, is no file of its own, or holds something else.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OutputError(f"cannot write the audit log {path}: {disk_reason(error)}; name another with --audit FILE") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OutputError(f"the audit log {path} is no plain file; name another with --audit FILE")
    if not _is_log(os.pread(descriptor, 1 << 16, 0)):
        os.close(descriptor)
        raise OutputError(f"{path} is there and is no audit log (its first line is none of one), so nothing is added to it; "
                          "name another with --audit FILE")
    if os.fstat(descriptor).st_mode & 0o077:
        os.fchmod(descriptor, 0o600)
    return descriptor


def _append(descriptor: int, path: Path, record: dict[str, Any]) -> None:
    """One whole line, by one call, alone, and on the disk.

    Raises: OutputError: the disk refuses.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size         # a line that a power cut left half there stays, on a line of its own
        whole = size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"
        line = line if whole else b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError as error:
        raise OutputError(f"cannot write the audit log {path}: {disk_reason(error)}; its line is missing") from None


def _end(descriptor: int, path: Path, record: dict[str, Any], failed: BaseException | None) -> None:
    """`_append`, which takes the place of no other error: of what has failed already the message gets longer.

    Raises: OutputError: the disk refuses, and nothing else has failed.
    """
    try:
        _append(descriptor, path, record)
    except OutputError as error:
        if failed is None:
            raise
        if isinstance(failed, MiniloraError):
            failed.args = (f"{failed.args[0] if failed.args else ''} (and {error})", *failed.args[1:])
        else:
            warnings.warn(str(error), stacklevel=2)


def labelled_by(table: Path) -> dict[str, Any] | None:
    """The line on the run that wrote a table, from the log beside it; None where there is none on these very bytes."""
    log, digest = table.absolute().with_name(FILE), digest_of(table)
    for text in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []):
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and digest is not None and line.get("output_sha256") == digest:
                return line
    return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def _user() -> str:
    """Whose process this is; not what the environment says, which anybody can set."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:            # a container's number without a name
        return f"uid {os.getuid()}"


@contextmanager
def audited(asked: Asked, log: str | Path | None) -> Iterator[Tally]:
    """While the body predicts, note what it does; at its end, whatever that is, a line goes into the log.

    Args: log: the file; None: `FILE` beside the output; without both nothing is written.
    Yields: what the body counts its rows in.
    Raises: OutputError: the log cannot be written, which is found before anything is read; what the body raises, with a remark
        behind it where the line about that cannot be written either.
    Guarantee: nothing of a note, of a row or of an error's text goes in (tests/test_audit_log.py, tests/test_privacy.py).
    """
    tally = Tally()
    if log is None and asked.out is None:
        yield tally
        return
    path = Path(log) if log is not None else Path(str(asked.out)).absolute().with_name(FILE)
    _check_apart(path, asked)
    descriptor = _log(path)
    record: dict[str, Any] = {"user": _user(), "host": platform.node(), "started": _now(), "ended": None, "outcome": "failed",
                              "error": None, "model": asked.model, "model_sha256": None}
    failed: BaseException | None = None
    try:
        try:
            fetched = asked.registered is not None          # into a folder that is gone at the end
            record |= {"adapter": None if fetched else _absolute(asked.adapter), "adapter_sha256": None, "labels_sha256": None,
                       "registered": asked.registered, "version": asked.version, "input": _absolute(asked.data),
                       "input_sha256": None, "output": _absolute(asked.out), "output_sha256": None, "resumed": asked.resume,
                       "spark": asked.spark}
            _describe(record, asked)
            yield tally
            if asked.out is not None:
                with suppress(OSError):
                    record["output_sha256"] = digest_of(Path(asked.out))
            record["outcome"] = "done"
        except BaseException as error:
            record["error"], failed = type(error).__name__, error
            if not isinstance(error, Exception) or isinstance(error, StoppedError):
                record["outcome"] = "stopped"
            raise
        finally:
            record |= {"ended": _now(), "rows_read": tally.rows_read, "rows_predicted": tally.rows_predicted,
                       "rows_in_error": tally.rows_in_error}
            _end(descriptor, path, record, failed)
    finally:
        os.close(descriptor)


def _absolute(path: str | None) -> str | None:
    """As it was named where it lies somewhere else (s3://…), absolute where it lies here."""
    return path if path is None or "://" in path else os.path.abspath(path)


def _describe(record: dict[str, Any], asked: Asked) -> None:
    """Fill in the hashes of what is about to be used."""
    def taken(key: str, path: str | None, digest: Callable[[Path], str | None]) -> None:
        with suppress(OSError, MiniloraError):      # not there, or not to be read: whoever needs it says so better
            record[key] = digest(Path(path)) if path is not None else None

    taken("adapter_sha256", asked.adapter, model_digest)
    taken("labels_sha256", asked.labels, digest_of)
    taken("input_sha256", asked.data, digest_of)
    taken("model_sha256", asked.model, lambda named: model_digest(resolve_model(named)))
