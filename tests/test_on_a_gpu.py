"""Training and predicting on a GPU: the same bits every time, the CPU's within rounding, resumed as if never stopped."""
from __future__ import annotations

import csv
import hashlib
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minilora
from minilora.data.radiology import generate
from minilora.llama.config import LlamaConfig
from minilora.measured import make_model, random_batch
from minilora.memory import Workload, predict
from minilora.optim.adamw import AdamW
from minilora.optim.paged_adamw import PagedAdamW
from minilora.repeatable import repeatable
from minilora.shapes import SHAPES
from minilora.stepping import compute_gradients
from minilora.trie import predict_labels

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: these train on one")


def test_on_a_cpu_nothing_is_switched() -> None:
    with repeatable(torch.device("cpu")):
        assert torch.get_deterministic_debug_mode() == 0


def test_on_a_gpu_the_switch_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), repeatable(torch.device("cuda")):
        assert torch.get_deterministic_debug_mode() == 2 and not torch.utils.deterministic.fill_uninitialized_memory
        raise ZeroDivisionError
    assert torch.get_deterministic_debug_mode() == 0 and torch.utils.deterministic.fill_uninitialized_memory


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in ((300, 1000), (7,), (64, 4096)):
        made.append(torch.nn.Parameter(torch.randn(size, generator=generator).cuda()))
        made[-1].grad = torch.randn(size, generator=generator).cuda()
    return made


@ON_A_GPU
@pytest.mark.parametrize("bits", [32, 8])
def test_paged_updates_on_a_gpu_have_the_bits_of_those_without_pages(bits: int) -> None:
    kept = parameters()
    plain = (torch.optim.AdamW(kept, lr=1e-2, weight_decay=0.1, foreach=False, fused=False) if bits == 32 else
             PagedAdamW(kept, lr=1e-2, weight_decay=0.1, state_bits=8, resident_bytes=1 << 28))
    paged = parameters()
    optimizer = PagedAdamW(paged, lr=1e-2, weight_decay=0.1, state_bits=bits, page_bytes=1 << 18, resident_bytes=1 << 19)
    for step in range(4):
        plain.step()
        optimizer.step()
        if step == 1:
            assert optimizer.evict() > 0
        for ours, theirs in zip(paged, kept, strict=True):
            assert torch.equal(ours, theirs)


@ON_A_GPU
def test_updates_on_a_gpu_have_the_bits_of_torch() -> None:
    ours, theirs = parameters(), parameters()
    first, second = AdamW(ours, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False)
    for _ in range(3):
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "notes.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["input", "label"])
        for example in generate(n=200, seed=3)["train"]:
            writer.writerow([example.note, example.label])
    return path


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


@ON_A_GPU
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_same_training_on_a_gpu_writes_the_same_adapter(table: Path, tmp_path: Path, gradient_checkpointing: bool) -> None:
    config = minilora.TrainConfig(model="tiny", data=str(table), out=str(tmp_path / "a"), max_steps=12, batch_size=8,
                                  dropout=0.1, device="cuda", quiet=True, gradient_checkpointing=gradient_checkpointing)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*deterministic")
        minilora.train(config)
        minilora.train(replace(config, out=str(tmp_path / "b")))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@ON_A_GPU
def test_offloading_on_a_gpu_writes_the_same_adapter(table: Path, tmp_path: Path) -> None:
    config = minilora.TrainConfig(model="tiny", data=str(table), out=str(tmp_path / "a"), max_steps=12, batch_size=8,
                                  dropout=0.1, device="cuda", quiet=True, gradient_checkpointing=True)
    minilora.train(config)
    minilora.train(replace(config, out=str(tmp_path / "b"), activation_offloading=True))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@ON_A_GPU
def test_what_is_offloaded_does_not_lie_on_the_gpu() -> None:
    config = LlamaConfig.from_dict({**SHAPES["110m"], "num_hidden_layers": 24, "max_position_embeddings": 8192})
    work = Workload("qlora", seq=8192, label_tokens=8192, gradient_checkpointing=True, on_gpu=True)
    peaks = []
    for offloading in (False, True):
        model = make_model(config, replace(work, activation_offloading=offloading), "cuda")
        batch = random_batch(config, work).to(model.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            compute_gradients(model, [batch], torch.optim.SGD(trained, lr=0.1))
            for parameter in trained:
                parameter.grad = None
        peaks.append(torch.cuda.max_memory_allocated())
        del model, trained
    offloaded = predict(config, replace(work, activation_offloading=True)).offloaded
    assert offloaded == 48 * 8192 * 768 * 2 and peaks[0] - peaks[1] > 0.9 * offloaded


@ON_A_GPU
def test_training_on_a_gpu_goes_the_cpus_way(table: Path, tmp_path: Path) -> None:
    config = minilora.TrainConfig(model="tiny", data=str(table), out=str(tmp_path / "gpu"), max_steps=10, batch_size=8,
                                  dtype="float32", device="cuda", quiet=True)
    there = minilora.train(config)
    here = minilora.train(replace(config, out=str(tmp_path / "cpu"), device="cpu"))
    assert there.loss == pytest.approx(here.loss, rel=1e-3)
    notes = ["History: appendicitis. Right lower quadrant pain.", "Headache after a fall, on warfarin."]
    labels = (tmp_path / "cpu" / "labels.txt").read_text().splitlines()
    answers = []
    for device in ("cuda", "cpu"):
        model = minilora.load_model("tiny", adapter=tmp_path / "cpu", device=device, dtype=torch.float32)
        tokenizer = minilora.load_tokenizer("tiny")
        answers.append(predict_labels(model, tokenizer, [tokenizer.encode(note) for note in notes], labels)[0])
    assert answers[0] == answers[1]
