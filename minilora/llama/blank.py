"""A model without memory: names and shapes on torch's "meta" device, to be filled from files one tensor at a time."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from minilora.llama.config import LlamaConfig
from minilora.llama.model import LlamaForCausalLM


class _NothingDrawn(TorchFunctionMode):
    """Inside, torch's first weights are not drawn: `torch.nn.init` leaves tensors as they are.

    Why: torch's linears and embeddings draw their first weights when they are made.  Here there is no memory to draw them into,
    and being asked for it torch imports its compiler: more than a second, and a tenth of a gigabyte (torch 2.13).
    """

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def blank_model(config: LlamaConfig) -> LlamaForCausalLM:
    """The modules of a model, with parameters on the meta device.

    Guarantee: takes no memory for weights, and does not wake torch's compiler (tests/llama/test_blank.py).
    """
    with torch.device("meta"), _NothingDrawn():
        return LlamaForCausalLM(config)
