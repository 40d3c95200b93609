"""Whether a module is what its class says: code that goes by a module's parts, and doesn't call it, has to know."""
from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_hooked(module: nn.Module) -> bool:
    """Whether a call does more, or something else, than the class's `forward`: a hook, or a `forward` put on the instance."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
                or "forward" in vars(module) or _has_any_global_hook())
