"""AdamW, written out.

For each parameter θ with gradient g, at its t-th step:

    θ ← θ − lr · λ · θ                                      decoupled weight decay, before the step
    m ← β₁ m + (1 − β₁) g                                   first moment
    v ← β₂ v + (1 − β₂) g²                                  second moment
    θ ← θ − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)      both moments corrected for their start at zero

Sources: Adam (arXiv 1412.6980, algorithm 1), decoupled decay (arXiv 1711.05101, algorithm 2).  The order of the roundings
is that of ``torch.optim.AdamW(foreach=False, fused=False)``: float32 results are equal to the bit.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from minilora.errors import ConfigError


def adamw_update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, lr: float,
                 betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """One AdamW step, in place.

    Args:
        param, grad, exp_avg, exp_avg_sq: same shape, float32.
        step: 1 for the first update of this parameter.

    Guarantee: bits of torch's single-tensor AdamW (tests/optim/test_adamw.py).
    """
    beta1, beta2 = betas
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = lr / (1 - beta1 ** step)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2 ** step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-step_size)


class AdamW(torch.optim.Optimizer):
    """AdamW over any number of parameter groups; its ``state_dict`` has torch's format.

    Args:
        params: parameters or groups. lr: learning rate. betas: decay of the moments. eps: added to the root.
        weight_decay: λ, decoupled.

    Raises: ConfigError: a hyper-parameter out of range.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        if not lr >= 0 or not eps >= 0 or not weight_decay >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"AdamW needs lr, eps, weight_decay >= 0 and betas in [0, 1), not lr={lr}, eps={eps}, "
                              f"weight_decay={weight_decay}, betas={betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; the others keep their step count."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                state["step"] += 1
                adamw_update(param, param.grad, state["exp_avg"], state["exp_avg_sq"], int(state["step"]),
                             group["lr"], group["betas"], group["eps"], group["weight_decay"])
        return loss
