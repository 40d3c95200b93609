"""Exercise 11: one step of AdamW, and its second moment in 8 bits."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minilora.course.grading import Mistake, Task
from minilora.optim.adamw import BLOCKSIZE_8BIT, adamw_update
from minilora.quant.blockwise import quantize_blockwise
from minilora.quant.codebooks import DYNAMIC_8BIT, DYNAMIC_8BIT_UNSIGNED

Three = tuple[Tensor, Tensor, Tensor]
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
Formula = Callable[[Tensor, Tensor, Tensor, int, float, float], Tensor]     # param, m, v, step, lr, decay -> the new param


def _package(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float, weight_decay: float) -> Three:
    param, m, v = param.clone(), m.clone(), v.clone()
    adamw_update(param, grad, m, v, step, lr, (BETA1, BETA2), EPS, weight_decay)
    return param, m, v


def _with(formula: Formula, betas: tuple[float, float] = (BETA1, BETA2), decay_in_gradient: bool = False
          ) -> Callable[..., Three]:
    def step_once(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float, weight_decay: float) -> Three:
        if decay_in_gradient:
            grad, weight_decay = grad + weight_decay * param, 0.0
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad.square()
        return formula(param, m, v, step, lr, weight_decay), m, v
    return step_once


def _right(param: Tensor, m: Tensor, v: Tensor, step: int, lr: float, decay: float) -> Tensor:
    m_hat, v_hat = m / (1 - BETA1 ** step), v / (1 - BETA2 ** step)
    return param * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + EPS)


def _uncorrected(param: Tensor, m: Tensor, v: Tensor, step: int, lr: float, decay: float) -> Tensor:
    return param * (1 - lr * decay) - lr * m / (v.sqrt() + EPS)


def _no_eps(param: Tensor, m: Tensor, v: Tensor, step: int, lr: float, decay: float) -> Tensor:
    return param * (1 - lr * decay) - lr * m / (1 - BETA1 ** step) / (v / (1 - BETA2 ** step)).sqrt()


def _eps_inside(param: Tensor, m: Tensor, v: Tensor, step: int, lr: float, decay: float) -> Tensor:
    return param * (1 - lr * decay) - lr * m / (1 - BETA1 ** step) / (v / (1 - BETA2 ** step) + EPS).sqrt()


def _eps_before_correction(param: Tensor, m: Tensor, v: Tensor, step: int, lr: float, decay: float) -> Tensor:
    return param * (1 - lr * decay) - lr * m / (1 - BETA1 ** step) * math.sqrt(1 - BETA2 ** step) / (v.sqrt() + EPS)


def _no_root(param: Tensor, m: Tensor, v: Tensor, step: int, lr: float, decay: float) -> Tensor:
    return param * (1 - lr * decay) - lr * m / (1 - BETA1 ** step) / (v / (1 - BETA2 ** step) + EPS)


def _plus(param: Tensor, m: Tensor, v: Tensor, step: int, lr: float, decay: float) -> Tensor:
    return param * (1 - lr * decay) + lr * m / (1 - BETA1 ** step) / ((v / (1 - BETA2 ** step)).sqrt() + EPS)


def _one_late(param: Tensor, m: Tensor, v: Tensor, step: int, lr: float, decay: float) -> Tensor:
    return _right(param, m, v, step + 1, lr, decay)


def _decay_without_rate(param: Tensor, m: Tensor, v: Tensor, step: int, lr: float, decay: float) -> Tensor:
    return _right(param, m, v, step, lr, 0.0) - decay * param


def _draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, int, float, float]:
    param, grad, m = torch.randn(3, 9, generator=generator)
    v = torch.rand(9, generator=generator)
    return param, grad, m, v, int(torch.randint(1, 30, (), generator=generator)), 0.05, 0.1


def _encode(v: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_blockwise(v, DYNAMIC_8BIT_UNSIGNED, BLOCKSIZE_8BIT)


def _moment(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(600, generator=generator).mul(3).exp() * 1e-6,)


ZERO = torch.zeros(2)
TASKS = (
    Task("adamw_step", _package, random=_draw, tolerance=1e-4,
         fixed=((torch.tensor([1.0, -2.0]), torch.tensor([1e-3, 5.0]), ZERO, ZERO, 1, 0.1, 0.0),
                (torch.tensor([1.0, -2.0]), torch.tensor([1e-8, 1e-7]), ZERO, ZERO, 1, 0.1, 0.0),
                (torch.tensor([1.0, -2.0]), torch.tensor([0.0, 5.0]), ZERO, ZERO, 1, 0.1, 0.1)), mistakes=(
        Mistake("the moments start at zero, so the first ones are too small: divide m by 1 - beta1^t, v by 1 - beta2^t",
                _with(_uncorrected)),
        Mistake("divide by the square root of v, not by v", _with(_no_root)),
        Mistake("eps is missing: of an entry that never had a gradient m and v are zero, and 0 / 0 is NaN", _with(_no_eps)),
        Mistake("eps is added to the root of v, not to v under it", _with(_eps_inside)),
        Mistake("eps is added after the correction of v, not before: else it is larger in the first steps",
                _with(_eps_before_correction)),
        Mistake("you went uphill: the step is subtracted", _with(_plus)),
        Mistake("the first step is t = 1: you corrected as if it were one step later", _with(_one_late)),
        Mistake("you added the decay to the gradient: that is Adam with L2. AdamW shrinks the weight by itself, 1 - lr * decay",
                _with(_right, decay_in_gradient=True)),
        Mistake("the decay is multiplied by the learning rate too: param * (1 - lr * decay)", _with(_decay_without_rate)),
        Mistake("you swapped the betas: 0.9 is for m, 0.999 for v", _with(_right, (BETA2, BETA1))))),
    Task("encode_second_moment", _encode, fixed=((torch.tensor([1.0, 1e-3, 1e-6, 0.0]),),), random=_moment, mistakes=(
        Mistake("that is the signed map: v is never negative, and half of the levels would never be used",
                lambda v: quantize_blockwise(v, DYNAMIC_8BIT, BLOCKSIZE_8BIT)),
        Mistake("those are evenly spaced levels: small v become zero, and a step divides by their root",
                lambda v: quantize_blockwise(v, torch.arange(256) / 255, BLOCKSIZE_8BIT)),
        Mistake("one constant for all of it: every 256 elements have their own",
                lambda v: quantize_blockwise(v, DYNAMIC_8BIT_UNSIGNED, 1 << 30)),
        Mistake("that is the block size of weights: a moment's is 256",
                lambda v: quantize_blockwise(v, DYNAMIC_8BIT_UNSIGNED, 64)),
        Mistake("you encoded the root of v: encode v itself",
                lambda v: quantize_blockwise(v.sqrt(), DYNAMIC_8BIT_UNSIGNED, math.isqrt(BLOCKSIZE_8BIT ** 2))))),
)
