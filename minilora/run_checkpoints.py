"""Checkpoints from which a killed run goes on to the same bytes.

    RUN/checkpoints/step-000200/    trained.safetensors, optimizer.pt, state.json, where the optimizer pages its moments
                                    moments.safetensors, and SHA256SUMS of them all: the last two are kept

A checkpoint holds all that the next step depends on: trained weights, moments, random states, and the position, which is one
number because the order of batches is a function of (seed, epoch).  It is written under another name, synced and renamed,
so a folder that is called step-N was whole; that it still is, its hashes say (`sha256sum -c SHA256SUMS` there).

Guarantee: killed at any instant, and resumed, a run ends with the bytes of one that never was (tests/test_kills.py).
"""
from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minilora.adapters import read_json_object
from minilora.errors import CheckpointError, ConfigError, OutputError
from minilora.files import TEMPORARY, clear_leftovers, disk_reason, file_sha256, new_folder, sync_file, write_json, write_text
from minilora.llama.safetensors_file import read_header, write_safetensors
from minilora.optim.paged_adamw import PagedAdamW, StoredState
from minilora.runs import CHECKPOINTS, METRICS_FILE, cut_metrics

KEPT = 2
WEIGHTS_FILE, OPTIMIZER_FILE, MOMENTS_FILE = "trained.safetensors", "optimizer.pt", "moments.safetensors"
STATE_FILE, SUMS_FILE = "state.json", "SHA256SUMS"
# What torch, safetensors and json raise on a file that was cut short or overwritten.
UNREADABLE = (CheckpointError, SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError, EOFError,
              pickle.UnpicklingError)


@dataclass
class Position:
    """How far a run has come: optimizer steps done, the bytes of metrics.jsonl they wrote, and what they saw.

    Attributes: data_sha256: of the table. base_digest: of what lies under the adapters. template: its text. "" where not known.
    """

    step: int = 0
    metrics_bytes: int = 0
    data_sha256: str = ""
    base_digest: str = ""
    template: str = ""

    def sees(self, **now: tuple[str, str]) -> Position:
        """Note what the next steps see, by attribute: what it is called, and its value; returns itself.

        Warns: UserWarning: the steps before saw another: a file that a setting names may have changed, or another be named.
        """
        for name, (called, value) in now.items():
            if getattr(self, name) not in ("", value):
                warnings.warn(f"{called} has changed since step {self.step}: the run goes on, and ends with the bytes of "
                              "neither the one nor the other", stacklevel=3)
            setattr(self, name, value)
        return self


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What training changes, by name: the adapters, or all weights (a tied one once)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(folder: Path, position: Position, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write checkpoints/step-N and drop all but the newest two up to it.

    Raises: CheckpointError: a weight is not finite; the checkpoint before stays the last good one. OutputError: the disk
        refuses.
    """
    checkpoints, trained = folder / CHECKPOINTS, trained_parameters(model)
    broken = next((name for name, parameter in trained.items() if not bool(parameter.detach().isfinite().all())), None)
    if broken is not None:
        raise CheckpointError(f"step {position.step}: {broken} holds NaN or infinities, so no checkpoint of it was written; "
                              "start again with a lower --lr, or with --dtype float32")
    try:
        checkpoints.mkdir(exist_ok=True)        # not its parents: a run folder that was deleted is not made again
        if (folder / METRICS_FILE).exists():
            sync_file(folder / METRICS_FILE)    # what the checkpoint counts on must not be lost in a power cut
    except OSError as error:
        raise OutputError(f"cannot write {checkpoints}: {disk_reason(error)}; check the folder, its free space and permissions"
                          ) from error
    with new_folder(checkpoints / f"step-{position.step:06d}", overwrite=True) as temporary:
        save_file({name: parameter.detach().cpu().contiguous() for name, parameter in trained.items()},
                  temporary / WEIGHTS_FILE)
        if isinstance(optimizer, PagedAdamW):       # what does not fit into memory is not gathered there
            write_safetensors(temporary / MOMENTS_FILE, optimizer.stored_state())
        state = torch.optim.Optimizer.state_dict(optimizer) if isinstance(optimizer, PagedAdamW) else optimizer.state_dict()
        try:
            torch.save({"optimizer": state, **random_state()}, temporary / OPTIMIZER_FILE)
        except RuntimeError as error:       # Trap: torch's way to say that the disk is full
            free = shutil.disk_usage(temporary).free
            raise OSError(f"{OPTIMIZER_FILE} could not be written ({str(error).splitlines()[0]}; {free / 1e6:,.1f} MB are free)"
                          ) from error
        write_json(temporary / STATE_FILE, asdict(position))
        files = sorted(temporary.iterdir())
        write_text(temporary / SUMS_FILE, "".join(f"{file_sha256(file)}  {file.name}\n" for file in files))
    _drop(folder, position.step, later=True)


def _drop(folder: Path, step: int, later: bool) -> None:
    """Keep the newest two up to `step`, and nothing that a kill left.

    Args: later: drop those behind it too, which were passed over as damaged: their steps have been done again.
    """
    checkpoints, found = folder / CHECKPOINTS, _checkpoints(folder)
    upto = [path for path in found if _step(path) <= step]
    try:
        for old in (*upto[:-KEPT], *(found[len(upto):] if later else ())):
            old.rename(old.with_name(f"{TEMPORARY}{os.getpid()}-{old.name}"))   # in the middle of removing it is not whole
        clear_leftovers(checkpoints)
    except OSError as error:
        warnings.warn(f"old checkpoints in {checkpoints} could not be removed ({disk_reason(error)})", stacklevel=3)


def _verify(path: Path) -> None:
    """Compare every file of a checkpoint with its hash.

    Raises: CheckpointError: one differs, is not listed, or is none of a checkpoint's. OSError: one is missing.
    """
    lines = (path / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    needed = {WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE}
    if not needed <= listed.keys() <= {*needed, MOMENTS_FILE}:
        raise CheckpointError(f"{SUMS_FILE} lists other files than a checkpoint has")
    for name, digest in listed.items():
        if file_sha256(path / name) != digest:
            raise CheckpointError(f"{name} is not what was written (its hash differs)")


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has come as far as its first checkpoint."""
    return bool(_checkpoints(folder))


def length_changed(folder: Path, before: int, now: int) -> str:
    """What becomes of a run that is gone on with and made longer or shorter.

    Args: before, now: its optimizer steps in all, as they were and as they are to be.
    Returns: a sentence for whoever uses the adapter; "" where the length is the same, or nothing was done yet.
    Raises: ConfigError: it has done more steps already.
    Warns: UserWarning: the sentence.
    """
    done = _step(found[-1]) if (found := _checkpoints(folder)) else 0
    if before == now or not done:
        return ""
    if now < done:
        raise ConfigError(f"resume: {folder} has done {done:,} steps already, and these epochs and max_steps ask for {now:,}; "
                          "ask for more, or start another run")
    remark = (f"resumed after step {done:,} with {now:,} steps in all instead of {before:,}: the learning rate follows another "
              "schedule from there on, so no single command gives this run's weights again")
    warnings.warn(remark, stacklevel=2)
    return remark


def last_checkpoint(folder: Path) -> str:
    """What is left when a run ends early, as the end of a sentence."""
    found = _checkpoints(folder)
    return f"the last good checkpoint is {found[-1]}" if found else f"there is no checkpoint in {folder}"


def load_checkpoint(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, cut: bool = True) -> Position:
    """Put the newest whole checkpoint into model, optimizer and random state, and cut metrics.jsonl back to it.

    Args: cut: False where another process does that, and removes what is too old; this one then only reads.
    Returns: its position; step 0 when the run was killed before its first checkpoint.
    Raises: CheckpointError: no checkpoint can be read, or it is of another model.
    Warns: UserWarning for each damaged one that is passed over.
    """
    newest_first = _checkpoints(folder)[::-1]
    problem: Exception | None = None
    for path in newest_first:
        try:
            _verify(path)
            state = read_json_object(path / STATE_FILE)
            position = Position(int(state["step"]), int(state["metrics_bytes"]), str(state["data_sha256"]),
                                str(state.get("base_digest", "")), str(state.get("template", "")))
            tensors = load_file(path / WEIGHTS_FILE)
            rest = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
            if isinstance(optimizer, PagedAdamW):
                rest["optimizer"]["state"] = StoredState(read_header(path / MOMENTS_FILE))
        except UNREADABLE as error:
            problem = error
            warnings.warn(f"{path} is damaged and passed over ({disk_reason(error)})", stacklevel=2)
            continue
        _restore(path, model, optimizer, tensors, rest)
        if cut:
            cut_metrics(folder, position.metrics_bytes)
            _drop(folder, position.step, later=False)       # the kill may have come just before that, and no save comes after
        return position
    if newest_first:
        raise CheckpointError(f"no checkpoint in {folder / CHECKPOINTS} is readable ({type(problem).__name__}); start the "
                              "run anew with --overwrite")
    if cut:
        cut_metrics(folder, 0)
    return Position()


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in (folder / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=_step)


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


def seed_member(seed: int, step: int, rank: int) -> None:
    """Begin a step's generators anew, for one of several processes: its dropout then hangs on the step's number alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def random_state() -> dict[str, Any]:
    """The generators that dropout draws from: "cpu_random" and, a GPU each, "cuda_random"."""
    return {"cpu_random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to a `random_state`."""
    torch.set_rng_state(state["cpu_random"])
    if state["cuda_random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_random"])
