"""A step of several processes: what each holds, and what crosses the network, from a model's shape.

    ddp     holds all of it.  Of n trained numbers, whose gradients are summed over P processes in a ring, a process sends
                2 (P − 1)/P · 4 n        bytes a step
    fsdp    holds 1/P of the blocks' 4-bit weights and constants, and `GATHERED` whole blocks while it computes.  To gather what
            the others hold, a process receives, and in a ring sends,
                2 (P − 1)/P · blocks     bytes for each micro-batch: once for its forward, once for its backward
            and the sum of ddp once a step

The notes of a micro-batch are shared out, so activations are those of its share.  Embeddings, head, norms, adapters, gradients
and moments are whole everywhere.

Source: all-reduce in a ring, https://arxiv.org/abs/1802.05799; ZeRO, arXiv 1910.02054, section 7 (communication).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minilora.errors import ConfigError
from minilora.llama.config import LlamaConfig, linear_parameters, num_parameters
from minilora.memory import Peaks, Workload, predict
from minilora.memory_table import size

GATHERED = 2            # blocks: the one that is computed with, and the buffer it arrives in


@dataclass(frozen=True)
class Share:
    """Of one process among several, in bytes. Attributes: peak: held at most. sent: over the network in a step."""

    processes: int
    kind: str
    peak: int
    sent: int


def shares(config: LlamaConfig, work: Workload, processes: int) -> list[Share]:
    """Each way to share a step of QLoRA.

    Args: work: of the whole step; its notes are shared out evenly, a note each at least.

    Raises: ConfigError: fewer than two processes.
    """
    if processes < 2:
        raise ConfigError(f"--processes must be 2 or more, not {processes}")
    mine = replace(work, kind="qlora", batch=-(-work.batch // processes))
    parts = predict(config, mine)
    tables = (num_parameters(config) - linear_parameters(config)) * work.compute.itemsize
    blocks = parts.weights + parts.absmax - tables
    summed = ring(parts.gradients, processes)
    apart = parts._replace(weights=parts.weights - blocks + -(-blocks // processes)
                           + min(GATHERED, config.num_hidden_layers) * blocks // config.num_hidden_layers)
    return [Share(processes, "ddp", max(Peaks.of(parts, work.accumulate)), summed),
            Share(processes, "fsdp", max(Peaks.of(apart, work.accumulate)),
                  summed + work.accumulate * ring(blocks, processes))]


def table(config: LlamaConfig, work: Workload, numbers: Sequence[int]) -> str:
    """A line for each number of processes and way.

    Raises: ConfigError: as `shares`.
    """
    found = [share for processes in numbers for share in shares(config, work, processes)]
    lines = ["  QLoRA by several processes, of each: peak memory, and what it sends over the network in a step", "",
             f"  {'processes':<12}{'way':<8}{'notes at a time':>16}{'peak':>14}{'sent':>14}"]
    lines += [f"  {share.processes:<12}{share.kind:<8}{-(-work.batch // share.processes):>16}{size(share.peak):>14}"
              f"{size(share.sent):>14}" for share in found]
    whole = [size(ring(4 * num_parameters(config), processes)) for processes in numbers]
    return "\n".join([*lines, "", f"  The gradients of all weights, in float32, would be {', '.join(whole)}."])


def ring(size: int, processes: int) -> int:
    """Bytes that a process sends where `size` bytes are summed in a ring, or gathered twice."""
    return 2 * size * (processes - 1) // processes
