"""What a run will take, before anything is loaded: bytes from a model's shape and the settings of the run.

    weights      embeddings, norms, head and linears: 4 bits, 16, or, where all of them are trained, 32
    absmax       a constant for every 64 weights of 4 bits, itself in 8 bits; one float32 for 256 of those
    adapters     r · (in + out) float32 for each linear
    gradients    float32, of what is trained: all weights, or the adapters alone
    optimizer    two moments of what is trained, float32 or 8 bits; over pages, no more than the budget is in memory
    activations  what the forward keeps for the backward: `block_activations`; with checkpointing, the input of each half of a
                 block, attention's result, and the inside of one half, which of an MLP is that of some rows; offloaded, those
                 inputs lie in host memory
    logits       of the label tokens alone: compute type, float32, and their log-softmax
    scratch      what is made and dropped: one weight unpacked, a block's gradients on their way through its MLP (or, of long
                 notes, its attention), and, where all weights are trained, the gradient of a table or the root of its second
                 moment

Activations and gradients are not there together: the backward drops the ones while it makes the others.  So the peak is the
largest of three moments: the backward's begin and its end, and the optimizer's step.

Not in it: Python and torch themselves, what malloc keeps of freed memory, dropout, DoRA.  `measured` takes the same table of
a run of random weights.

Lessons 01 and 19 explain it.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from minilora.config import check_offloading
from minilora.errors import ConfigError
from minilora.kernels.block import HEAD_DIMS, kernel
from minilora.layers.lora import ALL_LINEARS
from minilora.layers.nf4_linear import FUSED_WEIGHTS
from minilora.layers.qlora import is_target
from minilora.llama.config import LlamaConfig, linear_parameters, num_parameters
from minilora.llama.model import MLP_ROWS
from minilora.loss import CHUNK_BYTES, picks
from minilora.optim.adamw import BLOCKSIZE_8BIT
from minilora.optim.paged_adamw import SMALLEST_8BIT
from minilora.quant.nf4 import NESTED_BLOCKSIZE

Kind = Literal["full", "lora", "qlora"]
Moment = Literal["begin", "end", "step"]
KINDS: tuple[Kind, ...] = ("full", "lora", "qlora")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Workload:
    """What is trained, and how.

    Raises: ConfigError: a value out of range.

    Attributes:
        kind: all weights, adapters over dense ones, or adapters over 4-bit ones.
        batch, seq: notes of a micro-batch, and tokens of each. label_tokens: of these, those that carry loss.
        compute: type of the arithmetic; float32 for kind full.
        state_bits: of each moment. resident_bytes: budget of pages; None keeps all moments in memory.
        accumulate: micro-batches of a step. on_gpu: attention then stays in the compute type.
        new_tokens: rows more of embedding and head, in a run of kind full.
    """

    kind: Kind
    batch: int = 1
    seq: int = 512
    label_tokens: int = 16
    r: int = 16
    target_modules: tuple[str, ...] = ALL_LINEARS
    compute: torch.dtype = torch.bfloat16
    blocksize: int = 64
    double_quant: bool = True
    gradient_checkpointing: bool = False
    activation_offloading: bool = False
    accumulate: int = 1
    state_bits: int = 32
    resident_bytes: int | None = None
    on_gpu: bool = False
    new_tokens: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("seq", 2), ("label_tokens", 1), ("r", 1), ("blocksize", 1), ("accumulate", 1),
                            ("new_tokens", 0)):
            if not least <= getattr(self, name) <= 1 << 24:
                raise ConfigError(f"{name} must be a whole number from {least} to {1 << 24:,}, not {getattr(self, name)}")
        check_offloading(self.activation_offloading, self.gradient_checkpointing)
        if self.state_bits not in (32, 8):
            raise ConfigError(f"state_bits must be 32 or 8, not {self.state_bits}")
        if self.kind == "full" and self.compute != torch.float32:
            raise ConfigError(f"kind full trains float32 weights, not {self.compute}")

    def shape(self, config: LlamaConfig) -> LlamaConfig:
        """What is trained, of a base of this shape."""
        return replace(config, vocab_size=config.vocab_size + (self.new_tokens if self.kind == "full" else 0))

    @property
    def computed(self) -> int:
        """Positions that the last block is computed at."""
        return self.asked if picks(min(self.label_tokens, self.seq - 1), self.seq - 1) else self.batch * self.seq

    @property
    def asked(self) -> int:
        """Positions of a micro-batch at which a label token is predicted; nothing predicts the first token."""
        return self.batch * min(self.label_tokens, self.seq - 1)


class Memory(NamedTuple):
    """Bytes of a run, by what they hold.

    `paged` lies in host memory or in a file, `offloaded` in host memory; neither is in a sum. `block` is the part of the
    activations that lies in one block.
    """

    weights: int
    absmax: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    scratch: int
    paged: int = 0
    block: int = 0
    offloaded: int = 0

    def held(self, micro_batches: int = 1) -> dict[Moment, Memory]:
        """The parts that are there at each moment; with several micro-batches, gradients of those before when one begins."""
        earlier = self.gradients if micro_batches > 1 else 0
        return {"begin": self._replace(gradients=earlier), "end": self._replace(activations=self.block, logits=0),
                "step": self._replace(activations=0, logits=0)}

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self[:self._fields.index("paged")])


class Peaks(NamedTuple):
    """Bytes at the three moments of a step that can be its peak."""

    begin: int
    end: int
    step: int

    @staticmethod
    def of(parts: Memory, micro_batches: int = 1) -> Peaks:
        """The sums of `Memory.held`."""
        return Peaks(**{moment: held.total for moment, held in parts.held(micro_batches).items()})


def predict(config: LlamaConfig, work: Workload) -> Memory:
    """Bytes of a run.

    Guarantee: weights to optimizer are exact; activations within 2.5 % of what autograd keeps (tests/test_memory.py); the peak
        within 10 % of a run's for 110 million and 1.1 billion parameters (`minilora memory --measure`).
    """
    config, compute = work.shape(config), work.compute.itemsize
    linears = config.linear_shapes()
    in_blocks, everything = linear_parameters(config), num_parameters(config)
    adapted = {name: shape for name, shape in linears.items() if is_target(name, work.target_modules)}
    adapter_sizes = [] if work.kind == "full" else [work.r * size for _ in range(config.num_hidden_layers)
                                                    for shape in adapted.values() for size in shape]
    trained = parameter_sizes(config) if work.kind == "full" else adapter_sizes
    if work.kind == "qlora":
        blocks = [-(-rows * columns // work.blocksize) for rows, columns in linears.values()]
        weights = config.num_hidden_layers * sum((rows * columns + 1) // 2 for rows, columns in linears.values())
        absmax = config.num_hidden_layers * sum(
            count + 4 * -(-count // NESTED_BLOCKSIZE) + 4 if work.double_quant else 4 * count for count in blocks)
        weights += (everything - in_blocks) * compute
    else:
        weights, absmax = everything * compute, 0
    moments = sum(moment_bytes(size, work.state_bits) for size in trained)
    resident = moments if work.resident_bytes is None else min(moments, work.resident_bytes)
    return Memory(weights, absmax, 4 * sum(adapter_sizes), 4 * sum(trained), resident, activations(config, work),
                  logits_bytes(config, work), scratch_bytes(config, work), moments - resident,
                  largest_part(config, work), checkpoints(config, work) if work.activation_offloading else 0)


def moment_bytes(size: int, state_bits: int) -> int:
    """Both moments of a parameter of `size` elements."""
    if state_bits == 32 or size < SMALLEST_8BIT:
        return 8 * size
    return 2 * (size + 4 * -(-size // BLOCKSIZE_8BIT))


def parameter_sizes(config: LlamaConfig) -> list[int]:
    """Elements of every parameter but biases, a tied head counted once."""
    hidden = config.hidden_size
    block = [rows * columns for rows, columns in config.linear_shapes().values()] + [hidden, hidden]
    tables = [config.vocab_size * hidden] * (1 if config.tie_word_embeddings else 2)
    return tables + block * config.num_hidden_layers + [hidden]


class Kept(NamedTuple):
    """Bytes that a block keeps for its backward: by its attention half, by its MLP half, and of attention's result."""

    attention: int
    mlp: int
    attended: int


def block_activations(config: LlamaConfig, work: Workload, tokens: int, asked: int) -> Kept:
    """Bytes that a block keeps for its backward, of `tokens` tokens; queries and MLP at `asked` of them (`label_loss`).

    One line a kept tensor, in the order of the forward; (…) its width.  What goes into a half, a norm keeps.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    compute, full = work.compute.itemsize, work.kind == "full"
    # On a CPU attention gives float32, but for heads that have a kernel here, which rounds; it takes every position at once.
    rounded = work.compute == torch.bfloat16 and config.head_dim in HEAD_DIMS and asked == tokens and kernel() is not None
    wide = compute if work.on_gpu or rounded else 4
    narrow = compute if asked == tokens else wide       # and keeps q, k, v as they came, where every position asks

    def adapted(*names: str) -> int:
        return sum(is_target(name, work.target_modules) for name in names) if not full else 0

    def norm(rows: int) -> int:
        """Its input and 1/√(mean square); in full tuning the normed values too (hidden)."""
        return rows * (compute * hidden + 4 + (compute * hidden if full else 0))

    def copies(*names: str) -> int:
        """A and B in the compute type, where the base doesn't add in place."""
        sizes = [config.linear_shapes()[name] for name in names if adapted(name)]
        return sum(rank * (rows + columns) for rows, columns in sizes
                   if compute < 4 and not (work.kind == "qlora" and rows * columns >= FUSED_WEIGHTS))

    rank = compute * work.r
    kept = norm(tokens)
    if full or adapted("q_proj", "k_proj", "v_proj"):
        kept += tokens * compute * hidden                                  # what q, k and v read
    kept += rank * (asked * adapted("q_proj") + tokens * adapted("k_proj", "v_proj"))
    kept += narrow * (asked * query + 2 * tokens * key)                    # q, k, v
    attended = asked * (wide * query + 4 * config.num_attention_heads)     # what attention gives, and log Σ exp of a row
    kept += attended
    if wide != compute and (full or adapted("o_proj")):
        kept += asked * compute * query                                    # the same rounded, which o reads
    kept += rank * asked * adapted("o_proj") + copies(*ATTENTION)
    mlp = norm(asked)
    if full or adapted("gate_proj", "up_proj"):
        mlp += asked * compute * hidden                                    # what gate and up read
    mlp += asked * compute * 2 * inner                                     # gate, up
    if full or adapted("down_proj"):
        mlp += asked * compute * inner                                     # silu(gate) · up, which down reads
    mlp += rank * asked * adapted(*MLP) + copies(*MLP)
    return Kept(kept, mlp, attended)


def activations(config: LlamaConfig, work: Workload) -> int:
    """Bytes that the forward keeps for the backward, but for the logits; with checkpointing and the largest half of a block.

    What is offloaded is not among them.
    """
    tokens, layers = work.batch * work.seq, config.num_hidden_layers
    asked, compute, hidden = work.computed, work.compute.itemsize, config.hidden_size
    kept = tokens * 2 * compute * config.head_dim + asked * (compute * hidden + 4)      # rotation; the last norm
    if work.kind == "full":
        kept += (asked + work.asked) * compute * hidden                                 # normed, and what the head reads
    block, last = block_activations(config, work, tokens, tokens), block_activations(config, work, tokens, asked)
    # Where the last block asks at some positions alone: those rows of its input, a mask, and their cosines and sines.
    some = asked * (4 * work.seq + 2 * compute * config.head_dim) if asked < tokens else 0
    if work.gradient_checkpointing:
        remembered = 0 if work.on_gpu or compute == 4 else block.attended * (layers - (asked < tokens))
        inputs = 0 if work.activation_offloading else checkpoints(config, work)
        return kept + inputs + remembered + largest_part(config, work)
    # Below the first adapters nothing is trained, so the first norm needs no gradient.
    first_norm = 0 if work.kind == "full" else tokens * (compute * hidden + 4)
    return kept + (layers - 1) * (block.attention + block.mlp) + last.attention + last.mlp + some - first_norm


def checkpoints(config: LlamaConfig, work: Workload) -> int:
    """Bytes of what goes into both halves of every block."""
    rows = (2 * config.num_hidden_layers - 1) * work.batch * work.seq + work.computed
    return rows * work.compute.itemsize * config.hidden_size


def largest_part(config: LlamaConfig, work: Workload) -> int:
    """Bytes of what a backward goes through at once: a block, or, with checkpointing, half of one, of an MLP so many rows."""
    tokens = work.batch * work.seq
    parts = []
    for asked in ([tokens] if config.num_hidden_layers > 1 else []) + [work.computed]:
        block = block_activations(config, work, tokens, asked)
        if not work.gradient_checkpointing:
            parts.append(block.attention + block.mlp)
        else:
            parts += [block.attention, block_activations(config, work, tokens, min(asked, MLP_ROWS)).mlp]
    return max(parts)


def logits_bytes(config: LlamaConfig, work: Workload) -> int:
    """Logits of a chunk of label tokens (`loss.head_loss`) in the compute type and in float32, and their log-softmax; as much
    for their gradients."""
    compute = work.compute.itemsize
    chunk = min(work.asked, max(1, CHUNK_BYTES // (4 * config.vocab_size)))
    return chunk * config.vocab_size * (8 + (compute if compute < 4 else 0))


def scratch_bytes(config: LlamaConfig, work: Workload) -> int:
    """What is made and dropped: see the module's docstring."""
    largest = max(rows * columns for rows, columns in config.linear_shapes().values())
    unpacked = largest * work.compute.itemsize if work.kind == "qlora" else 0
    table = 4 * config.vocab_size * config.hidden_size if work.kind == "full" else 0
    tokens, heads = work.batch * work.seq, 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    through_attention = tokens * (heads + config.hidden_size)
    through_mlp = (min(tokens, MLP_ROWS) if work.gradient_checkpointing else tokens) * 4 * config.intermediate_size
    return unpacked + table + work.compute.itemsize * max(through_attention, through_mlp)
