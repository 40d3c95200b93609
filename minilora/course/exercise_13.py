"""Exercise 13: run a block, keep only its input, and run it again when the gradient is asked for."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from minilora.course.grading import Mistake, Task
from minilora.llama.recompute import recompute

Block = Callable[[Tensor], Tensor]


def _run(answer: Callable[[Block, Tensor], Tensor], seed: int, input_needs_gradient: bool, dropout: float) -> dict[str, Any]:
    """Forward and backward of a small block through the reader's function: results, calls, and what was kept in between."""
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Dropout(dropout), nn.Linear(64, 6))
    x = torch.randn(8, 6, requires_grad=input_needs_gradient)
    calls, kept = [], {}
    block.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    own = {x.data_ptr(), *(parameter.data_ptr() for parameter in block.parameters())}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own and tensor.numel() > x.numel():
            kept[tensor.data_ptr()] = True
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = answer(block, x)
    torch.rand(5)           # as layers above do; without it a generator that was put back would end where the forward left it
    state = torch.get_rng_state()
    if y.requires_grad:
        y.square().sum().backward()
    moved = not torch.equal(torch.get_rng_state(), state)
    first = block[0].weight.grad
    return {"y": y.detach(), "inner activations kept": len(kept) > 0, "gradient of the block's first weight": first,
            "gradient of x": x.grad if input_needs_gradient else 0, "calls of the block": len(calls),
            "the backward moves the random generator": moved}


def _new_dropout(block: Block, x: Tensor) -> Tensor:
    y: Tensor = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
    return y


def _reentrant(block: Block, x: Tensor) -> Tensor:
    y: Tensor = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
    return y


def _left_rewound(block: Block, x: Tensor) -> Tensor:
    state = torch.get_rng_state()
    y = recompute(block, x)
    if y.requires_grad:
        y.register_hook(lambda grad: torch.set_rng_state(state))            # before the second call, which puts it back to this
    return y


def _without_graph(block: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        return block(x)


def _twice_now(block: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        block(x)
    return recompute(block, x)


TASKS = (
    Task("checkpoint", recompute, probe=_run,
         fixed=((0, True, 0.0), (1, True, 0.5), (2, False, 0.0), (3, False, 0.5)), mistakes=(
        Mistake("that is the block as it is: autograd keeps its inner activations. Keep x alone, and call the block again in "
                "backward", lambda block, x: block(x)),
        Mistake("nothing gets a gradient: without a graph the block has to be called again in backward", _without_graph),
        Mistake("the second call drops other entries than the first: put the random state back before it "
                "(torch.get_rng_state)", _new_dropout),
        Mistake("the random generator stays where you put it for the second call: what follows draws the same numbers once "
                "more. Keep the state that it has in backward, and put that back after the call", _left_rewound),
        Mistake("where x needs no gradient the block's weights get none, silently: the embeddings below LoRA are frozen, so "
                "that is the usual case", _reentrant),
        Mistake("the block is called once too often: once in the forward, once in the backward", _twice_now))),
)
