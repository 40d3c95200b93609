"""The reference math in its plainest form, and inputs that break implementations.

Every function is a loop over Python floats (float64) that spells a definition out, and nothing else of the package is
imported, so that another project can hold its own NF4, LoRA, AdamW or loss against these:

    from minilora import testing

    codes, absmax = testing.quantize(weights, testing.nf4_code(), blocksize=64)
    assert my_packed_bytes == testing.pack(codes)

Tensors are nested lists here (anything with ``tolist()`` is taken as well).  `quantize` and its kin round every intermediate
result as float32 hardware does, since bits are the contract there; ``precision=float`` gives the same without that rounding.

The strategies need hypothesis (extra ``[test]``), and only they do.

Example: the table of NF4 levels posted in issue 299 of the qlora repository is symmetric and has fifteen entries, so that a
sixteenth of the codes is never used and every positive level but the largest is off:

    posted = [-1.0, -0.6962, -0.525, -0.394, -0.284, -0.18, -0.076, 0.0, 0.076, 0.18, 0.284, 0.394, 0.525, 0.6962, 1.0]
    testing.check_nf4_code(posted)      # AssertionError: NF4 has 16 levels, found 15
"""
from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

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
    """The sixteen levels of NF4: normal quantiles, 8 above zero, 7 below, and zero, over the largest.

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
    found, expected = _list(code), nf4_code()
    assert len(found) == 16, f"NF4 has 16 levels, found {len(found)}"
    for index, (level, right) in enumerate(zip(found, expected, strict=True)):
        assert abs(level - right) <= tolerance, f"level {index} is {level!r}, NF4 has {right!r}"


def dynamic_code(signed: bool = True) -> list[float]:
    """The 256 levels of the 8-bit dynamic map, sorted.

    For each decade 10^e, e = -6 … 0: the middles of 2^(e + 6) equal parts of [0.1, 1] (twice as many without a sign bit),
    times 10^e; with a sign their mirror images; then 0 and 1.

    Source: arXiv 2110.02861 section 1.3.
    """
    levels = [0.0, 1.0]
    for exponent in range(-6, 1):
        parts = 2 ** (exponent + 6) * (1 if signed else 2)
        for part in range(parts):
            middle = 10.0 ** exponent * (0.1 + 0.9 * (part + 0.5) / parts)
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
    codes, nested = quantize([precision(constant - mean) for constant in constants], dynamic_code(), blocksize, precision)
    return codes, nested, mean


def double_dequantize(codes: Any, nested: Any, offset: float, blocksize: int = 256,
                      precision: Callable[[float], float] = float32) -> list[float]:
    """Block constants again: dynamic[code] · nested + offset."""
    return [precision(value + offset) for value in dequantize(codes, nested, dynamic_code(), blocksize, precision)]


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


def weights(min_size: int = 1, max_size: int = 600) -> SearchStrategy[list[float]]:
    """Flat float32 weights that break quantizers: normal ones, one outlier, zeros, subnormals, constants, odd sizes."""
    from hypothesis import strategies as st

    def spread(scale: float) -> SearchStrategy[float]:
        return st.floats(-4, 4, width=32).map(lambda value: float32(scale * value))

    def lists(elements: SearchStrategy[float]) -> SearchStrategy[list[float]]:
        return st.lists(elements, min_size=min_size, max_size=max_size)

    def with_outlier(values: list[float], at: int, outlier: float) -> list[float]:
        return [*values[: at % len(values)], outlier, *values[at % len(values) + 1 :]]

    ordinary = st.sampled_from((0.02, 1.0, 1e-6, 1e6)).flatmap(lambda scale: lists(spread(scale)))
    huge = st.sampled_from((2.0 ** 127, -1e4, 2.0 ** 100))
    outlier = st.builds(with_outlier, lists(spread(0.02)), st.integers(0, max_size), huge)
    subnormal = lists(st.floats(-(2.0 ** -126), 2.0 ** -126, width=32, allow_subnormal=True))
    constant = st.builds(lambda value, size: [value] * size, st.floats(-1, 1, width=32), st.integers(min_size, max_size))
    sparse = lists(st.one_of(st.just(0.0), st.just(-0.0), spread(1.0)))
    anything = lists(st.floats(width=32, allow_nan=False, allow_infinity=False))
    return st.one_of(ordinary, outlier, subnormal, constant, sparse, anything)


def matrices(rows: int, columns: int) -> SearchStrategy[list[list[float]]]:
    """(rows, columns) of moderate float32 numbers, zeros among them."""
    from hypothesis import strategies as st

    return st.lists(st.lists(st.floats(-2, 2, width=32), min_size=columns, max_size=columns), min_size=rows, max_size=rows)


def batches(vocabulary: int, max_examples: int = 6, max_length: int = 12) -> SearchStrategy[list[tuple[list[int], list[int]]]]:
    """Training examples as `label_mask` makes them, of unequal length: (input_ids, labels) pairs.

    Token 0 is the end token, and stands in prompts as well, as a clumsy template may put it there.
    """
    from hypothesis import strategies as st

    tokens = st.integers(0, vocabulary - 1)
    prompts, labels = (st.lists(tokens, min_size=1, max_size=size) for size in (max_length, max_length // 2))
    example = st.builds(lambda prompt, label: label_mask(prompt, label, 0), prompts, labels)
    return st.lists(example, min_size=1, max_size=max_examples)


def checkpoint_shapes() -> SearchStrategy[dict[str, Any]]:
    """config.json of small Llamas: grouped or plain attention, odd vocabularies, tied or untied heads, either head size."""
    from hypothesis import strategies as st

    def build(heads: int, shared: int, head_dim: int, layers: int, vocabulary: int, inner: int, tied: bool, bias: bool
              ) -> dict[str, Any]:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": vocabulary,
                "hidden_size": heads * shared * head_dim, "intermediate_size": inner, "num_hidden_layers": layers,
                "num_attention_heads": heads * shared, "num_key_value_heads": heads, "head_dim": head_dim,
                "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": tied,
                "attention_bias": bias, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32"}

    return st.builds(build, st.sampled_from((1, 2)), st.sampled_from((1, 2, 3)), st.sampled_from((4, 8)), st.integers(1, 2),
                     st.integers(5, 131), st.integers(3, 40), st.booleans(), st.booleans())
