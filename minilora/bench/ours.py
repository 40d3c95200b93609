"""Our side of `take_turns`; the peers' is scripts/peers.py, function for function.

    python -m minilora.bench.ours '{"work": "step", …}'
"""
from __future__ import annotations

import gc
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from torch import nn

from minilora.bench.sides import Task, serve
from minilora.data.batches import Batch
from minilora.data.prompts import IGNORED, load_template
from minilora.data.radiology.dataset import generate as generate_notes
from minilora.errors import MiniloraError
from minilora.generate import evaluation_mode, generate_ids
from minilora.layers.lora import LoRAConfig
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import add_lora
from minilora.llama.cache import KVCache
from minilora.llama.checkpoint import load_checkpoint
from minilora.llama.tokenizer import Tokenizer
from minilora.loading import load_model, load_tokenizer
from minilora.malloc import keep_freed_memory
from minilora.optim.adamw import AdamW
from minilora.quant.nf4 import quantize_nf4
from minilora.stepping import compute_gradients
from minilora.trie import predict_labels

RATE = 2e-4
SCORED_LABELS = 30


def token_ids(task: Task, vocabulary: int) -> torch.Tensor:
    """Random tokens, the same on both sides: (batch, length) int64."""
    return torch.randint(3, vocabulary, (task.batch, task.length), generator=torch.Generator().manual_seed(0))


def label_ids(task: Task, ids: torch.Tensor) -> torch.Tensor:
    """The last tokens of each sequence carry loss: (batch, length) int64."""
    labels = torch.full_like(ids, IGNORED)
    labels[:, -task.label_tokens :] = ids[:, -task.label_tokens :]
    return labels


def scored_notes(task: Task) -> tuple[list[str], list[str]]:
    """Prompts over synthetic notes, and the label set to choose from: what both sides score."""
    examples = generate_notes(n=max(100, 20 * task.batch), seed=1)["test"]
    labels = sorted({example.label for example in examples})[:SCORED_LABELS]
    template = load_template("tiny")
    return [template.fill(example.note) for example in examples[: task.batch]], labels


def matrices(task: Task) -> list[torch.Tensor]:
    """The weights of unpack and product: (out, in) float32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(task.shape, generator=generator) for _ in range(task.layers)]


def load(task: Task) -> Callable[[], object]:
    """A 16-bit folder into a 4-bit model."""
    def call() -> None:
        load_checkpoint(Path(task.model), device=task.device)
        gc.collect()
    return call


def step(task: Task) -> Callable[[], object]:
    """One optimizer step of QLoRA, adapters on all seven linears of each block."""
    model = load_checkpoint(Path(task.model), dtype=task.torch_dtype, device=task.device)
    add_lora(model, LoRAConfig(task.r, 2 * task.r), torch.Generator().manual_seed(0))
    model.gradient_checkpointing = task.gradient_checkpointing
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=RATE)
    ids = token_ids(task, model.config.vocab_size)
    batch = Batch(ids, torch.ones_like(ids), label_ids(task, ids), task.batch * min(task.label_tokens, task.length - 1),
                  list(range(task.batch))).to(model.device)

    keep_freed_memory()

    def call() -> None:
        compute_gradients(model, [batch], optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return call


def prefill(task: Task) -> Callable[[], object]:
    """Read prompts into a key/value cache; logits of each one's last token."""
    model = load_checkpoint(Path(task.model), dtype=task.torch_dtype, device=task.device)
    ids = token_ids(task, model.config.vocab_size).to(model.device)

    def call() -> None:
        with evaluation_mode(model):
            model(ids, cache=KVCache(model.config, task.batch, task.length, model.dtype, model.device), last_only=True)
    return call


class _NeverEnds(Tokenizer):
    """No token ends an answer, so that both sides write as many."""

    def __init__(self) -> None:
        self.eos_id = None


def decode(task: Task) -> Callable[[], object]:
    """Seconds of writing tokens after prompts that were read."""
    model = load_checkpoint(Path(task.model), dtype=task.torch_dtype, device=task.device)
    if task.adapted:
        add_lora(model, LoRAConfig(task.r, 2 * task.r), torch.Generator().manual_seed(0))
    model.config.raw.pop("eos_token_id", None)
    prompts = token_ids(task, model.config.vocab_size).tolist()
    return written(model, lambda new: generate_ids(model, _NeverEnds(), prompts, new, task.batch), task.new_tokens)


def written(model: nn.Module, write: Callable[[int], object], new_tokens: int) -> Callable[[], float]:
    """Seconds of `new_tokens` tokens behind the first, from the end of one call of the model to the end of the last."""
    def seconds() -> float:
        ends: list[float] = []
        hook = model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
        write(new_tokens + 1)
        hook.remove()
        if len(ends) != new_tokens + 1:
            raise MiniloraError(f"{new_tokens + 1} tokens took {len(ends)} calls of the model, not one each")
        return ends[-1] - ends[0]

    return seconds


def score(task: Task) -> Callable[[], object]:
    """The best of a label set for each note, by the exact probability of each, on the model that ships."""
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    prompts, labels = scored_notes(task)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    keep_freed_memory()                 # as `predict` and `evaluate` do
    return lambda: predict_labels(model, tokenizer, ids, labels)


def unpack(task: Task) -> Callable[[], object]:
    """A weight from 4 bits into a buffer that was used before."""
    weight = quantize_nf4(matrices(task)[0]).to(task.device)
    out = torch.zeros(task.shape, dtype=task.torch_dtype, device=task.device)
    return lambda: weight.dequantize(out=out)


def product(task: Task) -> Callable[[], object]:
    """Rows through a 4-bit layer, or through several in turn."""
    layers = cycle([NF4Linear(quantize_nf4(weight)).to(task.device).train(task.grad) for weight in matrices(task)])
    x = rows_of(task).requires_grad_(task.grad)

    def call() -> None:
        with torch.set_grad_enabled(task.grad):
            for _ in range(task.layers):
                next(layers)(x)
    return call


def rows_of(task: Task) -> torch.Tensor:
    """The x of a product: (rows, in)."""
    return torch.randn(task.rows, task.shape[1], generator=torch.Generator().manual_seed(1)).to(task.device, task.torch_dtype)


WORKS: dict[str, Callable[[Task], Callable[[], object]]] = {
    "load": load, "step": step, "prefill": prefill, "decode": decode, "score": score, "unpack": unpack, "product": product}

if __name__ == "__main__":
    serve(lambda task: WORKS[task.work](task))
