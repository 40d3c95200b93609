"""The training loop: what its loss is, what it changes, and that a seed fixes every byte, killed or not."""
from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from minilora import (
    CheckpointError,
    ConfigError,
    DataError,
    MiniloraError,
    OutputError,
    TrainConfig,
    add_lora,
    load_model,
    load_tokenizer,
    train,
)
from minilora.adapters import PREFIX
from minilora.data.batches import Batch, collate
from minilora.data.prompts import IGNORED, Example, encode_example, load_template
from minilora.layers.lora import ALL_LINEARS, LoRAConfig
from minilora.layers.qlora import lora_layers
from minilora.llama.model import LlamaForCausalLM
from minilora.loss import label_loss, validation_loss
from minilora.predict import Predictor
from minilora.stepping import learning_rate
from tests.models import write_model
from tests.notes import LABELS, SECRET, notes, write_csv

loop = importlib.import_module("minilora.train")       # the attribute of the package is the function
stepping = importlib.import_module("minilora.stepping")
STEPS = 6
METRICS = ["step", "loss", "lr", "tokens", "seconds", "peak_bytes"]
RUN_FILES = {"config.toml", "metrics.jsonl", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
             "tokenizer_config.json", "labels.txt", "README.md", "checkpoints", "minilora.json"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "train.csv", notes(24))


@pytest.fixture
def config(base: Path, data: Path, tmp_path: Path) -> TrainConfig:
    """Six steps of two micro-batches of four notes, with everything in it that has a state: dropout, moments, the schedule."""
    return TrainConfig(model=str(base), data=str(data), out=str(tmp_path / "run"), r=4, dropout=0.1, batch_size=4, accumulate=2,
                       epochs=2, max_length=128, lr=1e-2, save_every=2, dtype="float32", device="cpu", quiet=True)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def repeatable(run: Path) -> dict[str, Any]:
    """What of a run folder a seed fixes: the weights to the byte, and the metrics but for time and memory."""
    weights = "adapter_model.safetensors" if (run / "adapter_model.safetensors").exists() else "model.safetensors"
    kept = [{key: value for key, value in line.items() if key not in ("seconds", "peak_bytes")} for line in metrics(run)]
    return {"weights": (run / weights).read_bytes(), "metrics": kept, "labels": (run / "labels.txt").read_text()}


REFERENCES: dict[str, dict[str, Any]] = {}


def reference(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The same run, never killed; done once for all tests that ask for it."""
    key = repr(dataclasses.replace(config, out="anywhere", resume=False))
    if key not in REFERENCES:
        train(dataclasses.replace(config, out=str(folder), resume=False))
        REFERENCES[key] = repeatable(folder)
    return REFERENCES[key]


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["metrics"] == expected["metrics"]
    assert found["weights"] == expected["weights"], "the weights differ"
    assert found == expected


# The loss


def examples_of(base: Path, pairs: list[tuple[str, str]]) -> list[Example]:
    tokenizer, template = load_tokenizer(base), load_template("note")
    return [encode_example(tokenizer, template, note, label, 200, row=row) for row, (note, label) in enumerate(pairs)]


def adapted(base: Path) -> LlamaForCausalLM:
    """With B away from zero, so that A has a gradient as well."""
    model = load_model(base, quantize=None, dtype=torch.float32)
    add_lora(model, LoRAConfig(r=4), torch.Generator().manual_seed(0))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    return model.train()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of the gradients, relative to the largest entry of each tensor."""
    assert a.keys() == b.keys() and a
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in a)


def step_gradient(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> list[Tensor]:
    """The gradient that `train` hands to the optimizer at the last of `config`'s steps."""
    seen: list[Tensor] = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters: list[Tensor], norm: float) -> Tensor:
        seen[:] = [p.grad.clone() for p in parameters if p.grad is not None]
        return clip(parameters, norm)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
        train(config)
    return seen


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_splitting_a_step_into_micro_batches_changes_the_gradient_by_rounding_only(
        config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    # Lengths of labels differ within the table, so that weights by batch and by token differ as well.
    data = write_csv(tmp_path / "six.csv", notes(6, ["CT", "CT Abdomen And Pelvis With Contrast", "MR"]))
    one = dataclasses.replace(config, data=str(data), dropout=0.0, batch_size=6, accumulate=1, max_steps=2, max_grad_norm=0.0)
    split = dataclasses.replace(one, out=str(tmp_path / "split"), batch_size=6 // parts, accumulate=parts)
    whole = step_gradient(monkeypatch, one)
    found = step_gradient(monkeypatch, split)
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
    assert math.isclose(metrics(tmp_path / "run")[0]["loss"], metrics(tmp_path / "split")[0]["loss"], rel_tol=1e-5)


def test_the_mean_of_micro_batch_means_is_another_gradient(base: Path) -> None:
    model, examples = adapted(base), examples_of(base, notes(4, ["CT", "CT Abdomen And Pelvis With Contrast"]))
    parts = [collate(examples[0::2], 0), collate(examples[1::2], 0)]
    tokens = sum(part.label_tokens for part in parts)
    label_loss(model, collate(examples, 0)).div(tokens).backward()
    whole = gradients(model)
    for part in parts:
        label_loss(model, part).div(tokens).backward()
    by_token = gradients(model)
    for part in parts:
        label_loss(model, part).div(part.label_tokens * len(parts)).backward()
    by_batch = gradients(model)
    assert largest_difference(by_token, whole) < 1e-3
    assert largest_difference(by_batch, whole) > 0.05


def test_the_loss_is_the_plain_sum_over_label_tokens(base: Path) -> None:
    model, examples = adapted(base), examples_of(base, notes(3))
    with torch.no_grad():
        expected = 0.0
        for example in examples:
            log_p = model(torch.tensor([example.input_ids]))[0].double().log_softmax(-1)
            for position, token in enumerate(example.labels):
                if token != IGNORED:
                    assert token == example.input_ids[position]
                    expected -= float(log_p[position - 1, token])
        found = float(label_loss(model, collate(examples, 258)))
    assert math.isclose(found, expected, rel_tol=1e-5)


def test_prompt_tokens_carry_no_loss(base: Path) -> None:
    model, (example,) = adapted(base), examples_of(base, notes(1))
    first = next(position for position, label in enumerate(example.labels) if label != IGNORED)
    hidden: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        hidden.append(output)

    handle = model.model.norm.register_forward_hook(keep)
    label_loss(model, collate([example], 0)).backward()
    handle.remove()
    assert hidden[0].grad is not None
    # A state predicts the token after it: the last prompt token's predicts the first of the label, the end token's nothing.
    predicting = slice(first - 1, len(example.input_ids) - 1)
    with torch.no_grad():
        expected = model.hidden(torch.tensor([example.input_ids]))[0, predicting]
    torch.testing.assert_close(hidden[0][0].detach(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (hidden[0].grad[0].abs().sum(-1) > 0).all()


def test_padding_changes_neither_loss_nor_gradient(base: Path) -> None:
    model, examples = adapted(base), examples_of(base, notes(4))
    for example in examples:
        label_loss(model, collate([example], 0)).backward()
    alone = gradients(model)
    label_loss(model, collate(examples, 258)).backward()
    assert largest_difference(gradients(model), alone) < 1e-3


def test_a_padding_id_past_the_embedding_table_is_never_used(tmp_path: Path, config: TrainConfig) -> None:
    base = write_model(tmp_path / "small", vocab_size=258)          # the tokenizer's <pad> is 258
    assert load_tokenizer(base).pad_id == 258
    assert train(dataclasses.replace(config, model=str(base), val=config.data, max_steps=1)).steps == 1


def test_validation_loss_is_the_mean_over_label_tokens_whatever_the_batch(base: Path) -> None:
    model, examples = adapted(base), examples_of(base, notes(5))
    with torch.no_grad():
        total = sum(float(label_loss(model, collate([example], 0))) for example in examples)
    tokens = sum(label != IGNORED for example in examples for label in example.labels)
    for size in (1, 2, 5):
        assert math.isclose(validation_loss(model, examples, size), total / tokens, rel_tol=1e-5)
    assert model.training, "the model is put back into training mode"


def test_gradient_checkpointing_gives_the_same_gradients(base: Path) -> None:
    model, batch = adapted(base), collate(examples_of(base, notes(4)), 0)
    for _, layer in lora_layers(model):
        layer.dropout = 0.2
    torch.manual_seed(0)
    label_loss(model, batch).backward()
    plain = gradients(model)
    model.gradient_checkpointing = True
    torch.manual_seed(0)
    label_loss(model, batch).backward()
    again = gradients(model)
    for name, expected in plain.items():
        assert torch.equal(again[name], expected), name


# The schedule


def test_the_rate_rises_and_falls_by_hand() -> None:
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 9)) for k in range(1, 9)])
    assert learning_rate(1, 1, 1.0, 0.05) == 1.0, "a run of one step takes it at the full rate"


@pytest.mark.parametrize(("total", "warmup"), [(1, 0.0), (2, 0.0), (1000, 0.0), (1000, 0.05), (7, 0.9)])
def test_no_step_is_taken_at_a_rate_of_zero(total: int, warmup: float) -> None:
    assert all(learning_rate(step, total, 1.0, warmup) > 1e-7 for step in range(1, total + 1))


@given(total=st.integers(2, 300), warmup=st.floats(0, 1), peak=st.floats(1e-6, 1))
def test_the_rate_stays_between_zero_and_its_peak_and_has_one_top(total: int, warmup: float, peak: float) -> None:
    rates = [learning_rate(step, total, peak, warmup) for step in range(1, total + 1)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    if warmup:
        assert rates[top] == pytest.approx(peak)
    assert rates[-1] > 0


def test_the_default_rate_is_qloras_scaled_by_width(config: TrainConfig) -> None:
    train(dataclasses.replace(config, lr=0.0, max_steps=1))
    assert metrics(Path(config.out))[0]["lr"] == pytest.approx(2e-4 * 4096 / 64)


# What a run leaves behind


def test_a_run_folder_holds_exactly_its_files_and_metrics_their_keys(config: TrainConfig) -> None:
    result = train(dataclasses.replace(config, val=config.data, eval_every=3))
    run = Path(config.out)
    assert {path.name for path in run.iterdir()} == RUN_FILES
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000004", "step-000006"}
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) and result.steps == STEPS
    assert all(list(line)[: len(METRICS)] == METRICS for line in lines)
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]
    assert result.loss == lines[-1]["loss"] and result.val_loss == lines[-1]["val_loss"]
    assert [line["lr"] for line in lines] == [learning_rate(step, STEPS, 1e-2, 0.05) for step in range(1, STEPS + 1)]
    longest = max(len(example.input_ids) for example in examples_of(Path(config.model), notes(24)))
    assert all(8 < line["tokens"] <= 8 * longest for line in lines)
    assert (run / "labels.txt").read_text().splitlines() == LABELS
    again = TrainConfig.from_toml(run / "config.toml", out="other")
    assert dataclasses.replace(again, out=config.out, val="", eval_every=0, quiet=True) == config


def test_no_note_stands_in_a_run_folder(config: TrainConfig) -> None:
    train(dataclasses.replace(config, val=config.data))
    for path in Path(config.out).rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path.name


def test_every_adapter_moved_and_no_base_weight_did(config: TrainConfig, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_model(base, dtype=torch.float32)
    content = (base / "model.safetensors").read_bytes()
    trained: list[LlamaForCausalLM] = []
    save = loop.save_adapter

    def spy(model: LlamaForCausalLM, *rest: Any, **options: Any) -> None:
        trained.append(model)
        save(model, *rest, **options)

    monkeypatch.setattr(loop, "save_adapter", spy)
    result = train(config)
    tensors = load_file(Path(config.out) / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(ALL_LINEARS) * 2
    unmoved = [name for name, tensor in tensors.items() if "lora_B" in name and not bool((tensor != 0).all())]
    assert unmoved == []
    after = {name.replace(".base_layer", ""): value for name, value in trained[0].state_dict().items() if "lora_" not in name}
    expected = before.state_dict()
    assert after.keys() == expected.keys()
    assert [name for name, value in after.items() if not torch.equal(value, expected[name])] == []
    assert result.trained == sum(tensor.numel() for tensor in tensors.values())
    assert (base / "model.safetensors").read_bytes() == content


def test_only_the_targets_are_adapted(config: TrainConfig) -> None:
    train(dataclasses.replace(config, target_modules=("q_proj", "v_proj"), use_dora=True, max_steps=2))
    names = {name.removeprefix(PREFIX).split(".")[4] for name in load_file(Path(config.out) / "adapter_model.safetensors")}
    assert names == {"q_proj", "v_proj"}


def test_long_notes_are_cut_and_train(config: TrainConfig, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "long.csv", [("x" * 1000, "CT"), ("y", "MR")])
    train(dataclasses.replace(config, data=str(data), max_length=64, max_steps=1))
    assert metrics(Path(config.out))[0]["tokens"] <= 2 * 64


# The same bytes


@pytest.mark.parametrize("options", [{}, {"quantize": "none", "use_dora": True, "gradient_checkpointing": True},
                                     {"tune": "full", "quantize": "none"}], ids=["qlora", "dora", "full"])
def test_the_same_config_twice_writes_the_same_bytes(config: TrainConfig, tmp_path: Path, options: dict[str, Any]) -> None:
    config = dataclasses.replace(config, max_steps=3, **options)
    train(config)
    assert_same_run(repeatable(tmp_path / "run"), reference(config, tmp_path / "again"))


def test_another_seed_writes_other_bytes(config: TrainConfig, tmp_path: Path) -> None:
    short = dataclasses.replace(config, max_steps=1)
    train(short)
    assert repeatable(tmp_path / "run")["weights"] != reference(dataclasses.replace(short, seed=1), tmp_path / "b")["weights"]


class Stopped(Exception):
    """Stands for whatever ends a process between two steps."""


def stop_after(monkeypatch: pytest.MonkeyPatch, config: TrainConfig, step: int) -> None:
    """Run `config` until the metrics of `step` are written."""
    append = loop.append_metrics

    def stopping(folder: Path, values: dict[str, Any]) -> int:
        size = append(folder, values)
        if values["step"] == step:
            raise Stopped
        return size

    with monkeypatch.context() as patch:
        patch.setattr(loop, "append_metrics", stopping)
        with pytest.raises(Stopped):
            train(config)


FULL = {"tune": "full", "quantize": "none"}


@pytest.mark.parametrize(("step", "options"), [(1, {}), (2, {}), (5, {}), (5, FULL), (5, {**FULL, "new_tokens": 20})])
def test_a_stopped_run_resumes_to_the_bytes_of_a_whole_one(
        config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, options: dict[str, Any]) -> None:
    config = dataclasses.replace(config, val=config.data, eval_every=4, **options)
    stop_after(monkeypatch, config, step)
    result = train(dataclasses.replace(config, resume=True))
    assert result.steps == STEPS
    assert_same_run(repeatable(tmp_path / "run"), reference(config, tmp_path / "whole"))


KILLED = """
import importlib, os, signal, sys
from minilora import TrainConfig
loop, runs = importlib.import_module("minilora.train"), importlib.import_module("minilora.run_checkpoints")
config = TrainConfig.from_toml(sys.argv[1], quiet=True, resume=sys.argv[2] == "resume")
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
append = loop.append_metrics
if sys.argv[2] == "resume":
    runs.write_json = die              # in the middle of writing a checkpoint
else:
    loop.append_metrics = lambda folder, values: die() if values["step"] == 4 else append(folder, values)
loop.train(config)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_run_killed_twice_resumes_to_the_bytes_of_a_whole_one(config: TrainConfig, tmp_path: Path) -> None:
    config.save(tmp_path / "run.toml")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for how in ("fresh", "resume"):
        process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run.toml"), how], env=environment,
                                 capture_output=True, text=True, timeout=200)
        assert process.returncode == -signal.SIGKILL, process.stderr
    run = Path(config.out)
    assert not (run / "adapter_model.safetensors").exists()
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000002"]
    assert list((run / "checkpoints").glob(".tmp-*")), "the second kill struck while a checkpoint was being written"
    (run / ".tmp-1-README.md").write_text("what a killed write leaves")
    train(dataclasses.replace(config, resume=True))
    assert {path.name for path in run.iterdir()} == RUN_FILES
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000004", "step-000006"}
    assert_same_run(repeatable(run), reference(config, tmp_path / "whole"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")       # torch, of the garbage
@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"",
                                    lambda content: b"\x80\x04garbage" + content[10:]], ids=["cut", "empty", "garbage"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
        config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Any) -> None:
    short = dataclasses.replace(config, max_steps=3, save_every=1)
    stop_after(monkeypatch, short, 3)
    newest = Path(config.out) / "checkpoints" / "step-000002" / name
    newest.write_bytes(damage(newest.read_bytes()))
    train(dataclasses.replace(short, resume=True))
    assert_same_run(repeatable(tmp_path / "run"), reference(short, tmp_path / "whole"))


def test_only_damaged_checkpoints_end_with_one_line(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, config, 3)
    (Path(config.out) / "checkpoints" / "step-000002" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="--overwrite"):
        train(dataclasses.replace(config, resume=True))


def test_resuming_a_finished_run_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    first = train(dataclasses.replace(config, val=config.data))
    before = {path.name: path.read_bytes() for path in Path(config.out).iterdir() if path.is_file()}
    again = train(dataclasses.replace(config, val=config.data, resume=True))
    assert {path.name: path.read_bytes() for path in Path(config.out).iterdir() if path.is_file()} == before
    assert (again.steps, again.loss, again.val_loss) == (first.steps, first.loss, first.val_loss)


def test_a_finished_run_can_be_made_longer(config: TrainConfig) -> None:
    train(dataclasses.replace(config, max_steps=2))
    with pytest.warns(UserWarning, match="resumed after step 2 with 4 steps in all instead of 2"):
        assert train(dataclasses.replace(config, max_steps=4, resume=True)).steps == 4
    assert [line["step"] for line in metrics(Path(config.out))] == [1, 2, 3, 4]


@pytest.mark.parametrize("longer", [{"epochs": 4}, {"max_steps": 5}])
def test_a_run_of_another_length_than_it_began_with_says_so_and_its_settings_keep_it(
        config: TrainConfig, monkeypatch: pytest.MonkeyPatch, longer: dict[str, Any]) -> None:
    stop_after(monkeypatch, config, 3)
    steps = 12 if "epochs" in longer else 5
    config = dataclasses.replace(config, resume=True, **longer)
    with pytest.warns(UserWarning, match=f"after step 2 with {steps} steps in all instead of 6: .* no single command") as said:
        assert train(config).steps == steps
    remark = f"# {next(str(it.message) for it in said if 'no single command' in str(it.message))}"
    written = (Path(config.out) / "config.toml").read_text()
    assert written.splitlines()[0] == remark and TrainConfig.from_toml(Path(config.out) / "config.toml").epochs == config.epochs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(config)
    assert (Path(config.out) / "config.toml").read_text() == written, "what was said once is kept"
    assert f"| length | {remark[2:]} |" in (Path(config.out) / "README.md").read_text()
    train(dataclasses.replace(config, resume=False, overwrite=True))
    assert "# " not in (Path(config.out) / "config.toml").read_text()
    assert "| length |" not in (Path(config.out) / "README.md").read_text()


def test_labels_that_the_tokenizer_writes_alike_are_refused_before_training(config: TrainConfig, base: Path,
                                                                            tmp_path: Path) -> None:
    normalizing = shutil.copytree(base, tmp_path / "normalizing")
    tokenizer = json.loads((normalizing / "tokenizer.json").read_text())
    (normalizing / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "NFKC"}}))
    data = write_csv(tmp_path / "alike.csv", notes(8, ["Grade 1", "Grade ①"]))
    with pytest.raises(DataError, match="differ only by characters that the tokenizer does not know"):
        train(dataclasses.replace(config, model=str(normalizing), data=str(data)))
    assert not Path(config.out).exists()


@pytest.mark.parametrize(("epochs", "per_epoch", "steps"), [(1.1, 10, 11), (0.07, 100, 7), (2.3, 30, 69), (3, 7, 21)])
def test_a_fraction_of_an_epoch_is_that_of_its_decimals(epochs: float, per_epoch: int, steps: int) -> None:
    assert TrainConfig(model="tiny", data="d", out="o", epochs=epochs).steps(per_epoch) == steps


@pytest.mark.parametrize("shorter", [{"max_steps": 1}, {"epochs": 0.3}])
def test_a_run_that_has_done_more_steps_than_are_asked_for_is_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch,
                                                                      shorter: dict[str, Any]) -> None:
    stop_after(monkeypatch, config, 5)
    before = {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"has done 4 steps already, and these epochs and max_steps ask for 1"):
        train(dataclasses.replace(config, resume=True, **shorter))
    assert {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()} == before


def test_the_same_length_said_in_another_way_is_no_change(config: TrainConfig, monkeypatch: pytest.MonkeyPatch,
                                                          tmp_path: Path) -> None:
    stop_after(monkeypatch, config, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(dataclasses.replace(config, epochs=9, max_steps=STEPS, resume=True))
    assert_same_run(repeatable(tmp_path / "run"), reference(config, tmp_path / "whole"))


def test_validation_notes_that_were_trained_on_are_counted(config: TrainConfig, tmp_path: Path) -> None:
    val = write_csv(tmp_path / "val.csv", [*notes(3), ("an unseen note", LABELS[0])])
    with pytest.warns(UserWarning, match=r"val\.csv: 3 of 4 notes stand in the training table") as said:
        train(dataclasses.replace(config, val=str(val), max_steps=1))
    assert SECRET not in "".join(str(it.message) for it in said)
    with pytest.warns(UserWarning, match="24 of 24 notes stand in the training table"):
        train(dataclasses.replace(config, val=config.data, max_steps=1, overwrite=True))


@pytest.mark.parametrize(("name", "value"), [("r", 8), ("seed", 1), ("batch_size", 3), ("lr", 0.5), ("dropout", 0.0)])
def test_resuming_with_other_settings_is_refused(config: TrainConfig, name: str, value: Any) -> None:
    train(dataclasses.replace(config, max_steps=1))
    with pytest.raises(ConfigError, match=f"resume: {name} is"):
        train(dataclasses.replace(config, resume=True, **{name: value}))


def test_what_was_no_setting_yet_resumes_as_its_default(config: TrainConfig) -> None:
    train(dataclasses.replace(config, max_steps=1))
    written = Path(config.out) / "config.toml"
    kept = [line for line in written.read_text().splitlines() if not line.startswith(("init_lora_weights", "use_dora"))]
    written.write_text("\n".join(kept))
    with pytest.raises(ConfigError, match=r"resume: init_lora_weights is 'pissa' and was 'lora'"):
        train(dataclasses.replace(config, resume=True, init_lora_weights="pissa"))
    assert train(dataclasses.replace(config, max_steps=2, resume=True)).steps == 2


def test_only_a_run_folder_is_resumed_or_overwritten(config: TrainConfig) -> None:
    out = Path(config.out)
    with pytest.raises(OutputError, match="no run to resume"):
        train(dataclasses.replace(config, resume=True))
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for options in (config, dataclasses.replace(config, overwrite=True), dataclasses.replace(config, resume=True)):
        with pytest.raises(OutputError):
            train(options)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_overwrite_starts_the_run_anew(config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(config, seed=3))
    train(dataclasses.replace(config, overwrite=True))
    assert_same_run(repeatable(tmp_path / "run"), reference(config, tmp_path / "whole"))


# What stops a run


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def broken(model: LlamaForCausalLM, batch: Batch) -> Tensor:
        seen.append(batch.rows)
        return label_loss(model, batch) * (math.nan if len(seen) > 4 else 1)    # two micro-batches a step: from step 3 on

    monkeypatch.setattr(stepping, "label_loss", broken)
    with pytest.raises(MiniloraError) as caught:
        train(config)
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message
    assert message.startswith("step 3: loss nan") and str([*seen[4], *seen[5]]) in message and config.data in message
    assert [line["step"] for line in metrics(Path(config.out))] == [1, 2]
    assert (Path(config.out) / "checkpoints" / "step-000002").is_dir()


def test_a_gradient_that_is_not_finite_stops_before_it_is_applied(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: LlamaForCausalLM, batch: Batch) -> Tensor:
        weight = next(p for p in model.parameters() if p.requires_grad)
        return label_loss(model, batch) + (weight.sum() * 0).sqrt()     # adds 0, with the derivative 1 / (2 * sqrt(0)) * 0

    monkeypatch.setattr(stepping, "label_loss", broken)
    with pytest.raises(MiniloraError, match=r"step 1: loss \d.* with gradient norm nan"):
        train(config)


# All weights


def test_full_tuning_writes_a_model_folder_that_predicts(config: TrainConfig, base: Path) -> None:
    full = dataclasses.replace(config, tune="full", quantize="none", dtype="auto", lr=1e-3)
    result = train(full)
    run = Path(config.out)
    assert {path.name for path in run.iterdir()} == RUN_FILES - {"adapter_config.json", "adapter_model.safetensors"} | {
        "config.json", "model.safetensors"}
    before, after = load_file(base / "model.safetensors"), load_file(run / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {name: tensor.shape for name, tensor in before.items()}
    assert [name for name, tensor in after.items() if torch.equal(tensor, before[name])] == []
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert result.trained == result.parameters == sum(tensor.numel() for tensor in after.values())
    predictor = Predictor.load(str(run))
    assert predictor.labels == LABELS and predictor.max_length == 128
    assert predictor.template.text == load_template("note").text
    assert predictor.predict(["fall"])[0].label in LABELS
    card = (run / "README.md").read_text()
    assert "LoRA" not in card and f"--model {run}" in card and "library_name: transformers" in card


def test_full_tuning_of_a_tied_model_keeps_it_tied(config: TrainConfig, tmp_path: Path) -> None:
    base = write_model(tmp_path / "tied", tie_word_embeddings=True)
    train(dataclasses.replace(config, model=str(base), tune="full", quantize="none", max_steps=2))
    assert "lm_head.weight" not in load_file(Path(config.out) / "model.safetensors")
    model = load_model(config.out, quantize=None, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_full_tuning_takes_a_tenth_of_the_default_rate(config: TrainConfig) -> None:
    train(dataclasses.replace(config, tune="full", quantize="none", lr=0.0, max_steps=1))
    assert metrics(Path(config.out))[0]["lr"] == pytest.approx(2e-5 * 4096 / 64)


def test_new_tokens_stand_in_the_folder_that_predicts(config: TrainConfig, base: Path) -> None:
    result = train(dataclasses.replace(config, **FULL, dtype="auto", lr=1e-3, new_tokens=20))
    known, learnt = load_tokenizer(base), load_tokenizer(config.out)
    note = notes(1)[0][0]
    assert learnt.vocab_size == known.vocab_size + 20 and len(learnt.encode(note)) < len(known.encode(note)) - 8
    weights = load_file(Path(config.out) / "model.safetensors")
    assert len(weights["model.embed_tokens.weight"]) == len(weights["lm_head.weight"]) == learnt.vocab_size
    assert result.trained == sum(tensor.numel() for tensor in weights.values())
    assert Predictor.load(config.out).predict([note])[0].label in LABELS
    assert "at most 20 new tokens" in (Path(config.out) / "README.md").read_text()


def test_a_resumed_run_keeps_the_tokens_that_it_learnt_where_the_table_has_changed(
        config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_csv(tmp_path / "changing.csv", notes(24))
    config = dataclasses.replace(config, **FULL, new_tokens=20, data=str(table))
    stop_after(monkeypatch, config, 3)
    before = (Path(config.out) / "tokenizer.json").read_bytes()
    write_csv(table, [(note[::-1], label) for note, label in notes(24)])
    with pytest.warns(UserWarning, match="has changed since step 2"):
        train(dataclasses.replace(config, resume=True))
    assert (Path(config.out) / "tokenizer.json").read_bytes() == before


def test_new_tokens_need_rows_that_are_trained(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="add tune full"):
        dataclasses.replace(config, new_tokens=20)


@pytest.mark.parametrize(("options", "words"), [({"tune": "full"}, "quantize none"),
                                                ({"tune": "full", "quantize": "none", "dtype": "bfloat16"}, "float32"),
                                                ({"tune": "some"}, "tune must be lora or full")])
def test_full_tuning_needs_weights_that_can_change(config: TrainConfig, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(config, **{"dtype": "auto", **options})


@pytest.mark.parametrize("limit", [20_000, 60_000, 150_000])
def test_a_disk_that_takes_no_more_ends_in_one_line_and_keeps_whole_checkpoints(config: TrainConfig, limit: int) -> None:
    """A real refusal by the system, at a limit on each file's size: in the weights, in the optimizer's state, or before."""
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
            "from minilora.cli import main; sys.exit(main(sys.argv[1:]))")
    flags = ["--model", config.model, "--data", config.data, "--out", config.out, "--max-steps", "2", "--quiet"]
    flags += ["--input-column", config.input_column, "--label-column", config.label_column]
    flags += ["--max-length", str(config.max_length)]
    ended = subprocess.run([sys.executable, "-c", code, "train", *flags, "--save-every", "1"], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("minilora: cannot write ") and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert not list(Path(config.out).rglob(".tmp-*"))
