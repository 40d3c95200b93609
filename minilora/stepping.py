"""What an optimizer step is made of, beside the loop: rates, the optimizer, and gradients that outlive memory pressure.

Rate: linear warm-up, then a cosine to zero; LoRA+ (arXiv 2402.12354) trains B faster than A.

Pressure: paged optimizer state is what a GPU can do without between two steps.  Where forward or backward finds no memory, its
pages are put out and the gradients of the step are computed again, once, with the same dropout: all of them, since a backward
that stopped half-way has added to some already.

Lessons 14, 18 and 19 explain it.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from minilora.config import TrainConfig
from minilora.data.batches import Batch
from minilora.errors import TO_TAKE_LESS, MiniloraError, memory_reason
from minilora.llama.model import LlamaForCausalLM
from minilora.loss import label_loss
from minilora.optim.adamw import AdamW
from minilora.optim.paged_adamw import PagedAdamW
from minilora.repeatable import repeatable
from minilora.run_checkpoints import random_state, set_random_state

MODEL_RATE, MODEL_WIDTH = 2e-4, 4096        # QLoRA, appendix B.2: the rate at 7B, whose hidden size is 4096
FULL_SHARE = 0.1                            # of that rate where all weights move: full tuning at 7B takes about 2e-5
Groups = list[tuple[list[torch.nn.Parameter], float]]


def peak_learning_rate(config: TrainConfig, hidden_size: int) -> float:
    """The rate that was set, or QLoRA's, scaled by width."""
    return config.lr or MODEL_RATE * MODEL_WIDTH / hidden_size * (FULL_SHARE if config.tune == "full" else 1)


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Rate of step 1 … `total`: linear up to `peak` over the first `warmup` share, then half a cosine.

    The cosine would reach 0 one step after the last: no step is wasted, not even that of a run of one step.
    """
    rising = max(1, round(total * warmup)) if warmup else 0
    if step <= rising:
        return peak * step / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising + 1)))


def rate_groups(model: torch.nn.Module, loraplus_lr_ratio: float) -> Groups:
    """Trained parameters in groups, with each group's learning rate over the run's.

    LoRA+ (arXiv 2402.12354, section 4): B, which starts at zero, is trained at a higher rate than A.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if loraplus_lr_ratio == 1:
        return [(list(trained.values()), 1.0)]
    fast = [parameter for name, parameter in trained.items() if name.endswith("lora_B.weight")]
    rest = [parameter for name, parameter in trained.items() if not name.endswith("lora_B.weight")]
    return [(rest, 1.0), (fast, loraplus_lr_ratio)]


def make_optimizer(groups: Groups, config: TrainConfig, device: torch.device) -> AdamW:
    """AdamW over `rate_groups`, paged or not; the loop sets its rates.

    Raises: ConfigError, OutputError: see `PagedAdamW`.
    """
    parameters = [{"params": trained} for trained, _ in groups]
    if config.optimizer == "adamw":
        return AdamW(parameters, lr=0.0, weight_decay=config.weight_decay)
    # The page file has no name; where it lies only says on which disk.
    out = Path(config.out).absolute()
    folder = next(path for path in (out, *out.parents) if path.is_dir())
    own: Literal["host", "disk"] = "host" if device.type == "cuda" else "disk"
    return PagedAdamW(parameters, lr=0.0, weight_decay=config.weight_decay, state_bits=8 if config.state_bits == 8 else 32,
                      page_bytes=config.page_bytes, resident_bytes=int(config.resident_mib * 2 ** 20),
                      backing=own if config.backing == "auto" else config.backing, folder=folder)


@dataclass(frozen=True)
class Gradients:
    """A step's mean loss over its label tokens, and what it took.

    Attributes: evicted_bytes: of optimizer pages that were put out to compute it. broken_rows: of the micro-batches whose loss
        is NaN or infinite.
    """

    loss: float
    evicted_bytes: int = 0
    broken_rows: tuple[int, ...] = ()


def compute_gradients(model: LlamaForCausalLM, batches: list[Batch], optimizer: torch.optim.Optimizer,
                      label_tokens: int | None = None, again: bool = True) -> Gradients:
    """Forward and backward of a step's micro-batches; the gradients stand in the parameters, which had none.

    Args:
        label_tokens: of the whole step, default those of the batches. A batch that says to have none does not count.
        again: whether it may be done again with fewer pages in memory; not where other processes would have to as well.

    Raises: MiniloraError: out of memory, with no pages to put out, or even so.
    """
    random = random_state()
    try:
        return _forward_backward(model, batches, label_tokens)
    except (MemoryError, RuntimeError) as error:        # torch.OutOfMemoryError is a RuntimeError
        reason = memory_reason(error)
        if reason is None:
            raise
    # Behind the handler, not in it: the error holds on to the tensors of the forward that failed.
    freed = optimizer.evict() if again and isinstance(optimizer, PagedAdamW) else 0
    if freed:
        optimizer.zero_grad(set_to_none=True)
        set_random_state(random)
        torch.cuda.empty_cache()
        try:
            return replace(_forward_backward(model, batches, label_tokens), evicted_bytes=freed)
        except (MemoryError, RuntimeError) as error:
            reason = memory_reason(error)
            if reason is None:
                raise
    raise MiniloraError(f"out of memory, with no optimizer pages left to put out ({reason:.100}): {TO_TAKE_LESS}") from None


def _forward_backward(model: LlamaForCausalLM, batches: list[Batch], label_tokens: int | None) -> Gradients:
    over, loss = label_tokens or sum(batch.label_tokens for batch in batches), 0.0
    broken: list[int] = []
    for batch in batches:
        # Both ways: what a block keeps must be the same when it is computed again, within backward.
        with repeatable(model.device):
            part = label_loss(model, batch) / over if batch.label_tokens else 0 * label_loss(model, batch)
            part.backward()
        value = float(part.detach())
        loss += value
        if not math.isfinite(value):
            broken += batch.rows
    return Gradients(loss, broken_rows=tuple(broken))
