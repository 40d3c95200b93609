"""What a run folder tells, finished or not.

A run that was killed has its configuration, its labels and a line of metrics for each step, the last of which may be cut
short.  Whatever is missing is named in the page; whatever is broken ends with one line.
"""
from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from minilora.adapters import EXTRA_FILE
from minilora.config import TrainConfig, read_toml
from minilora.data.tables import read_labels
from minilora.errors import CheckpointError, DataError
from minilora.metrics import Floats
from minilora.runs import CONFIG_FILE, METRICS_FILE

COUNTERS = ("faults", "evictions", "bytes_in", "bytes_out", "stall_seconds")
NUMBERS = ("loss", "lr", "tokens", "seconds", "peak_bytes", "grad_norm", "val_loss", "evicted_bytes", *COUNTERS)


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl by column: steps (S,), and each number (S,), NaN at a step that lacks it; `cut`: its last line was."""

    steps: Floats
    columns: dict[str, Floats]
    cut: bool

    def series(self, name: str) -> tuple[Floats, Floats]:
        """Steps that have a number, and the numbers."""
        values = self.columns[name]
        known = ~np.isnan(values)
        return self.steps[known], values[known]


@dataclass(frozen=True)
class RunFiles:
    """A run folder that was read; `card` holds the rows of its model card, `labels` its label set, empty if absent."""

    folder: Path
    config: TrainConfig
    metrics: Metrics
    labels: list[str]
    card: dict[str, str]
    finished: bool
    last_written: datetime


def read_run(folder: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        CheckpointError: no such folder, or none of a run. ConfigError: its config.toml. DataError: its metrics or labels.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name the run folder that train wrote (--out)")
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} is no run folder (no {CONFIG_FILE}); name the one that train wrote (--out)")
    config = TrainConfig(**read_toml(folder / CONFIG_FILE))
    path = folder / METRICS_FILE
    metrics = read_metrics(path)
    labels = read_labels(folder / "labels.txt") if (folder / "labels.txt").is_file() else []
    return RunFiles(folder, config, metrics, labels, _read_card(folder / "README.md"), (folder / EXTRA_FILE).is_file(),
                    datetime.fromtimestamp(path.stat().st_mtime, timezone.utc))


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl; a last line without its end is what a kill in mid-write leaves, and is dropped.

    Raises: DataError: no whole step in it, or a line that no training wrote.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from None
    *lines, rest = content.split(b"\n")
    rows = [_read_line(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]
    if not rows:
        raise DataError(f"{path} holds no whole step yet; report the run after its first step")
    steps = [row["step"] for row in rows]
    late = next((number for number, (a, b) in enumerate(pairwise(steps), start=2) if b <= a), None)
    if late is not None:
        raise DataError(f"{path} line {late}: step {steps[late - 1]:.0f} comes after step {steps[late - 2]:.0f}; go on with "
                        "train --resume, which cuts the file back")
    columns = {name: np.array([row.get(name, math.nan) for row in rows]) for name in NUMBERS}
    return Metrics(np.array(steps), columns, cut=bool(rest))


def _read_line(line: bytes, where: str) -> dict[str, float]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise DataError(f"{where} is no JSON object; the file is damaged: go on from the last checkpoint with train --resume")
    row = {}
    for name in ("step", *NUMBERS):
        if name in values:
            number = finite(values[name])
            if number is None or (name == "step" and not (number >= 1 and number.is_integer())):
                raise DataError(f"{where}: {name} is no number that training writes; go on from the last checkpoint with train "
                                "--resume")
            row[name] = number
    if "step" not in row or "loss" not in row:
        raise DataError(f"{where} lacks {'loss' if 'step' in row else 'step'}; is this the metrics.jsonl of a run?")
    return row


def finite(value: Any) -> float | None:
    """A JSON number as a float; None if it is something else, or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _read_card(path: Path) -> dict[str, str]:
    """The table of a model card, which training writes when it ends; empty without one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    return dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", text, flags=re.MULTILINE))
