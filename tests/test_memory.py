"""What a run is said to take, against what autograd keeps, what tensors hold, and what a process of its own took."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora import CheckpointError, ConfigError, PagedAdamW
from minilora.cli import main
from minilora.layers.nf4_linear import NF4Linear
from minilora.llama.config import LlamaConfig, num_parameters
from minilora.measured import kept_by_forward, make_model, measure, random_batch
from minilora.memory import Memory, Peaks, Workload, activations, logits_bytes, moment_bytes, parameter_sizes, predict
from minilora.memory_shared import table as shared_table
from minilora.memory_table import Column, bar, plan, size, table, to_have
from minilora.shapes import SHAPES, shape_of
from minilora.stepping import compute_gradients

SMALL = {**SHAPES["110m"], "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 320,
         "num_hidden_layers": 3, "vocab_size": 500}


def test_fewer_than_two_processes_are_refused() -> None:
    for numbers in ([0], [1], [2, 0]):
        with pytest.raises(ConfigError, match="--processes must be 2 or more"):
            shared_table(shape_of("tiny"), Workload("qlora"), numbers)


@pytest.mark.parametrize("kind", ["qlora", "lora", "full"])
@pytest.mark.parametrize("options", [
    {}, {"compute": torch.float32}, {"gradient_checkpointing": True}, {"r": 3, "target_modules": ("q_proj", "down_proj")},
    {"label_tokens": 63}, {"batch": 1, "label_tokens": 9}], ids=str)
@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": False}],
                         ids=["plain", "grouped", "untied"])
def test_activations_are_what_autograd_keeps(kind: Any, options: dict[str, Any], shape: dict[str, Any]) -> None:
    only = {"compute": torch.float32} if kind == "full" else {}
    work = Workload(kind, **{"batch": 3, "seq": 64, "label_tokens": 5, **options, **only})
    config = LlamaConfig.from_dict({**SMALL, **shape})
    kept, logits, offloaded = kept_by_forward(make_model(config, work), random_batch(config, work))
    assert offloaded == 0
    assert activations(config, work) == pytest.approx(kept, rel=0.025)
    assert logits_bytes(config, work) == pytest.approx(logits, rel=0.025)       # beside them lie the labels' numbers


@pytest.mark.parametrize("kind", ["qlora", "lora"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_activations_of_layers_large_enough_to_add_in_place(kind: Any, options: dict[str, Any]) -> None:
    work = Workload(kind, batch=2, seq=48, label_tokens=5, **options)
    config = LlamaConfig.from_dict({**SMALL, "hidden_size": 768, "intermediate_size": 1024})
    kept, *_ = kept_by_forward(make_model(config, work), random_batch(config, work))
    assert activations(config, work) == pytest.approx(kept, rel=0.025)


@pytest.mark.parametrize("kind", ["qlora", "full"])
@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("rows", [16, 96, 4096])
def test_activations_of_notes_longer_than_an_mlp_takes_at_once(kind: Any, offloading: bool, rows: int,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("minilora.memory.MLP_ROWS", "minilora.llama.model.MLP_ROWS", "minilora.measured.MLP_ROWS"):
        monkeypatch.setattr(place, rows)
    work = Workload(kind, batch=2, seq=48, label_tokens=48, gradient_checkpointing=True, activation_offloading=offloading,
                    compute=torch.float32 if kind == "full" else torch.bfloat16)
    config = LlamaConfig.from_dict(SMALL)
    kept, *_ = kept_by_forward(make_model(config, work), random_batch(config, work))
    parts = predict(config, work)
    assert parts.activations + parts.offloaded == pytest.approx(kept, rel=0.025)
    assert (parts.offloaded > 0) is offloading and parts.offloaded in (0, 2 * 3 * 96 * 128 * work.compute.itemsize)
    assert parts.total == predict(config, replace(work, activation_offloading=False)).total - parts.offloaded


@pytest.mark.parametrize("kind", ["qlora", "lora", "full"])
@pytest.mark.parametrize("options", [{}, {"double_quant": False, "blocksize": 128}, {"r": 5, "target_modules": ("v_proj",)}],
                         ids=str)
@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": False}, {"vocab_size": 501}], ids=str)
def test_what_is_stored_is_exact(kind: Any, options: dict[str, Any], shape: dict[str, Any]) -> None:
    work = Workload(kind, batch=2, seq=16, label_tokens=3, compute=torch.float32, **options)
    config = LlamaConfig.from_dict({**SMALL, **shape})
    model, parts = make_model(config, work), predict(config, work)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    compute_gradients(model, [random_batch(config, work)], torch.optim.SGD(trained, lr=0.1))
    adapters = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)
    absmax = sum(buffer.nbytes for layer in model.modules() if isinstance(layer, NF4Linear)
                 for name, buffer in layer.named_buffers() if name != "packed")
    everything = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert (parts.weights, parts.absmax, parts.adapters) == (everything - adapters - absmax, absmax, adapters)
    assert parts.gradients == sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    assert parts.optimizer == 2 * parts.gradients


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_rows_of_what_is_trained_in_full(tied: bool) -> None:
    config = LlamaConfig.from_dict({**SMALL, "tie_word_embeddings": tied})
    grown = LlamaConfig.from_dict({**SMALL, "tie_word_embeddings": tied, "vocab_size": config.vocab_size + 77})
    full = Workload("full", compute=torch.float32)
    assert predict(config, replace(full, new_tokens=77)) == predict(grown, full) != predict(config, full)
    assert predict(config, Workload("qlora", new_tokens=77)) == predict(config, Workload("qlora"))


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_sizes_add_up(name: str) -> None:
    assert sum(parameter_sizes(shape_of(name))) == num_parameters(shape_of(name))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("elements", [1, 4095, 4096, 4097, 70000])
def test_moments_are_counted_as_the_optimizer_keeps_them(bits: Any, elements: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(elements))
    parameter.grad = torch.ones(elements)
    optimizer = PagedAdamW([parameter], state_bits=bits)
    optimizer.step()
    state = optimizer.state_dict()["state"][0]
    assert moment_bytes(elements, bits) == sum(moment.nbytes for name, moment in state.items() if name != "step")


def test_a_budget_holds_moments_back() -> None:
    config = shape_of("110m")
    whole = predict(config, Workload("full", compute=torch.float32, gradient_checkpointing=True))
    paged = predict(config, Workload("full", compute=torch.float32, gradient_checkpointing=True, resident_bytes=128 << 20))
    assert whole.optimizer == 8 * num_parameters(config) == 876_238_848
    assert (paged.optimizer, paged.paged) == (128 << 20, whole.optimizer - (128 << 20))
    assert max(Peaks.of(whole)) - max(Peaks.of(paged)) >= 0.9 * paged.paged


def test_the_three_moments_of_a_step() -> None:
    parts = Memory(weights=100, absmax=10, adapters=5, gradients=40, optimizer=20, activations=70, logits=8, scratch=3,
                   block=30)
    assert Peaks.of(parts) == (135 + 70 + 8 + 3, 135 + 40 + 30 + 3, 135 + 40 + 3)
    assert Peaks.of(parts, micro_batches=2).begin == 135 + 40 + 70 + 8 + 3      # gradients of the first are there


@pytest.mark.parametrize(("kind", "options"), [
    ("qlora", {"gradient_checkpointing": True}), ("qlora", {}),
    ("full", {"gradient_checkpointing": True, "resident_bytes": 128 << 20})], ids=str)
def test_a_run_of_110_million_takes_what_is_said(kind: Any, options: dict[str, Any], tmp_path: Any) -> None:
    work = Workload(kind, batch=4, seq=256, compute=torch.float32 if kind == "full" else torch.bfloat16, **options)
    parts, found = predict(shape_of("110m"), work), measure("110m", work, folder=str(tmp_path))
    assert max(Peaks.of(parts)) == pytest.approx(found.peak, rel=0.10)
    for name in ("weights", "absmax", "adapters", "gradients", "optimizer", "activations", "logits", "paged"):
        assert getattr(parts, name) == pytest.approx(getattr(found.parts, name), rel=0.025), name


def test_the_table_shows_every_part_a_bar_and_the_machine() -> None:
    shown = table(plan("7b", shape_of("7b"), Workload("qlora", batch=1, seq=512, gradient_checkpointing=True)))
    for word in ("absmax", "adapters", "gradients", "optimizer", "activations", "logits", "scratch", "= peak", "to have"):
        assert word in shown
    rows = {line.split()[1]: line for line in shown.splitlines() if line.startswith("  ") and len(line.split()) > 2}
    assert rows["weights"].split()[2:] == ["26.95", "GB", "13.48", "GB", "3.76", "GB"]
    bars = [line.split() for line in shown.splitlines() if ", when " in line]
    assert [words[0] for words in bars] == ["full", "LoRA", "QLoRA"]
    assert bars[0][1].strip("WgOxs") == "" and len(bars[0][1]) == 60


def test_a_bar_is_cut_into_its_parts_to_scale() -> None:
    parts = Memory(weights=30, absmax=0, adapters=0, gradients=10, optimizer=20, activations=40, logits=0, scratch=0, block=5)
    drawn = bar(Column(Workload("lora"), parts, Peaks.of(parts)), largest=180)
    assert drawn.split()[1] == "W" * 10 + "O" * 7 + "x" * 13             # ends at 30, 50 and 90 of 180, in sixtieths
    assert "when the backward begins" in drawn


def test_the_memory_to_have_is_a_size_that_is_sold() -> None:
    parts = predict(shape_of("70b"), Workload("qlora", gradient_checkpointing=True))
    assert to_have(Column(Workload("qlora"), parts, Peaks.of(parts))) == "48 GB"     # QLoRA's own claim, for 65B
    assert (size(999), size(1.5e9), size(2_500_000)) == ("0.0 MB", "1.50 GB", "2.5 MB")


@pytest.mark.parametrize(("options", "message"), [
    ({"seq": 1}, "seq must be a whole number from 2"), ({"batch": -1}, "batch must be"), ({"r": 0}, "r must be"),
    ({"state_bits": 16}, "32 or 8"), ({"activation_offloading": True}, "add --gradient-checkpointing"),
    ({"kind": "full"}, "trains float32")], ids=str)
def test_a_workload_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Workload(**{"kind": "qlora", **options})


def test_a_model_that_is_not_there_and_too_many_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="4096 tokens exceed the model's 2048 positions"):
        plan("7b", shape_of("7b"), Workload("qlora", seq=4096))
    with pytest.raises(CheckpointError, match="no such folder"):
        shape_of("./nowhere")


def test_the_command_prints_the_table_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main(["memory", "--model", "1.1b", "--batch", "2", "--seq", "128", "--optimizer", "paged_adamw",
                 "--resident-mib", "64", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "1,100,048,384 parameters" in shown and "64 MiB of them in memory" in shown and "paged out" in shown
    columns = json.loads(path.read_text())
    assert [column["kind"] for column in columns] == ["full", "lora", "qlora"]
    assert columns[2]["predicted"]["optimizer"] == 64 << 20 and columns[2]["predicted"]["paged"] > 0
    assert main(["memory", "--model", "1.1b", "--json", str(path)]) == 2            # it is there already


def test_a_gpu_that_is_not_here_can_be_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {}
    for device in ("cpu", "cuda"):
        assert main(["memory", "--model", "7b", "--device", device, "--gradient-checkpointing"]) == 0
        rows[device] = next(line for line in capsys.readouterr().out.splitlines() if "activations" in line)
    assert rows["cpu"] != rows["cuda"]              # on a CPU attention is computed in float32
    offloading = ["memory", "--model", "7b", "--gradient-checkpointing", "--activation-offloading", "--device"]
    assert main([*offloading, "cuda"]) == 0
    shown = capsys.readouterr().out
    offloaded = next(line for line in shown.splitlines() if "offloaded" in line)
    # Both halves of 32 blocks, over 512 tokens of 4096 numbers; the last MLP is asked at 16 of them.
    assert size((63 * 512 + 16) * 4096 * 2) in offloaded and "checkpointing with offloading" in shown
    assert main([*offloading, "cpu"]) == 2
    if not torch.cuda.is_available():
        assert main(["memory", "--model", "7b", "--device", "cuda", "--measure", "qlora"]) == 2


@pytest.mark.parametrize("flags", [["--resident-mib", "nan"], ["--resident-mib", "0"], ["--seq", "-5"], ["--batch", "0"],
                                   ["--dtype", "int8"], ["--model", "nowhere/"], ["--measure", "everything"]], ids=" ".join)
def test_bad_flags_end_with_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--model", "tiny", *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
