"""Run folders and evaluations as training and evaluate leave them, without training or evaluating anything."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.config import TrainConfig
from minilora.data.tables import write_labels
from minilora.duplicates import Twins
from minilora.evaluate import evaluate, save_evaluation
from minilora.evaluation import Scored
from tests.notes import LABELS, SECRET

COUNTERS = {"faults": 3, "evictions": 2, "bytes_in": 8192, "bytes_out": 4096, "stall_seconds": 0.01}


def metrics_lines(steps: int, paged: bool = False) -> list[dict[str, Any]]:
    """A line a step; the counters grow by `COUNTERS`."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {"step": step, "loss": 3.0 / step, "lr": 1e-3 / step, "tokens": 90 + step % 7, "seconds": 0.1,
                                "peak_bytes": 10 ** 9, "grad_norm": 2.0 / step}
        if paged:
            line |= {"evicted_bytes": 0, **{name: step * value for name, value in COUNTERS.items()}}
        if step % 10 == 0 or step == steps:
            line["val_loss"] = 3.3 / step
        lines.append(line)
    return lines


def write_run(folder: Path, steps: int = 30, labels: Sequence[str] = tuple(LABELS), finished: bool = True,
              lines: Sequence[dict[str, Any]] | None = None, **settings: Any) -> Path:
    """A run folder with its configuration, metrics and labels; a finished one has a card and minilora.json."""
    folder.mkdir(parents=True)
    config = TrainConfig(**{"model": "tiny", "data": "train.csv", "out": str(folder), **settings})
    config.save(folder / "config.toml")
    write_labels(folder / "labels.txt", list(labels))
    written = lines if lines is not None else metrics_lines(steps, config.optimizer == "paged_adamw")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    if finished:
        (folder / "minilora.json").write_text("{}\n")
        (folder / "README.md").write_text(
            "| | |\n| --- | --- |\n| trained numbers | 1,024 of 9,999 (10.24%) |\n"
            f"| data | 240 notes, {len(labels)} labels, SHA-256 0123abcd |\n| made with | minilora 0.1.0, torch 2.13.0 |\n")
    return folder


def write_scores(folder: Path, labels: Sequence[str] = tuple(LABELS), n: int = 60, wrong: int = 4, free: str | None = None,
                 columns: tuple[str, str] = ("input", "label"), others: dict[str, int] | None = None, twins: int | None = None,
                 adapter: str | None = None, embedder: str = "base") -> Path:
    """An evaluation of n rows, each `wrong`-th answered with the next label.

    Args:
        free: an answer that is no label, given to the last row. others: other methods, wrong in each so-many-th row.
        twins: so many rows stand in a training table. adapter: hash of the adapter that it says it is of; None leaves
        all of `scored` out.
    """
    folder.mkdir(parents=True)
    references = [labels[index % len(labels)] for index in range(n)]
    predictions = [labels[(index + (index % wrong == 0)) % len(labels)] for index in range(n)]
    if free is not None:
        predictions[-1] = free
    chances = [0.5 + 0.49 * (index % 11) / 11 for index in range(n)]

    def embed(texts: Sequence[str]) -> Tensor:
        return torch.eye(len(texts)) + 0.9

    def answers(every: int) -> list[str]:
        return [labels[(index + (index % every == 1)) % len(labels)] for index in range(n)]
    near = Twins(np.array([float(row < twins) for row in range(n)]), np.zeros(n, np.int64)) if twins is not None else None
    scores = evaluate(predictions, references, embed, probabilities=chances, resamples=20, labels=labels,
                      ranked=[(answer, *(label for label in labels[:3] if label != answer)) for answer in predictions],
                      others={name: answers(every) for name, every in (others or {}).items()}, twins=near)
    if adapter is not None:
        scores = dataclasses.replace(scores, scored=Scored("tiny", adapter, "0" * 64, "1" * 64, embedder, len(labels), "0.1.0"))
    rows = [{columns[0]: f"{SECRET} {index}: pain", columns[1]: label} for index, label in enumerate(references)]
    save_evaluation(scores, folder, rows, predictions, chances)
    return folder
