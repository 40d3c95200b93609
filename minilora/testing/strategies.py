"""Hypothesis strategies for inputs that break implementations."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minilora.testing.specifications import float32, label_mask

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def weights(min_size: int = 1, max_size: int = 600) -> SearchStrategy[list[float]]:
    """Flat float32 weights that break quantizers: normal ones, one outlier, zeros, subnormals, constants, odd sizes."""
    from hypothesis import strategies as st

    def spread(scale: float) -> SearchStrategy[float]:
        return st.floats(-4, 4, width=32).map(lambda value: float32(scale * value))

    max_size = max(min_size, max_size)

    def lists(elements: SearchStrategy[float]) -> SearchStrategy[list[float]]:
        return st.lists(elements, min_size=min_size, max_size=max_size)

    def with_outlier(values: list[float], at: int, outlier: float) -> list[float]:
        at %= max(1, len(values))
        return [*values[:at], outlier, *values[at + 1 :]] if values else values

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
    prompts, labels = (st.lists(tokens, min_size=1, max_size=size) for size in (max_length, max(1, max_length // 2)))
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


def page_accesses(pages: int, max_size: int = 60) -> SearchStrategy[list[tuple[int, bool]]]:
    """(page, whether it is written to): scans forwards and backwards, one page again and again, and anything else."""
    from hypothesis import strategies as st

    page, written = st.integers(0, pages - 1), st.booleans()
    scan = st.builds(lambda down: [(at, True) for at in (range(pages)[::-1] if down else range(pages))], st.booleans())
    again = st.builds(lambda at, count: [(at, True)] * count, page, st.integers(1, 4))
    other = st.lists(st.tuples(page, written), max_size=8)
    parts = st.lists(st.one_of(scan, again, other), max_size=8)
    return parts.map(lambda lists: [access for part in lists for access in part][:max_size])
