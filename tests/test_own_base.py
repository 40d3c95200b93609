"""Runs whose start changes the base: the base comes along, is the one answered from, and outlives a kill."""
from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from minilora import CheckpointError, ConfigError, TrainConfig, load_adapter, load_model, train
from minilora.convert import merge_folder, quantize_folder
from minilora.llama.model import LlamaForCausalLM
from minilora.own_base import own_base
from minilora.predict import Predictor
from tests.models import write_model
from tests.notes import notes, write_csv

loop = importlib.import_module("minilora.train")
IDS = torch.arange(1, 40)[None]
Kind = Literal["pissa", "loftq"]


class Stopped(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    base, data = write_model(tmp_path / "model"), write_csv(tmp_path / "train.csv", notes(16))
    return TrainConfig(model=str(base), data=str(data), out=str(tmp_path / "run"), r=4, batch_size=4, epochs=1, lr=1e-2,
                       max_length=128, save_every=2, dtype="float32", device="cpu", quiet=True, init_lora_weights="pissa")


def trained_model(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """The model as it stands in memory when training ends."""
    seen: list[LlamaForCausalLM] = []
    save = loop.save_adapter

    def spy(model: LlamaForCausalLM, *rest: Any, **options: Any) -> None:
        seen.append(model)
        save(model, *rest, **options)

    monkeypatch.setattr(loop, "save_adapter", spy)
    train(config)
    return seen[0].eval()


@pytest.mark.parametrize(("start", "options"), [("pissa", {}), ("loftq", {}), ("pissa", {"quantize": "none"}),
                                                ("loftq", {"double_quant": False, "blocksize": 32, "use_dora": True})])
def test_what_is_loaded_is_what_was_trained(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, start: Kind,
                                            options: dict[str, Any]) -> None:
    trained = trained_model(dataclasses.replace(config, init_lora_weights=start, **options), monkeypatch)
    quantize: Any = "nf4" if options.get("quantize") != "none" else None
    # Whatever base is named, the adapter's own is taken.
    loaded = load_model(config.model, quantize=quantize, dtype=torch.float32, adapter=config.out)
    assert torch.equal(loaded(IDS), trained(IDS))
    answers = Predictor.load(config.model, adapter=config.out, device="cpu", dtype="float32")
    assert torch.equal(answers.model(IDS), trained(IDS))
    named = json.loads((Path(config.out) / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == Path(config.out) / "base" and (Path(named) / "tokenizer.json").is_file()


def test_a_merge_goes_into_the_runs_own_base(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trained_model(config, monkeypatch)(IDS).detach()
    merge_folder(config.model, config.out, tmp_path / "merged", quiet=True)
    merged = load_model(tmp_path / "merged", quantize=None, dtype=torch.float32)(IDS)
    # Merged weights are rounded to bfloat16: 8 bits of mantissa, through two blocks.
    torch.testing.assert_close(merged, trained, rtol=0, atol=0.02 * float(trained.abs().max()))
    with pytest.raises(ConfigError, match="original weights are not there"):
        merge_folder(config.model, config.out, tmp_path / "original", into="original", quiet=True)


@pytest.mark.parametrize("moment", ["base", "first checkpoint", "step 1", "step 3"])
def test_a_stopped_run_resumes_to_the_bytes_of_a_whole_one(config: TrainConfig, tmp_path: Path, moment: str,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    append = loop.append_metrics

    def stop_at_step(folder: Path, values: dict[str, Any]) -> int:
        return stop() if values["step"] == int(moment[-1]) else append(folder, values)      # type: ignore[return-value]

    name, replacement = {"base": ("save_base", stop), "first checkpoint": ("save_checkpoint", stop)}.get(
        moment, ("append_metrics", stop_at_step))
    with monkeypatch.context() as patch:
        patch.setattr(loop, name, replacement)
        with pytest.raises(Stopped):
            train(config)
    train(dataclasses.replace(config, resume=True))
    train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    for file in ("adapter_model.safetensors", "base/model.safetensors", "base/config.json"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_over_the_published_base_the_adapter_warns(config: TrainConfig, quantize: Any) -> None:
    train(dataclasses.replace(config, max_steps=1, quantize=quantize))
    model = load_model(config.model, quantize=None if quantize == "none" else "nf4", dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"trained over other weights.*run/base"):
        load_adapter(model, config.out)


def test_a_merged_model_no_longer_has_a_base_of_its_own(config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(config, max_steps=1))
    merge_folder(config.model, config.out, tmp_path / "merged", quiet=True)
    recorded = json.loads((tmp_path / "merged" / "minilora.json").read_text())
    assert recorded.keys() == {"base_quantization", "template", "max_length", "base_model"}


def test_a_paged_run_goes_on_from_its_first_checkpoint(config: TrainConfig, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, optimizer="paged_adamw", page_bytes=4096, resident_mib=2 * 4096 / 2 ** 20)

    def stop(*_: Any) -> int:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "append_metrics", stop)
        train(config)                   # its only checkpoint, of step 0, holds no moments yet
    train(dataclasses.replace(config, resume=True))
    train(dataclasses.replace(config, out=str(tmp_path / "whole"), optimizer="adamw"))
    name = "adapter_model.safetensors"
    assert (Path(config.out) / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_without_its_base_is_refused(config: TrainConfig) -> None:
    train(dataclasses.replace(config, max_steps=1))
    assert own_base(config.out) == Path(config.out) / "base"
    shutil.rmtree(Path(config.out) / "base")
    with pytest.raises(CheckpointError, match="is gone; copy the run folder whole"):
        load_model(config.model, adapter=config.out)


def test_a_plain_run_has_no_base_of_its_own(config: TrainConfig) -> None:
    train(dataclasses.replace(config, max_steps=1, init_lora_weights="lora"))
    assert own_base(config.out) is None and not (Path(config.out) / "base").exists()


def test_a_4_bit_model_cannot_tell_what_it_was(config: TrainConfig, tmp_path: Path) -> None:
    quantize_folder(config.model, tmp_path / "four", quiet=True)
    with pytest.raises(CheckpointError, match="name the unquantized model"):
        train(dataclasses.replace(config, model=str(tmp_path / "four")))
    assert not Path(config.out).exists()


def test_loftq_without_quantization_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="add quantize nf4, or take pissa"):
        dataclasses.replace(config, init_lora_weights="loftq", quantize="none")


def test_lora_plus_trains_b_at_its_own_rate(config: TrainConfig) -> None:
    train(dataclasses.replace(config, init_lora_weights="lora", max_steps=1, warmup=0, loraplus_lr_ratio=8.0))
    rate = json.loads((Path(config.out) / "metrics.jsonl").read_text())["lr"]
    moved = {name: tensor for name, tensor in load_file(Path(config.out) / "adapter_model.safetensors").items()
             if "lora_B" in name}
    # Adam's first step is the rate times the gradient's sign, but for ε; B started at zero, and A's first gradient is zero.
    for name, tensor in moved.items():
        assert float(tensor.abs().max()) == pytest.approx(8 * rate, rel=1e-3), name
