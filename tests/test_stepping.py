"""Runs over a paged optimizer: the same bytes as without pages, killed or not, and through memory pressure."""
from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minilora import ConfigError, MiniloraError, TrainConfig, train
from minilora.data.batches import Batch
from minilora.errors import memory_reason
from minilora.llama.model import LlamaForCausalLM
from tests.models import write_model
from tests.notes import notes, write_csv

loop, stepping = importlib.import_module("minilora.train"), importlib.import_module("minilora.stepping")
SMALL_PAGES: dict[str, Any] = {"optimizer": "paged_adamw", "page_bytes": 4096, "resident_mib": 2 * 4096 / 2 ** 20}
FULL: dict[str, Any] = {"tune": "full", "quantize": "none"}


class Stopped(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    base, data = write_model(tmp_path / "model"), write_csv(tmp_path / "train.csv", notes(16))
    return TrainConfig(model=str(base), data=str(data), out=str(tmp_path / "run"), r=4, dropout=0.1, batch_size=4, accumulate=2,
                       epochs=2, max_length=128, lr=1e-2, save_every=2, dtype="float32", device="cpu", quiet=True)


def weights(run: str | Path) -> bytes:
    name = "adapter_model.safetensors" if (Path(run) / "adapter_model.safetensors").exists() else "model.safetensors"
    return (Path(run) / name).read_bytes()


def metrics(run: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def unpaged(config: TrainConfig, tmp_path: Path) -> bytes:
    train(dataclasses.replace(config, out=str(tmp_path / "unpaged"), optimizer="adamw", state_bits=32))
    return weights(tmp_path / "unpaged")


@pytest.mark.parametrize("options", [{}, {"backing": "host"}, FULL, {"loraplus_lr_ratio": 4.0}], ids=str)
def test_a_paged_run_writes_the_bytes_of_an_unpaged_one(config: TrainConfig, tmp_path: Path, options: dict[str, Any]) -> None:
    config = dataclasses.replace(config, **SMALL_PAGES, **options)
    train(config)
    if "backing" in options:
        config = dataclasses.replace(config, backing="auto")
    assert weights(config.out) == unpaged(config, tmp_path)
    last = metrics(config.out)[-1]
    assert last["faults"] > last["step"] and last["bytes_out"] > 0 and last["evicted_bytes"] == 0


def stop_at(monkeypatch: pytest.MonkeyPatch, config: TrainConfig, step: int) -> None:
    """Run until `step` is done, but not yet written down."""
    append = loop.append_metrics

    def stopping(folder: Path, values: dict[str, Any]) -> int:
        if values["step"] == step:
            raise Stopped
        size: int = append(folder, values)
        return size

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "append_metrics", stopping)
        train(config)


@pytest.mark.parametrize(("step", "options"), [(1, {}), (3, {}), (3, FULL), (3, {"state_bits": 8, **FULL})], ids=str)
def test_a_stopped_paged_run_resumes_to_the_bytes_of_a_whole_one(
        config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, options: dict[str, Any]) -> None:
    config = dataclasses.replace(config, **SMALL_PAGES, **options)
    stop_at(monkeypatch, config, step)
    # Pages of another size and budget change nothing, so they may differ.
    train(dataclasses.replace(config, resume=True, page_bytes=8192, resident_mib=1.0))
    train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    assert weights(config.out) == weights(tmp_path / "whole")
    assert [line["loss"] for line in metrics(config.out)] == [line["loss"] for line in metrics(tmp_path / "whole")]


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b""], ids=["cut", "empty"])
def test_damaged_moments_are_passed_over_for_the_checkpoint_before(
        config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    config = dataclasses.replace(config, **SMALL_PAGES, save_every=1)
    stop_at(monkeypatch, config, 4)
    newest = Path(config.out) / "checkpoints" / "step-000003" / "moments.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    train(dataclasses.replace(config, resume=True))
    assert weights(config.out) == unpaged(config, tmp_path)


def out_of_memory(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """Let the micro-batches with these numbers (from 1, over the whole run) find no memory, in the middle of their work."""
    label_loss, seen = stepping.label_loss, [0]

    def failing(model: LlamaForCausalLM, batch: Batch) -> Tensor:
        seen[0] += 1
        loss: Tensor = label_loss(model, batch)
        if seen[0] in calls:
            (loss / 7).backward()                   # part of the backward was done
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")
        return loss

    monkeypatch.setattr(stepping, "label_loss", failing)


@pytest.mark.parametrize("calls", [[5], [6]], ids=["first micro-batch", "second"])
def test_under_pressure_pages_make_room_and_nothing_else_changes(
        config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    config = dataclasses.replace(config, **SMALL_PAGES)
    expected = unpaged(config, tmp_path)
    out_of_memory(monkeypatch, calls)
    with pytest.warns(UserWarning, match=r"^step 3: out of memory; 0.0 MB of optimizer pages were put out, and the step was"):
        train(config)
    assert weights(config.out) == expected
    evicted = [line["evicted_bytes"] for line in metrics(config.out)]
    assert evicted[2] == 2 * 4096 and sum(evicted) == evicted[2]


def test_host_memory_that_a_gpu_cannot_have_is_memory() -> None:
    said = "CUDA error: out of memory"
    assert memory_reason(RuntimeError(f"{said}\nCompile with TORCH_USE_CUDA_DSA")) == said
    assert memory_reason(RuntimeError("CUDA error: an illegal memory access was encountered")) is None


@pytest.mark.parametrize(("optimizer", "calls"), [("adamw", [3]), ("paged_adamw", [3, 4]), ("paged_adamw", [1])])
def test_without_pages_to_put_out_it_says_what_to_lower(config: TrainConfig, monkeypatch: pytest.MonkeyPatch,
                                                        optimizer: Any, calls: list[int]) -> None:
    out_of_memory(monkeypatch, calls)       # in the first step no page has been touched yet
    with pytest.raises(MiniloraError, match=r"Tried to allocate 2.00 GiB.*lower --batch-size") as caught:
        train(dataclasses.replace(config, optimizer=optimizer))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "message"), [
    ({"state_bits": 8}, "with optimizer paged_adamw"),
    ({"state_bits": 16, "optimizer": "paged_adamw"}, "state_bits must be 32"),
    ({"optimizer": "paged_adamw", "resident_mib": 0.001}, "two pages"), ({"optimizer": "sgd"}, "optimizer must be"),
    ({"optimizer": "paged_adamw", "page_bytes": 100}, "page_bytes"),
    ({"activation_offloading": True}, "add --gradient-checkpointing"),
    ({"activation_offloading": True, "gradient_checkpointing": True, "device": "cpu"}, "the device is the CPU: leave it out")])
def test_settings_that_make_no_optimizer_are_refused(config: TrainConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, **settings))
    assert not Path(config.out).exists()
