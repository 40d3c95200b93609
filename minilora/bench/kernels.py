"""A 7B model's largest layer: out of 4 bits, and over rows of x; against the hardware and against bitsandbytes."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from minilora.bench.rows import Row, Settings, Target, in_turns
from minilora.bench.sides import Task, ratio, take_turns
from minilora.layers.dense import linear
from minilora.layers.nf4_linear import NF4Linear
from minilora.quant.nf4 import quantize_nf4

LAYER = (11008, 4096)                           # of an MLP of a 7B model
CACHED, COLD = 1, 8                             # layers taken in turn: one stays in the caches, eight don't fit
# Rows of bfloat16 where gradients are wanted: the least ratio to Linear4bit, and to the dense product.
TRAINING = {1: (15.0, 1.0), 16: (5.0, None), 64: (None, None), 512: (1.15, 1 / 1.08)}
# Rows, layers, and the least ratio to Linear4bit's inference kernel, which works on a repacked copy.
INFERENCE = {(1, CACHED): 1 / 1.4, (16, CACHED): 1 / 1.4, (64, CACHED): 1.0, (512, CACHED): None, (1, COLD): 1.0,
             (16, COLD): None}


def unpacking(settings: Settings) -> Iterator[Row]:
    """Into a buffer that was used before, as fast as the buffer can be filled."""
    weight = quantize_nf4(torch.randn(LAYER, generator=torch.Generator().manual_seed(0)))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out, fill = torch.zeros(LAYER, dtype=dtype), torch.zeros(LAYER, dtype=dtype)
        ours, limit = in_turns(partial(weight.dequantize, out=out), partial(fill.fill_, 1.0), settings.rounds(15, 7))
        row = Row(f"dequant_{name}", "s", ours, limit=limit, limit_is="fill",
                  targets=(Target("of filling", limit / ours, 0.85),))
        yield against_peer(row, Task("unpack", shape=LAYER, dtype=str(dtype).removeprefix("torch."), calls=9), settings, 6.0)


def products(settings: Settings) -> Iterator[Row]:
    """x Ŵᵀ where x needs a gradient; beside it that with Ŵ in bfloat16, as fast as this CPU makes it (`layers.dense`)."""
    layer = NF4Linear(quantize_nf4(torch.randn(LAYER, generator=torch.Generator().manual_seed(0))))
    dense = layer.dense_weight(torch.bfloat16)
    for rows, (least, least_of_dense) in TRAINING.items():
        x = torch.randn(rows, LAYER[1], generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).requires_grad_()
        ours, limit = in_turns(partial(layer, x), partial(linear, x, dense), settings.rounds(15, 7))
        row = Row(f"linear_rows_{rows}", "s", ours, limit=limit, limit_is="dense",
                  targets=() if least_of_dense is None else (Target("of the dense product", limit / ours, least_of_dense),))
        yield against_peer(row, Task("product", rows=rows, shape=LAYER, calls=3), settings, least)


def products_fp32(settings: Settings) -> Iterator[Row]:
    """512 rows beside Linear4bit in float32: in float32 too, where torch's product alone takes the time, and in bfloat16."""
    layer = NF4Linear(quantize_nf4(torch.randn(LAYER, generator=torch.Generator().manual_seed(0))))
    x = torch.randn(512, LAYER[1], generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours, limit = in_turns(partial(layer, x), partial(linear, x, layer.dense_weight(torch.float32)), settings.rounds(5))
    row = Row("linear_rows_512_fp32", "s", ours, limit=limit, limit_is="dense",
              targets=(Target("of the dense product", limit / ours, 1 / 1.08),))
    task = Task("product", rows=512, shape=LAYER, dtype="float32")
    yield against_peer(row, task, settings, 2.4)
    if settings.peers:
        yield against_peer(Row("linear_rows_512_bf16_to_fp32", "s", 0.0), replace(task, dtype="bfloat16"), settings, 2.4, task)


def inference(settings: Settings) -> Iterator[Row]:
    """x Ŵᵀ without gradients, from the weight as it is stored."""
    for (rows, layers), least in INFERENCE.items():
        task = Task("product", rows=rows, shape=LAYER, grad=False, layers=layers, calls=3)
        row = Row(f"linear_rows_{rows}_nograd" + ("_cold" if layers > 1 else ""), "s", 0.0)
        yield against_peer(row, task, settings, least)


def against_peer(row: Row, task: Task, settings: Settings, least: float | None, peer_task: Task | None = None) -> Row:
    """The row with both sides measured in processes of their own; without peers a row that has a figure stays as it is.

    Args: peer_task: the peer's, where it is another one.
    """
    if not settings.peers and row.ours:
        return row
    ours, peer = take_turns(task, settings.rounds(7), settings.peers, peer_task)
    if peer is None:
        return replace(row, ours=ours.median / task.layers)
    times, spread = ratio(ours, peer)
    targets = row.targets if least is None else (Target("times bitsandbytes", times, least), *row.targets)
    return replace(row, ours=ours.median / task.layers, peer=peer.median / task.layers, ratio=times, spread=spread,
                   against="bitsandbytes", targets=targets)
