"""AdamW, written out.

For each parameter θ with gradient g, at its t-th step:

    θ ← θ − lr · λ · θ                                      decoupled weight decay, before the step
    m ← β₁ m + (1 − β₁) g                                   first moment
    v ← β₂ v + (1 − β₂) g²                                  second moment
    θ ← θ − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)      both moments corrected for their start at zero

Sources: Adam (arXiv 1412.6980, algorithm 1), decoupled decay (arXiv 1711.05101, algorithm 2).  The order of the roundings
is that of ``torch.optim.AdamW(foreach=False, fused=False)``: float32 results are equal to the bit.

The moments take 8 bytes a parameter.  In 8 bits (arXiv 2110.02861) they take 2, and a constant for every 256 of them (as in
bitsandbytes; the paper has one for 2,048): by the dynamic map, signed for m and unsigned for v, whose levels are dense near
zero, where moments are most of the time.

Lesson 11 explains it.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from minilora.errors import CheckpointError, ConfigError
from minilora.quant.blockwise import dequantize_blockwise, quantize_blockwise
from minilora.quant.codebooks import DYNAMIC_8BIT, DYNAMIC_8BIT_UNSIGNED

BLOCKSIZE_8BIT = 256        # elements that share a constant
TOGETHER, TOGETHER_ON = 1 << 21, ("cuda",)      # elements of small tensors that are updated as one, and where


def adamw_update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, lr: float,
                 betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """One AdamW step, in place.

    Args:
        param, grad, exp_avg, exp_avg_sq: same shape, float32.
        step: 1 for the first update of this parameter.

    Guarantee: bits of torch's single-tensor AdamW (tests/optim/test_adamw.py).
    """
    beta1, beta2 = betas
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = lr / (1 - beta1 ** step)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2 ** step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-step_size)


class Update(NamedTuple):
    """What `adamw_update` is called with."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def adamw_updates(updates: Iterable[Update]) -> None:
    """`adamw_update` of each; on a GPU small tensors, of one type and with the same numbers, as if they were one.

    Why: there each operation costs some 6 microseconds of launching, and a model of 32 blocks has 448 adapter matrices: to copy
    them into one tensor and back takes a tenth of that.

    Guarantee: bits of `adamw_update` (tests/optim/test_adamw.py).
    """
    found: dict[object, list[Update]] = {}
    for update in updates:
        if update.param.device.type not in TOGETHER_ON or update.param.numel() >= TOGETHER:
            adamw_update(*update)
            continue
        kind = update.param.device, update.param.dtype, update[4:]
        alike = found.setdefault(kind, [])
        alike.append(update)
        if sum(one.param.numel() for one in alike) >= TOGETHER:
            _update_as_one(found.pop(kind))
    for alike in found.values():
        _update_as_one(alike)


def _update_as_one(updates: list[Update]) -> None:
    if len(updates) == 1:
        return adamw_update(*updates[0])
    params, grads = [update.param for update in updates], [update.grad for update in updates]
    exp_avgs, exp_avg_sqs = [update.exp_avg for update in updates], [update.exp_avg_sq for update in updates]
    param, grad, exp_avg, exp_avg_sq = (torch.cat([tensor.reshape(-1) for tensor in tensors])
                                        for tensors in (params, grads, exp_avgs, exp_avg_sqs))
    adamw_update(param, grad, exp_avg, exp_avg_sq, *updates[0][4:])
    for tensors, whole in ((params, param), (exp_avgs, exp_avg), (exp_avg_sqs, exp_avg_sq)):
        parts = whole.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def refuse_sparse(param: Tensor) -> None:
    """Raises: ConfigError: its gradient is sparse."""
    if param.grad is not None and param.grad.layout != torch.strided:
        raise ConfigError(f"AdamW takes dense gradients, not {param.grad.layout}, as torch's does; torch.optim.SparseAdam "
                          "takes those, and nn.Embedding(sparse=False) makes none")


def _variants(group: dict[str, Any]) -> list[str]:
    """What a group asks for that would be another update."""
    return [name for name in ("maximize", "amsgrad") if group.get(name)]


class Moments8bit(NamedTuple):
    """Both moments of n elements in 8 bits: codes (n,) uint8, and absmax (ceil(n / 256),) float32, of each."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor
    exp_avg_sq_absmax: Tensor

    def decode(self) -> tuple[Tensor, Tensor]:
        """First and second moment, (n,) float32."""
        return (dequantize_blockwise(self.exp_avg, self.exp_avg_absmax, DYNAMIC_8BIT, BLOCKSIZE_8BIT),
                dequantize_blockwise(self.exp_avg_sq, self.exp_avg_sq_absmax, DYNAMIC_8BIT_UNSIGNED, BLOCKSIZE_8BIT))

    def encode(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Put other moments in their place."""
        for moment, code, codes, absmax in ((exp_avg, DYNAMIC_8BIT, self.exp_avg, self.exp_avg_absmax),
                                            (exp_avg_sq, DYNAMIC_8BIT_UNSIGNED, self.exp_avg_sq, self.exp_avg_sq_absmax)):
            new_codes, new_absmax = quantize_blockwise(moment, code, BLOCKSIZE_8BIT)
            codes.copy_(new_codes)
            absmax.copy_(new_absmax)


def adamw_update_8bit(param: Tensor, grad: Tensor, moments: Moments8bit, step: int, lr: float, betas: tuple[float, float],
                      eps: float, weight_decay: float) -> None:
    """One AdamW step over moments that are kept in 8 bits, in place: decode, update, encode.

    The parameter moves by the moments as they are before they are rounded.

    Args: param, grad: (n,) float32. moments: zeros before the first step.
    Raises: QuantizationError: a moment is not finite.
    Source: arXiv 2110.02861, section 2; bitsandbytes' states within one code (tests/peers/test_bitsandbytes_adamw.py).
    """
    exp_avg, exp_avg_sq = moments.decode()
    adamw_update(param, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay)
    moments.encode(exp_avg, exp_avg_sq)


class AdamW(torch.optim.Optimizer):
    """AdamW over any number of parameter groups; its ``state_dict`` has torch's format.

    Args:
        params: parameters or groups, of real numbers. lr: learning rate. betas: decay of the moments. eps: added to the root.
        weight_decay: λ, decoupled.  Defaults are torch's.

    Raises: ConfigError: a hyper-parameter out of range, or parameters or gradients of another kind.
    """

    TYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.01) -> None:
        try:
            beta1, beta2 = betas
            fine = lr >= 0 and eps >= 0 and weight_decay >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1
        except (TypeError, ValueError):
            fine = False
        if not fine:
            raise ConfigError(f"AdamW needs lr, eps, weight_decay >= 0 and two betas in [0, 1), not lr={lr!r}, eps={eps!r}, "
                              f"weight_decay={weight_decay!r}, betas={betas!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    # Trap: torch shields these from its compiler, and imports it for that: a second, and 130 MB that stay.
    _add, zero_grad, state_dict, _load_all = (
        inspect.unwrap(getattr(torch.optim.Optimizer, name))
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises: ConfigError: a parameter of a type that it does not update, or another variant."""
        self._add(param_group)
        if variants := _variants(self.param_groups[-1]):
            self.param_groups.pop()
            raise ConfigError(f"a group of parameters asks for {variants[0]}=True, which {type(self).__name__} does not have; "
                              "torch.optim.AdamW has it")
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in self.TYPES:
                self.param_groups.pop()
                raise ConfigError(f"{type(self).__name__} updates parameters of {', '.join(map(str, self.TYPES))}, not of "
                                  f"{param.dtype}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Raises: ValueError: groups of other sizes (from torch). CheckpointError: the state is of a variant."""
        for group in state_dict["param_groups"]:
            if variants := _variants(group):
                raise CheckpointError(f"the optimizer's state was made with {variants[0]}=True, which {type(self).__name__} "
                                      "does not have")
        self._load_all(state_dict)

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
        self.update()
        return loss

    def update(self) -> None:
        """What `step` does once the gradients are there."""
        adamw_updates(self._updates())

    def _updates(self) -> Iterator[Update]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                refuse_sparse(param)
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                state["step"] += 1
                yield Update(param, param.grad, state["exp_avg"], state["exp_avg_sq"], int(state["step"]),
                             group["lr"], group["betas"], group["eps"], group["weight_decay"])
