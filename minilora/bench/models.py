"""Whole models of random weights: loading, steps, prefill, decoding; against transformers, peft and bitsandbytes.

Both sides read the same checkpoint, and a side's peak is that of its process from its start: loading and work, Python included.
"""
from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from minilora.bench.limits import bytes_per_second, forward_operations, operations_per_second
from minilora.bench.rows import Row, Settings, Target
from minilora.bench.sides import Taken, Task, ratio, take_turns
from minilora.llama.config import LlamaConfig
from minilora.memory import Workload, predict
from minilora.quant.nf4 import quantize_nf4
from minilora.shapes import shape_of, write_random_checkpoint

LABEL_TOKENS, NEW_TOKENS = 16, 32
MEMORY_SHARE = 1 / 0.45         # a step takes at most that share of the peers' memory
LOADING_SHARE = 0.85            # of the speed of quantizing alone, or of reading alone
READ_BYTES = 1 << 20            # at a time, of a file
LOADING_BYTES = 600_000_000     # over the model itself: torch, Python, and what is on its way from the file


def checkpoint_of(config: LlamaConfig, folder: Path) -> Path:
    """A 16-bit checkpoint of random weights; made once in a folder."""
    out = folder / f"{config.hidden_size}x{config.num_hidden_layers}"
    if not (out / "config.json").exists():
        write_random_checkpoint(config, out)
    return out


def row_of(name: str, task: Task, settings: Settings, rounds: int, least: float, against: str, limit: float | None = None,
           limit_is: str = "", memory: bool = False, extra: Sequence[Target] = ()) -> tuple[Row, Taken]:
    """Both sides of a task as a row, and what ours took."""
    ours, peer = take_turns(task, settings.rounds(rounds), settings.peers)
    if peer is None:
        return Row(name, "s", ours.median, limit=limit, limit_is=limit_is, ours_peak_bytes=ours.peak_bytes,
                   targets=tuple(extra)), ours
    times, spread = ratio(ours, peer)
    targets = [Target(f"times {against}", times, least)]
    if memory:
        targets.append(Target("times as much memory there", peer.peak_bytes / ours.peak_bytes, MEMORY_SHARE))
    return Row(name, "s", ours.median, peer.median, times, limit, ours.peak_bytes, peer.peak_bytes, against, spread, limit_is,
               (*targets, *extra)), ours


def loading(settings: Settings) -> Iterator[Row]:
    """1.1 billion weights, 2.2 GB in three files, read and quantized.  The limit: quantizing as many bytes, or reading them."""
    path = checkpoint_of(shape_of("1.1b"), settings.folder)
    files = sorted(path.glob("*.safetensors"))
    limit = max(reading_seconds(files), quantizing_seconds(shape_of("1.1b"), sum(file.stat().st_size for file in files)))
    row, ours = row_of("load_1b", Task("load", model=str(path)), settings, 3, 4.0, "transformers + bitsandbytes", limit,
                       "quantizing")
    parts = predict(shape_of("1.1b"), Workload("qlora"))
    room = (parts.weights + parts.absmax + LOADING_BYTES) / ours.peak_bytes
    targets = Target("of quantizing", limit / ours.median, LOADING_SHARE), Target("of the model and 0.6 GB", room, 1.0)
    yield Row(**{**vars(row), "targets": (*row.targets, *targets)})


def reading_seconds(files: Sequence[Path]) -> float:
    """Of reading files from where they are, the system's memory or the disk, without looking at what they hold."""
    buffer = bytearray(READ_BYTES)
    started = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def quantizing_seconds(config: LlamaConfig, total: int) -> float:
    """Of making `total` bytes of 16-bit weights 4-bit ones that are kept, at the speed of the linears of all blocks.

    The weights lie in memory already; the 4-bit ones are kept, so that their memory is new, as it is in loading.
    """
    shapes = config.linear_shapes().values()
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16() for shape in shapes]
    quantize_nf4(weights[0])                    # a first call makes the library
    started = time.perf_counter()
    kept = [quantize_nf4(weight) for _ in range(config.num_hidden_layers) for weight in weights]
    taken = time.perf_counter() - started
    return total * taken / (len(kept) // len(weights) * sum(weight.nbytes for weight in weights))


def steps(settings: Settings) -> Iterator[Row]:
    """An optimizer step of QLoRA, r = 16 on all seven linears, bfloat16, sixteen label tokens a note."""
    for name, shape, batch, length, checkpointing, least, rounds in (
            ("qlora_step_110m", "110m", 4, 256, False, 1.8, 9), ("qlora_step_110m_ckpt", "110m", 4, 256, True, 1.8, 9),
            ("qlora_step_1b_ckpt", "1.1b", 1, 128, True, 1.5, 5)):
        if settings.quick and shape != "110m":
            continue
        yield step_row(name, shape, batch, length, checkpointing, LABEL_TOKENS, least, settings, rounds)


def steps_all_labels(settings: Settings) -> Iterator[Row]:
    """The same where every token carries loss: then there is no logit to be left out."""
    yield step_row("qlora_step_110m_all_labels", "110m", 4, 256, False, 256, 1.0, settings, 5, memory=False)


def step_row(name: str, shape: str, batch: int, length: int, checkpointing: bool, label_tokens: int, least: float,
             settings: Settings, rounds: int, memory: bool = True) -> Row:
    """One kind of step. The limit: its products, forward and back, at the rate of torch's large ones."""
    task = Task("step", str(checkpoint_of(shape_of(shape), settings.folder)), batch, length, label_tokens=label_tokens,
                gradient_checkpointing=checkpointing)
    passes = 3 if checkpointing else 2
    limit = passes * forward_operations(shape_of(shape), batch * length) / operations_per_second(torch.bfloat16)
    return row_of(name, task, settings, rounds, least, "peft + bitsandbytes", limit, "products", memory)[0]


def prefill(settings: Settings) -> Iterator[Row]:
    """16 prompts of 128 tokens into the key/value cache."""
    task = Task("prefill", str(checkpoint_of(shape_of("1.1b"), settings.folder)), 16, 128)
    limit = forward_operations(shape_of("1.1b"), 16 * 128) / operations_per_second(torch.bfloat16)
    yield row_of("prefill_1b_b16", task, settings, 3, 1.3, "transformers + bitsandbytes", limit, "products")[0]


def decoding(settings: Settings) -> Iterator[Row]:
    """32 tokens behind prompts of 128, greedily, bare and with an adapter. The limit: all weights read once a token."""
    config = shape_of("1.1b")
    for name, batch, adapted, least, rounds in (("decode_1b_b1", 1, False, 1.2, 5), ("decode_1b_b16", 16, False, 2.0, 3),
                                                ("decode_1b_b1_adapter", 1, True, 1.2, 5)):
        task = Task("decode", str(checkpoint_of(shape_of("1.1b"), settings.folder)), batch, 128, NEW_TOKENS, adapted=adapted)
        limit = NEW_TOKENS * read_a_token(config) / bytes_per_second("read")
        against = f"{'peft' if adapted else 'transformers'} + bitsandbytes"
        row, ours = row_of(name, task, settings, rounds, least, against, limit, "reading")
        first = Target("of the second call's speed at the first", ours.median / ours.first, 0.9)
        yield Row(**{**vars(row), "targets": (*row.targets, first)})


def read_a_token(config: LlamaConfig) -> int:
    """Bytes of the weights that one token needs: all linears and the head, of the embedding one row."""
    parts = predict(config, Workload("qlora"))
    return parts.weights + parts.absmax - 2 * config.vocab_size * config.hidden_size


def scoring(settings: Settings) -> Iterator[Row]:
    """200 notes against 30 labels on the model that ships, against generating and taking the label nearest to that."""
    notes = 50 if settings.quick else 200
    yield row_of("score_labels", Task("score", batch=notes), settings, 5, 5.0, "generate and match")[0]
