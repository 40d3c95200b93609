"""A run folder: who may read it and write into it, and the lines that its steps write.

An adapter is trained on notes, and can in part give them back: a new run's folder is its owner's alone (mode 0700), also
where it stood there empty.  Whoever shares one changes that, and a run that goes on leaves it.

    config.toml  labels.txt  metrics.jsonl  tokenizer files  README.md (model card)
    adapter_config.json  adapter_model.safetensors  minilora.json          written when training ends; after full tuning
    config.json  model.safetensors  minilora.json                          these, i.e. the run folder is the model's
    base/                                                                  the base, where training began by changing it
    checkpoints/                                                           see `run_checkpoints`
    report.html  evaluation/  mlflow.json                                  what other commands put here

With --overwrite a run takes the place of one that holds these alone (`KIND`).
"""
from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from minilora.errors import OutputError
from minilora.files import MODEL_FILES, TEMPORARY, Kind, check_output, clear_leftovers, disk_reason
from minilora.locks import LOCK_FILE, FolderLock, refuse_if_locked

METRICS_FILE, CONFIG_FILE, CHECKPOINTS = "metrics.jsonl", "config.toml", "checkpoints"
KIND = Kind(CONFIG_FILE, (*MODEL_FILES, CONFIG_FILE, METRICS_FILE, CHECKPOINTS, "adapter_config.json",
                          "adapter_model.safetensors", "base", "report.html", "evaluation", "mlflow.json"))


def check_run(folder: Path, resume: bool, overwrite: bool, reads: Iterable[str | Path | None] = ()) -> None:
    """Refuse a run folder that cannot be made, replaced or gone on with; changes nothing.

    Args: reads: what training reads, which must not be overwritten (`check_output`).

    Raises: OutputError: it exists and neither flag was given; it is to be replaced or resumed but is no run folder, or holds
        anything else as well; or a run is in it at this moment.
    """
    if resume and not (folder / CONFIG_FILE).is_file():
        raise OutputError(f"{folder} holds no run to resume (no {CONFIG_FILE}); start it without --resume")
    refuse_if_locked(folder)
    if not resume:
        check_output(folder, overwrite, KIND, reads)


def open_run(folder: Path, resume: bool, overwrite: bool, reads: Iterable[str | Path | None] = ()) -> FolderLock:
    """Make the run folder, or clear what a killed write left in the one that is gone on with, and lock it.

    Args: as of `check_run`.

    Returns: the lock, to be released at the end.
    Raises: OutputError: see `check_run`; or the disk refuses.
    """
    check_run(folder, resume, overwrite, reads)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the run folder {folder}: {error.strerror or error}") from None
    lock = FolderLock(folder)
    try:
        if resume:
            clear_leftovers(folder, keep=LOCK_FILE)
        else:
            check_output(folder, overwrite, KIND, reads)     # once more: another run may have come and gone
            if folder.stat().st_mode & 0o077:       # it stood there already
                folder.chmod(0o700)
            _clear(folder)
    except OSError as error:
        lock.release()
        raise OutputError(f"cannot clear the run folder {folder}: {error.strerror or error}") from None
    except OutputError:
        lock.release()
        raise
    return lock


def _clear(folder: Path) -> None:
    """Empty a run folder.

    The order makes a kill in the middle harmless: without checkpoints nothing of the old run is ever gone on with, and as
    long as anything is there the configuration says that this is a run folder, which may be overwritten.
    """
    if (folder / CHECKPOINTS).exists():
        (folder / CHECKPOINTS).rename(folder / f"{TEMPORARY}{os.getpid()}-{CHECKPOINTS}")
    clear_leftovers(folder, keep=LOCK_FILE)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def cut_metrics(folder: Path, size: int) -> None:
    """Shorten metrics.jsonl to `size` bytes: the steps after the checkpoint are going to be done again.

    One that is shorter than that has lost lines, which changes no weight: it is cut to its last whole line, with a warning.
    """
    path = folder / METRICS_FILE
    content = path.read_bytes()[:size] if path.exists() else b""
    if len(content) < size:
        warnings.warn(f"{path} has lost lines of steps that were done; the run goes on without them", stacklevel=2)
    if path.exists():
        os.truncate(path, content.rfind(b"\n") + 1)


def append_metrics(folder: Path, values: dict[str, Any]) -> int:
    """Add one line to metrics.jsonl; returns the file's size in bytes after it."""
    try:
        with (folder / METRICS_FILE).open("ab") as file:
            file.write((json.dumps(values, allow_nan=False) + "\n").encode())
            file.flush()
            return file.tell()
    except OSError as error:
        raise OutputError(f"cannot write {folder / METRICS_FILE}: {disk_reason(error)}; free some space, then go on with "
                          "--resume") from error


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl; empty before the first step."""
    path = folder / METRICS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    try:
        return dict(json.loads(lines[-1])) if lines else {}
    except ValueError:          # a line that somebody changed: its loss is shown and nothing else
        return {}


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Trap: on Linux getrusage also counts what the parent process held when it started this one.
    found = _from_status("VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """What this process holds in memory now, or, where the system does not tell, the most it held."""
    found = _from_status("VmRSS")
    return peak_bytes(torch.device("cpu")) if found is None else found


def _from_status(field: str) -> int | None:
    """Bytes that Linux gives under this name; None on other systems."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None
