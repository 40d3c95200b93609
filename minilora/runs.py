"""A run folder, and checkpoints from which a killed run goes on to the same bytes.

    config.toml  labels.txt  metrics.jsonl  tokenizer files  README.md (model card)
    adapter_config.json  adapter_model.safetensors  minilora.json          written when training ends; after full tuning
    config.json  model.safetensors  minilora.json                          these, i.e. the run folder is the model's
    base/                                                                  the base, where training began by changing it
    checkpoints/step-000200/    trained.safetensors, optimizer.pt, state.json, where the optimizer pages its moments
                                moments.safetensors: the last two are kept

A checkpoint holds all that the next step depends on: trained weights, moments, random states, and the position, which is one
number because the order of batches is a function of (seed, epoch).  It is written under another name, synced and renamed,
so a folder that is called step-N is whole.
"""
from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minilora.adapters import read_json_object
from minilora.errors import CheckpointError, OutputError
from minilora.files import check_output, disk_reason, new_folder, write_json
from minilora.llama.safetensors_file import read_header, write_safetensors
from minilora.optim.paged_adamw import PagedAdamW, StoredState

KEPT = 2
METRICS_FILE, CONFIG_FILE, MOMENTS_FILE = "metrics.jsonl", "config.toml", "moments.safetensors"
# What torch, safetensors and json raise on a file that was cut short or overwritten.
UNREADABLE = (CheckpointError, SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError, EOFError,
              pickle.UnpicklingError)


@dataclass
class Position:
    """How far a run has come: optimizer steps done, and the bytes of metrics.jsonl they wrote."""

    step: int = 0
    metrics_bytes: int = 0


def check_run(folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that cannot be made, replaced or gone on with; changes nothing.

    Raises: OutputError: it exists and neither flag was given; or it is to be replaced or resumed but is no run folder.
    """
    if resume and not (folder / CONFIG_FILE).is_file():
        raise OutputError(f"{folder} holds no run to resume (no {CONFIG_FILE}); start it without --resume")
    if not resume:
        check_output(folder, overwrite, marker=CONFIG_FILE)


def open_run(folder: Path, resume: bool, overwrite: bool) -> None:
    """Make the run folder, or clear what a killed write left in the one that is gone on with.

    Raises: OutputError: see `check_run`; or the disk refuses.
    """
    check_run(folder, resume, overwrite)
    try:
        if not resume and folder.is_dir():
            shutil.rmtree(folder)
        for unfinished in folder.glob(".tmp-*"):
            unfinished.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the run folder {folder}: {error.strerror or error}") from None


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What training changes, by name: the adapters, or all weights (a tied one once)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(folder: Path, position: Position, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write checkpoints/step-N and drop all but the newest two."""
    checkpoints = folder / "checkpoints"
    with new_folder(checkpoints / f"step-{position.step:06d}", overwrite=True) as temporary:
        save_file({name: parameter.detach().cpu().contiguous() for name, parameter in trained_parameters(model).items()},
                  temporary / "trained.safetensors")
        if isinstance(optimizer, PagedAdamW):       # what does not fit into memory is not gathered there
            write_safetensors(temporary / MOMENTS_FILE, optimizer.stored_state())
        state = torch.optim.Optimizer.state_dict(optimizer) if isinstance(optimizer, PagedAdamW) else optimizer.state_dict()
        try:
            torch.save({"optimizer": state, **random_state()}, temporary / "optimizer.pt")
        except RuntimeError as error:       # Trap: torch's way to say that the disk is full
            raise OSError(f"optimizer.pt could not be written ({str(error).splitlines()[0]})") from error
        write_json(temporary / "state.json", {"step": position.step, "metrics_bytes": position.metrics_bytes})
    for old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    for unfinished in checkpoints.glob(".tmp-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has come as far as its first checkpoint."""
    return bool(_checkpoints(folder))


def load_checkpoint(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Put the newest whole checkpoint into model, optimizer and random state, and cut metrics.jsonl back to it.

    Returns: its position; step 0 when the run was killed before its first checkpoint.
    Raises: CheckpointError: no checkpoint can be read, or it is of another model.
    """
    newest_first = _checkpoints(folder)[::-1]
    problem: Exception | None = None
    for path in newest_first:
        try:
            state = read_json_object(path / "state.json")
            position = Position(int(state["step"]), int(state["metrics_bytes"]))
            tensors = load_file(path / "trained.safetensors")
            rest = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
            if isinstance(optimizer, PagedAdamW):
                rest["optimizer"]["state"] = StoredState(read_header(path / MOMENTS_FILE))
        except UNREADABLE as error:
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


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor],
             rest: dict[str, Any]) -> None:
    trained = trained_parameters(model)
    if {name: t.shape for name, t in tensors.items()} != {name: parameter.shape for name, parameter in trained.items()}:
        raise CheckpointError(f"{path} was written with other LoRA settings or another model; use the run's own config.toml")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict(rest["optimizer"])
    set_random_state(rest)


def random_state() -> dict[str, Any]:
    """The generators that dropout draws from: "cpu_random" and, a GPU each, "cuda_random"."""
    return {"cpu_random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to a `random_state`."""
    torch.set_rng_state(state["cpu_random"])
    if state["cuda_random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_random"])


def cut_metrics(folder: Path, size: int) -> None:
    """Shorten metrics.jsonl to `size` bytes: the steps after the checkpoint are going to be done again."""
    path = folder / METRICS_FILE
    if path.exists() and path.stat().st_size > size:
        with path.open("r+b") as file:
            file.truncate(size)


def append_metrics(folder: Path, values: dict[str, Any]) -> int:
    """Add one line to metrics.jsonl; returns the file's size in bytes after it."""
    try:
        with (folder / METRICS_FILE).open("ab") as file:
            file.write((json.dumps(values) + "\n").encode())
            file.flush()
            return file.tell()
    except OSError as error:
        raise OutputError(f"cannot write {folder / METRICS_FILE}: {disk_reason(error)}; free some space, then go on with "
                          "--resume") from error


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl; empty before the first step."""
    path = folder / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(json.loads(lines[-1])) if lines else {}


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Trap: on Linux getrusage also counts what the parent process held when it started this one.
    found = _from_status("VmHWM")
    if found is not None:
        return found
    import resource  # absent on Windows, where the GPU branch still works

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
