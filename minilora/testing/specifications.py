"""The reference math: loops over Python floats that spell definitions out."""
from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import Any

Matrix = Sequence[Sequence[float]]
IGNORED = -100      # the label of a position without loss


def float32(x: float) -> float:
    """The float32 nearest to `x`, ties to even; beyond the largest one, an infinity."""
    try:
        return float(struct.unpack("f", struct.pack("f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


def _list(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def nf4_code() -> list[float]:
    """The sixteen levels of NF4 in the float32 values that bitsandbytes prints, and all files in its format hold.

    Ten of them are not the nearest to `derived_nf4_code`: bits are compared by these.
    """
    return [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
            -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def derived_nf4_code() -> list[float]:
    """The same from their definition: normal quantiles, 8 above zero, 7 below, and zero, over the largest.

    Source: QLoRA (arXiv 2305.14314) appendix E.
    """
    offset, normal = 0.9677083, NormalDist()        # the paper's digits of (1 - 1/32 + 1 - 1/30) / 2

    def quantiles(count: int) -> list[float]:
        step = (offset - 0.5) / count
        return [normal.inv_cdf(offset - index * step) for index in range(count)]

    levels = sorted([*quantiles(8), 0.0, *(-level for level in quantiles(7))])
    return [level / max(levels) for level in levels]


def check_nf4_code(code: Any, tolerance: float = 1.2e-7) -> None:
    """Hold a table of levels against the derivation.

    Raises: AssertionError: says which level is off, or how many there are.
    """
    found, expected = _list(code), derived_nf4_code()
    assert len(found) == 16, f"NF4 has 16 levels, found {len(found)}"
    for index, (level, right) in enumerate(zip(found, expected, strict=True)):
        assert abs(level - right) <= tolerance, f"level {index} is {level!r}, NF4 has {right!r}"


def dynamic_code(signed: bool = True, precision: Callable[[float], float] = float32) -> list[float]:
    """The 256 levels of the 8-bit dynamic map, sorted.

    For each decade 10^e, e = -6 … 0: the middles of 2^(e + 6) equal parts of [0.1, 1] (twice as many without a sign bit),
    times 10^e; with a sign their mirror images; then 0 and 1.

    Args: precision: rounds every intermediate result; the parts' ends are counted from the nearer end, as torch does.
    Source: arXiv 2110.02861, sections 1.3 (with a sign) and 2.2 (without).
    """
    levels, low, high = [0.0, 1.0], precision(0.1), 1.0
    for exponent in range(-6, 1):
        parts = 2 ** (exponent + 6) * (1 if signed else 2)
        step = precision(precision(high - low) / parts)
        ends = [precision(low + step * end if 2 * end < parts else high - step * (parts - end)) for end in range(parts + 1)]
        for left, right in itertools.pairwise(ends):
            middle = precision(precision(10.0 ** exponent) * precision(precision(left + right) / 2))
            levels += [middle, -middle] if signed else [middle]
    return sorted(levels)


def nearest(value: float, midpoints: Sequence[float]) -> int:
    """Index of the level nearest to `value`: how many midpoints lie below it; one on a midpoint takes the lower level."""
    return sum(value > midpoint for midpoint in midpoints)


def quantize(values: Any, code: Sequence[float], blocksize: int = 64,
             precision: Callable[[float], float] = float32) -> tuple[list[int], list[float]]:
    """Codes and block constants of a flat sequence.

    A block is `blocksize` consecutive values, the last may be short; each x · (1 / absmax) takes the nearest level.

    Args: values: finite numbers. code: sorted levels. precision: rounds every intermediate result.
    Returns: one index a value, one absmax = max |x| a block.
    Source: QLoRA section 2.
    """
    values, codes, constants = [precision(value) for value in _list(values)], [], []
    levels = [precision(level) for level in code]
    midpoints = [precision(precision(low + high) / 2) for low, high in itertools.pairwise(levels)]
    for start in range(0, len(values), blocksize):
        block = values[start : start + blocksize]
        absmax = max(abs(value) for value in block)
        # float32 cannot invert anything smaller: bitsandbytes and this package scale by 1e38 there.
        inverse = precision(1 / max(absmax, precision(1e-38)))
        codes += [nearest(precision(value * inverse), midpoints) for value in block]
        constants.append(absmax)
    return codes, constants


def dequantize(codes: Any, absmax: Any, code: Sequence[float], blocksize: int = 64,
               precision: Callable[[float], float] = float32) -> list[float]:
    """code[index] · absmax of the value's block."""
    constants = _list(absmax)
    return [precision(precision(code[index]) * precision(constants[position // blocksize]))
            for position, index in enumerate(_list(codes))]


def pack(codes: Any, padding: int = 7) -> list[int]:
    """Two 4-bit codes a byte, the first in the high nibble; an odd count is padded (7: the code of zero)."""
    codes = [*_list(codes)]
    codes += [padding] * (len(codes) % 2)
    return [high * 16 + low for high, low in zip(codes[0::2], codes[1::2], strict=True)]


def unpack(packed: Any, n: int) -> list[int]:
    """The first `n` codes of packed bytes."""
    return [nibble for byte in _list(packed) for nibble in (byte // 16, byte % 16)][:n]


def double_quantize(absmax: Any, blocksize: int = 256, precision: Callable[[float], float] = float32,
                    offset: float | None = None) -> tuple[list[int], list[float], float]:
    """Block constants in 8 bits: subtract their mean, then quantize with the signed dynamic map, 256 to a block.

    Args:
        offset: the mean as an implementation has it.  A float32 mean depends on the order of its additions, so bits can be
            compared only from the same mean; None takes the exact one, rounded once.

    Returns: codes, one constant for each 256 of them, the mean.
    Source: QLoRA section 3.
    """
    constants = [precision(constant) for constant in _list(absmax)]
    mean = precision(math.fsum(constants) / len(constants)) if offset is None else offset
    code = dynamic_code(precision=precision)
    codes, nested = quantize([precision(constant - mean) for constant in constants], code, blocksize, precision)
    return codes, nested, mean


def double_dequantize(codes: Any, nested: Any, offset: float, blocksize: int = 256,
                      precision: Callable[[float], float] = float32) -> list[float]:
    """Block constants again: dynamic[code] · nested + offset."""
    code = dynamic_code(precision=precision)
    return [precision(value + offset) for value in dequantize(codes, nested, code, blocksize, precision)]


def matmul(a: Any, b: Any) -> list[list[float]]:
    """(n, k) times (k, m), each entry summed without rounding error."""
    left, right = _list(a), _list(b)
    return [[math.fsum(x * row[column] for x, row in zip(line, right, strict=True)) for column in range(len(right[0]))]
            for line in left]


def transpose(a: Any) -> list[list[float]]:
    """(n, m) to (m, n)."""
    return [list(column) for column in zip(*_list(a), strict=True)]


def _sum(a: Matrix, b: Matrix, scale: float = 1.0) -> list[list[float]]:
    return [[x + scale * y for x, y in zip(row, other, strict=True)] for row, other in zip(a, b, strict=True)]


def lora_forward(x: Any, weight: Any, lora_a: Any, lora_b: Any, scaling: float) -> list[list[float]]:
    """y = x Wᵀ + scaling · (x Aᵀ) Bᵀ.

    Args: x: (n, in). weight: (out, in). lora_a: (r, in). lora_b: (out, r). scaling: alpha / r, or alpha / √r (rsLoRA).

    Returns: (n, out).
    Source: LoRA (arXiv 2106.09685) section 4.1.
    """
    update = matmul(matmul(x, transpose(lora_a)), transpose(lora_b))
    return _sum(matmul(x, transpose(weight)), update, scaling)


def lora_gradients(x: Any, weight: Any, lora_a: Any, lora_b: Any, scaling: float, grad_y: Any
                   ) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Gradients of a loss by x, A and B, given its gradient by y: (n, out).  The weight is frozen and has none.

    ∂x = ∂y W + s · ∂y B A        ∂A = s · (∂y B)ᵀ x        ∂B = s · ∂yᵀ (x Aᵀ)
    """
    through_b = matmul(grad_y, lora_b)                                                     # (n, r)
    grad_x = _sum(matmul(grad_y, weight), matmul(through_b, lora_a), scaling)
    grad_a = [[scaling * value for value in row] for row in matmul(transpose(through_b), x)]
    grad_b = [[scaling * value for value in row] for row in matmul(transpose(grad_y), matmul(x, transpose(lora_a)))]
    return grad_x, grad_a, grad_b


def adamw(parameter: Any, gradient: Any, first: Any, second: Any, step: int, lr: float,
          betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01
          ) -> tuple[list[float], list[float], list[float]]:
    """Step `step` (the first is 1) of AdamW on flat sequences: new parameter and both moments.

    p ← p · (1 - lr · λ)      m ← β₁ m + (1 - β₁) g      v ← β₂ v + (1 - β₂) g²
    p ← p - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

    Source: arXiv 1711.05101, algorithm 2, in torch's order (decay first).
    """
    moved, firsts, seconds = [], [], []
    for p, g, m, v in zip(_list(parameter), _list(gradient), _list(first), _list(second), strict=True):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        denominator = math.sqrt(v) / math.sqrt(1 - betas[1] ** step) + eps
        moved.append(p * (1 - lr * weight_decay) - lr / (1 - betas[0] ** step) * m / denominator)
        firsts.append(m)
        seconds.append(v)
    return moved, firsts, seconds


def adamw_8bit(parameter: Any, gradient: Any, first: tuple[Any, Any], second: tuple[Any, Any], step: int, lr: float,
               betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01, blocksize: int = 256
               ) -> tuple[list[float], tuple[list[int], list[float]], tuple[list[int], list[float]]]:
    """The same with moments kept in 8 bits: decode, step, encode.

    Args: first, second: (codes, absmax) of the moments, by the signed and by the unsigned dynamic map.

    Returns: new parameter and both encoded moments.
    Source: arXiv 2110.02861 section 2.
    """
    signed, unsigned = dynamic_code(True), dynamic_code(False)
    moved, m, v = adamw(parameter, gradient, dequantize(*first, signed, blocksize), dequantize(*second, unsigned, blocksize),
                        step, lr, betas, eps, weight_decay)
    return moved, quantize(m, signed, blocksize), quantize(v, unsigned, blocksize)


def label_mask(prompt: Any, label: Any, end: int) -> tuple[list[int], list[int]]:
    """One training example: ids of prompt, label and end token, and the labels that carry loss.

    The prompt carries none; the label and the end token do.
    """
    prompt, label = _list(prompt), _list(label)
    return [*prompt, *label, end], [IGNORED] * len(prompt) + [*label, end]


def negative_log_likelihood(logits: Sequence[float], target: int) -> float:
    """-log softmax(logits)[target]."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(logit - top) for logit in logits)) - logits[target]


def masked_loss(logits: Iterable[Any], labels: Iterable[Any]) -> float:
    """Mean of -log p(label) over every label token of a whole optimizer step, however it is cut into batches.

    Args:
        logits: of each example, (T, vocab). labels: of each, T ids, `IGNORED` where no loss is taken.
            Position t predicts the label of t + 1.

    Raises: ValueError: no position carries loss.
    """
    losses = [negative_log_likelihood(_list(row), target)
              for example, targets in zip(logits, labels, strict=True)
              for row, target in zip(_list(example)[:-1], _list(targets)[1:], strict=True) if target != IGNORED]
    if not losses:
        raise ValueError("no position carries loss")
    return math.fsum(losses) / len(losses)


def pager(accesses: Iterable[tuple[int, bool]], frames: int) -> list[tuple[bool, int | None, bool]]:
    """What a pager with room for `frames` pages does at each access, where the least recently used page leaves.

    Args: accesses: (page, whether it is written to).

    Returns: for each, whether the page was missing, which page left for it, and whether that one had to be written back.
    """
    resident: list[int] = []        # the least recently used first
    changed: set[int] = set()
    events: list[tuple[bool, int | None, bool]] = []
    for page, written in accesses:
        missing, leaving = page not in resident, None
        if missing and len(resident) == frames:
            leaving = resident.pop(0)
        if not missing:
            resident.remove(page)
        resident.append(page)
        events.append((missing, leaving, leaving in changed))
        changed.discard(leaving if leaving is not None else -1)
        if written:
            changed.add(page)
    return events
