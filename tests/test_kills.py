"""Killed at any instant, and gone on with, a run ends with the bytes of one that was never killed."""
from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minilora import TrainConfig
from minilora.run_checkpoints import SUMS_FILE
from tests.killing import Runs, gone_on_with
from tests.models import write_model
from tests.notes import notes, write_csv

RANDOM_KILLS = 24
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {}, "pissa": {"init_lora_weights": "pissa"},
    "paged": {"optimizer": "paged_adamw", "page_bytes": 4096, "resident_mib": 2 * 4096 / 2 ** 20},
    "full": {"tune": "full", "quantize": "none"},
}


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with Runs() as running:
        yield running


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A short run with everything in it that has a state: dropout, moments, the schedule, micro-batches, validation."""
    folder = tmp_path_factory.mktemp("world")
    base, data = write_model(folder / "model"), write_csv(folder / "train.csv", notes(16))
    config = TrainConfig(model=str(base), data=str(data), val=str(data), out="anywhere", r=4, dropout=0.1, batch_size=4,
                         accumulate=2, epochs=1, max_length=96, lr=1e-2, save_every=1, eval_every=1, dtype="float32",
                         device="cpu", quiet=True)
    return dataclasses.asdict(config)


def result(run: Path) -> dict[str, Any]:
    """What of a finished run a seed fixes: every file, and the metrics but for time and memory."""
    timed = ("seconds", "peak_bytes", "faults", "evictions", "bytes_in", "bytes_out", "stall_seconds")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    kept = {name: content for name, content in files.items()
            if name.rpartition("/")[2] not in ("metrics.jsonl", "config.toml", "README.md", "state.json", SUMS_FILE)}
    return {"metrics": [{key: value for key, value in line.items() if key not in timed} for line in lines], **kept}


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]


def finished(runs: Runs, config: dict[str, Any]) -> dict[str, Any]:
    ended = runs.run(config)
    assert ended == {"killed": False, "changes": ended.get("changes"), "error": ""}, ended
    return result(Path(config["out"]))


@pytest.mark.parametrize(("variant", "every"), [("lora", 3), ("pissa", 9), ("paged", 17), ("full", 7)])
def test_a_run_killed_before_any_change_of_a_file_ends_with_the_same_bytes(
        runs: Runs, settings: dict[str, Any], tmp_path: Path, variant: str, every: int) -> None:
    """One kill before each `every`-th of the calls that change a file, from the first to the last."""
    config = {**settings, **VARIANTS[variant], "out": str(tmp_path / "run")}
    changes = runs.run(config)["changes"]
    expected = result(tmp_path / "run")
    assert changes > 60 and any(name.startswith("checkpoints/") for name in expected)
    for at in range(0, changes, every):
        shutil.rmtree(tmp_path / "run")
        assert runs.run(config, at=at)["killed"], f"the run ended before change {at} of {changes}"
        assert differing(finished(runs, gone_on_with(config)), expected) == [], f"killed before change {at} of {changes}"


def test_a_resumed_run_killed_before_any_change_ends_with_the_same_bytes(
        runs: Runs, settings: dict[str, Any], tmp_path: Path) -> None:
    config = {**settings, "out": str(tmp_path / "run")}
    expected = finished(runs, config)
    shutil.rmtree(tmp_path / "run")
    runs.run({**config, "max_steps": 1})
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "run", half)
    changes = runs.run({**config, "resume": True})["changes"]
    for at in range(0, changes, 6):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(half, tmp_path / "run")
        assert runs.run({**config, "resume": True}, at=at)["killed"]
        assert differing(finished(runs, gone_on_with(config)), expected) == [], f"killed before change {at} of {changes}"


def test_an_overwriting_run_killed_before_any_change_is_overwritten_again(
        runs: Runs, settings: dict[str, Any], tmp_path: Path) -> None:
    """The old run differs, and nothing of it comes through, whether one overwrites again or goes on."""
    config = {**settings, "out": str(tmp_path / "run")}
    expected = finished(runs, config)
    shutil.rmtree(tmp_path / "run")
    other = write_csv(tmp_path / "other.csv", notes(16, ["MR", "CT"]))
    runs.run({**config, "data": str(other), "val": "", "eval_every": 0})
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "run", old)
    changes = runs.run({**config, "overwrite": True})["changes"]
    for at in range(0, changes, 5):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(old, tmp_path / "run")
        assert runs.run({**config, "overwrite": True}, at=at)["killed"]
        # Before the first changes only the lock is new: the old run is still there, whole, and would be gone on with.
        again = gone_on_with(config, overwrite=at < 5 or at % 2 == 0)
        assert differing(finished(runs, again), expected) == [], f"killed before change {at} of {changes}"


def test_a_kill_before_or_while_the_oldest_checkpoint_is_removed_leaves_nothing_of_it(
        runs: Runs, settings: dict[str, Any], tmp_path: Path) -> None:
    """After the last step no checkpoint is written any more, so it is resuming that must clear it away."""
    config = {**settings, "epochs": 2, "out": str(tmp_path / "run")}
    changes = runs.run(config)["changes"]
    expected = result(tmp_path / "run")
    half_removed = 0
    for at in range(changes - 40, changes):
        shutil.rmtree(tmp_path / "run")
        assert runs.run(config, at=at)["killed"], f"the run ended before change {at} of {changes}"
        half_removed += any((tmp_path / "run" / "checkpoints").glob(".tmp-*-step-000002"))
        assert differing(finished(runs, gone_on_with(config)), expected) == [], f"killed before change {at} of {changes}"
    assert half_removed


def test_runs_killed_at_random_moments_end_with_the_same_bytes(runs: Runs, settings: dict[str, Any], tmp_path: Path) -> None:
    config = {**settings, "epochs": 10, "save_every": 2, "out": str(tmp_path / "whole")}
    expected = finished(runs, config)
    draw, kills, number = random.Random(0), 0, 0
    while kills < RANDOM_KILLS:
        number += 1
        config["out"] = str(tmp_path / f"run{number}")
        waits = []
        while True:
            waits.append(draw.uniform(0.01, 0.5))
            ended = runs.run(gone_on_with(config), after=waits[-1])
            if not ended["killed"]:
                break
            kills += 1
        assert ended["error"] == ""
        assert differing(result(Path(config["out"])), expected) == [], f"killed after {waits} s"
