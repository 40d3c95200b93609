"""Exercise 01: what training takes, and what a 4-bit model takes, in bytes."""
from __future__ import annotations

import torch

from minilora.course.grading import Mistake, Task
from minilora.memory import moment_bytes
from minilora.quant.nf4 import quantize_nf4

BITS = quantize_nf4(torch.ones(64 * 256)).bits_per_param        # 4.127


def _training(parameters: int) -> int:
    return 4 * parameters + 4 * parameters + moment_bytes(parameters, 32)


def _four_bit(in_linears: int, elsewhere: int) -> float:
    return in_linears * BITS / 8 + 2 * elsewhere


TASKS = (
    Task("training_bytes", _training, fixed=((1000,), (6_738_415_616,)), mistakes=(
        Mistake("that is 12 bytes each: weights, gradients and *two* moments make 16", lambda n: 12 * n),
        Mistake("you left the optimizer out: two float32 for each parameter", lambda n: 8 * n),
        Mistake("that is the weights alone: gradients and two moments come on top", lambda n: 4 * n),
        Mistake("those are bits, or you counted twice: 4 times 4 bytes for each parameter", lambda n: 32 * n))),
    Task("four_bit_bytes", _four_bit, fixed=((6_476_005_376, 262_410_240), (1000, 10), (1000, 0)), tolerance=1e-4, mistakes=(
        Mistake("embeddings, head and norms stay in 16 bits: only the linears of the blocks go into 4",
                lambda a, b: (a + b) * BITS / 8),
        Mistake("the block constants are missing: a weight takes 4.127 bits in all", lambda a, b: a / 2 + 2 * b),
        Mistake("what is not quantized is stored in 16 bits, 2 bytes each, not 4", lambda a, b: a * BITS / 8 + 4 * b),
        Mistake("those are bits: eight of them are a byte", lambda a, b: a * BITS + 16 * b))),
)
