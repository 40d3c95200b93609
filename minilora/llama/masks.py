"""Who may attend to whom, as one bool mask a window, shared by all layers that have it."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.llama.trees import Trees


def attention_masks(windows: tuple[int | None, ...], attention_mask: Tensor | Trees | None, batch: int, length: int, past: int,
                    device: torch.device) -> Sequence[Tensor | Trees | None]:
    """A mask for each layer: bool (B or 1, 1, T, S), True = may attend; None stands for plain causal attention.

    Args:
        windows: of each layer, in tokens; None sees everything before it.
        attention_mask: as in `LlamaForCausalLM.hidden`. past: cached tokens.
    """
    if isinstance(attention_mask, Trees) or (attention_mask is not None and attention_mask.dim() == 4):
        return [attention_mask] * len(windows)
    if attention_mask is not None and attention_mask.device.type == "cpu" and bool(attention_mask.all()):
        attention_mask = None       # nothing is padded (on a GPU the question itself would cost a synchronization)
    rows = torch.arange(past, past + length, device=device)[:, None]                      # (T, 1)
    columns = torch.arange(past + length, device=device)                                   # (S,)
    made: dict[int | None, Tensor | None] = {}
    for window in set(windows):
        hides = window is not None and past + length > window
        if attention_mask is None and not hides and (past == 0 or length == 1):
            made[window] = None
            continue
        visible = columns <= rows                                                          # (T, S)
        if hides and window is not None:
            visible = visible & (columns > rows - window)
        visible = visible[None, None]
        if attention_mask is not None:
            # A padding row sees itself, or its softmax over nothing would be NaN.
            visible = visible & attention_mask[:, None, None, :].bool() | (columns == rows)
        made[window] = visible
    return [made[window] for window in windows]
