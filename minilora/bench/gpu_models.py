"""Training on a GPU: a step of the 7B shape, the longest note that fits into so much memory, and what paging costs.

Peaks are those of the GPU's memory, as torch counts what it gave out.  No rows without a GPU.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from minilora.bench.events import in_turns
from minilora.bench.limits import forward_operations
from minilora.bench.models import checkpoint_of
from minilora.bench.rows import Row, Settings, Target
from minilora.bench.sides import Task, ratio, take_turns
from minilora.errors import MiniloraError
from minilora.layers.lora import LoRAConfig
from minilora.layers.qlora import add_lora
from minilora.llama.model import LlamaForCausalLM
from minilora.measured import random_batch
from minilora.memory import Workload
from minilora.optim.adamw import AdamW
from minilora.optim.paged_adamw import PagedAdamW
from minilora.shapes import random_model, shape_of
from minilora.stepping import compute_gradients

SIDE = 8192                         # of the square matrices whose product is the limit
CAPS_GB = (8, 16, 24)
MEASURED = (2048, 4096, 8192, 16384, 24576)     # tokens, from which the memory of others is told
STEP_OF_LENGTH = 64
R = 16


def products_per_second() -> float:
    """Multiplications and additions of a large product in bfloat16, of random numbers: zeros would go faster."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * SIDE ** 3 / in_turns(lambda: F.linear(a, b), rounds=9)[0]


def gpu_steps(settings: Settings) -> Iterator[Row]:
    """A QLoRA step of the 7B shape: 8 x 512 tokens, r = 16 on all seven linears, bfloat16, checkpointing."""
    if not torch.cuda.is_available():
        return
    config = shape_of("7b")
    task = Task("step", str(checkpoint_of(config, settings.folder)), 8, 512, r=R, gradient_checkpointing=True, device="cuda")
    limit = 3 * forward_operations(config, task.batch * task.length) / products_per_second()
    for name, label_tokens in (("gpu_qlora_step_7b_ckpt", 16), ("gpu_qlora_step_7b_ckpt_all_labels", 512)):
        ours, peer = take_turns(replace(task, label_tokens=label_tokens), settings.rounds(5), settings.peers)
        row = Row(name, "s", ours.median, limit=limit, limit_is="products", ours_peak_bytes=ours.peak_bytes)
        if peer is not None:
            times, spread = ratio(ours, peer)
            memory = peer.peak_bytes / ours.peak_bytes
            row = replace(row, peer=peer.median, ratio=times, spread=spread, peer_peak_bytes=peer.peak_bytes,
                          against="peft + bitsandbytes", targets=(Target("times peft + bitsandbytes", times, 1.5),
                                                                  Target("times as much memory there", memory, 2.0)))
        yield row


class _Trained:
    """The 8B shape with adapters and an optimizer, trained over notes of any length, of which every token carries loss."""

    def __init__(self) -> None:
        self.config = shape_of("8b")
        self.model: LlamaForCausalLM = random_model(self.config, device="cuda")
        add_lora(self.model, LoRAConfig(R), torch.Generator().manual_seed(0))
        self.model.gradient_checkpointing = self.model.activation_offloading = True
        self.model.train()
        self.optimizer = AdamW([parameter for parameter in self.model.parameters() if parameter.requires_grad])

    def step(self, tokens: int) -> int:
        """Peak bytes of a step over one note of that many tokens."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work = Workload("qlora", seq=tokens, label_tokens=tokens)
        compute_gradients(self.model, [random_batch(self.config, work).to(self.model.device)], self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_reserved()


def fitting(cap: float, lengths: Sequence[int], peaks: Sequence[float]) -> int:
    """Tokens that would just take `cap` bytes: on the line through the two lengths around it, or the two nearest to it.

    One line is not enough: an MLP is recomputed so many rows at a time, so memory grows steeply up to these, and slowly after.

    Args: lengths: rising. peaks: bytes of each.
    """
    upper = next((i for i in range(1, len(peaks)) if peaks[i] >= cap), len(peaks) - 1)
    a_token = (peaks[upper] - peaks[upper - 1]) / (lengths[upper] - lengths[upper - 1])
    return int(lengths[upper - 1] + (cap - peaks[upper - 1]) / max(a_token, 1.0))


def gpu_context(_: Settings) -> Iterator[Row]:
    """The longest note that trains at batch 1 on Llama 3.1 8B's shape, where torch may take no more than so much memory.

    What was measured at some lengths tells which one would just fit (`fitting`), and a step over that one shows it.
    """
    if not torch.cuda.is_available():
        return
    trained = _Trained()
    trained.step(MEASURED[0])           # moments are made at the first
    peaks = [trained.step(tokens) for tokens in MEASURED]
    whole = torch.cuda.get_device_properties(0).total_memory
    try:
        for cap in CAPS_GB:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 1e9 / whole))
            tokens = fitting(cap * 1e9, MEASURED, peaks)
            fitted = 0
            for share in (1.0, 0.98, 0.95, 0.9, 0.8):
                length = int(share * tokens) // STEP_OF_LENGTH * STEP_OF_LENGTH
                try:
                    peak = trained.step(length)
                    fitted = length
                    break
                except MiniloraError:
                    trained.optimizer.zero_grad(set_to_none=True)
            yield Row(f"gpu_context_8b_{cap}gb", "tokens", fitted, ours_peak_bytes=peak if fitted else None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def gpu_paging(_: Settings) -> Iterator[Row]:
    """The update of a 7B model's adapters at r = 64, a quarter of whose moments may stay, against one without pages."""
    if not torch.cuda.is_available():
        return
    def parameters() -> list[torch.nn.Parameter]:
        made = []
        for _ in range(32):
            for out, columns in shape_of("7b").linear_shapes().values():
                for size in ((64, columns), (out, 64)):
                    made.append(torch.nn.Parameter(torch.randn(size, device="cuda")))
                    made[-1].grad = torch.randn(size, device="cuda")
        return made

    plain = AdamW(parameters())
    moments = 8 * sum(parameter.numel() for group in plain.param_groups for parameter in group["params"])
    for name, share in (("resident", 2.0), ("quarter_host", 0.25)):
        paged = PagedAdamW(parameters(), resident_bytes=int(share * moments))
        ours, peer = in_turns(paged.step, plain.step, rounds=5)
        yield Row(f"gpu_paged_adamw_{name}", "s", ours, peer, peer / ours, against="without pages")
