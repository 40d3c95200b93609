"""A run folder, and checkpoints from which a killed run goes on to the same bytes.

    config.toml  labels.txt  metrics.jsonl  tokenizer files  README.md (model card)
    adapter_config.json  adapter_model.safetensors  minilora.json          written when training ends
    checkpoints/step-000200/    adapter.safetensors, optimizer.pt, state.json: the last two are kept

A checkpoint holds all that the next step depends on: adapters, moments, random states, and the position, which is one
number because the order of batches is a function of (seed, epoch).  It is written under another name, synced and renamed,
so a folder that is called step-N is whole.
"""
from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minilora.adapters import adapter_tensors, read_json_object
from minilora.errors import CheckpointError, OutputError
from minilora.files import check_output, new_folder, write_json
from minilora.layers.qlora import lora_layers

KEPT = 2
METRICS_FILE = "metrics.jsonl"


@dataclass
class Position:
    """How far a run has come: optimizer steps done, and the bytes of metrics.jsonl they wrote."""

    step: int = 0
    metrics_bytes: int = 0


def open_run(folder: Path, resume: bool, overwrite: bool) -> None:
    """Make the run folder, or check that it may be gone on with.

    Raises: OutputError: it exists and neither flag was given; or it is to be replaced but is no run folder.
    """
    if resume:
        if not (folder / "config.toml").is_file():
            raise OutputError(f"{folder} holds no run to resume (no config.toml); start it without --resume")
        return
    if overwrite and folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        if not (folder / "config.toml").is_file():
            raise OutputError(f"{folder} exists and is no run folder (no config.toml); choose another --out")
        shutil.rmtree(folder)
    check_output(folder, overwrite=False)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the run folder {folder}: {error.strerror or error}") from None


def save_checkpoint(folder: Path, position: Position, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write checkpoints/step-N and drop all but the newest two."""
    checkpoints = folder / "checkpoints"
    with new_folder(checkpoints / f"step-{position.step:06d}", overwrite=True) as temporary:
        save_file(adapter_tensors(model), temporary / "adapter.safetensors")
        torch.save({"optimizer": optimizer.state_dict(), "cpu_random": torch.get_rng_state(),
                    "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []},
                   temporary / "optimizer.pt")
        write_json(temporary / "state.json", {"step": position.step, "metrics_bytes": position.metrics_bytes})
    for old in sorted(checkpoints.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    for unfinished in checkpoints.glob(".tmp-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def load_checkpoint(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Put the newest whole checkpoint into model, optimizer and random state, and cut metrics.jsonl back to it.

    Returns: its position; step 0 when the run was killed before its first checkpoint.
    Raises: CheckpointError: no checkpoint can be read, or it is of another model.
    """
    newest_first = sorted((path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)),
                          reverse=True)
    problem: Exception | None = None
    for path in newest_first:
        try:
            state = read_json_object(path / "state.json")
            position = Position(int(state["step"]), int(state["metrics_bytes"]))
            tensors = load_file(path / "adapter.safetensors")
            rest = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        except (CheckpointError, SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            problem = error
            continue
        _restore(path, model, optimizer, tensors, rest)
        cut_metrics(folder, position.metrics_bytes)
        return position
    if newest_first:
        raise CheckpointError(f"no checkpoint in {folder / 'checkpoints'} is readable ({type(problem).__name__}); start the "
                              "run anew with --overwrite")
    cut_metrics(folder, 0)
    return Position()


def _restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor],
             rest: dict[str, Any]) -> None:
    expected = adapter_tensors(model)
    if {key: t.shape for key, t in tensors.items()} != {key: t.shape for key, t in expected.items()}:
        raise CheckpointError(f"{path} was written with other LoRA settings or another model; use the run's own config.toml")
    with torch.no_grad():
        for name, layer in lora_layers(model):
            for key, parameter in layer.named_parameters(recurse=True):
                if not key.startswith("base_layer."):
                    parameter.copy_(tensors[f"base_model.model.{name}.{key}"])
    optimizer.load_state_dict(rest["optimizer"])
    torch.set_rng_state(rest["cpu_random"])
    if rest["cuda_random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(rest["cuda_random"])


def cut_metrics(folder: Path, size: int) -> None:
    """Shorten metrics.jsonl to `size` bytes: the steps after the checkpoint are going to be done again."""
    path = folder / METRICS_FILE
    if path.exists() and path.stat().st_size > size:
        with path.open("r+b") as file:
            file.truncate(size)


def append_metrics(folder: Path, values: dict[str, Any]) -> int:
    """Add one line to metrics.jsonl; returns the file's size in bytes after it."""
    with (folder / METRICS_FILE).open("ab") as file:
        file.write((json.dumps(values) + "\n").encode())
        return file.tell()


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource     # absent on Windows, where the GPU branch still works
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
