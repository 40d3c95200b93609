"""config.json of the Llama family: every figure is read, none assumed.

The file is untrusted: types, ranges and relations are checked here, before anything is allocated for them.  Names are
Hugging Face's.  Three families are one architecture with small differences:

    llama    Llama 1, 2, 3.x, Meditron      optional biases, optional "llama3" or "linear" rotary scaling
    mistral  Mistral                        a sliding attention window on every layer, or none
    qwen2    Qwen2, Qwen2.5                 biases on q, k, v; a sliding window on some layers, or none
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError
from minilora.llama.strict_json import read_object

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
LARGEST = 1 << 24       # of any dimension: far above every published model, far below what would overflow
MOST_LAYERS = 1 << 10   # each is built as a module before any weight is looked at


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched; `rope_type` is "default", "linear" or "llama3" (see `rotary`)."""

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model.

    Attributes: Hugging Face's, but for `rope_scaling` (one form for the several in use) and `sliding_windows`: the window
        of each layer in tokens, None where a layer attends to everything before it.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    attention_bias: bool = False        # on q, k, v and o
    qkv_bias: bool = False              # on q, k, v only (Qwen2)
    mlp_bias: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_json(cls, path: str | Path) -> LlamaConfig:
        """Read a config.json, or the one in a folder.

        End tokens that only the generation_config.json beside it names join those of config.json, in `raw`: so they are also
        written where the model is.

        Raises: CheckpointError: no such file, not JSON (either of them), or anything `from_dict` refuses.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        raw, beside = read_object(path), path.parent / "generation_config.json"
        ends = end_ids(raw)
        more = [token for token in end_ids(read_object(beside)) if token not in ends] if beside.is_file() else []
        return cls.from_dict({**raw, "eos_token_id": [*ends, *more]} if more else raw, where=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> LlamaConfig:
        """Check the entries of a config.json.

        Raises: CheckpointError: names the file and the key: missing, of the wrong type, out of range, or unsupported.
        """
        read = _Reader(raw, where)
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise CheckpointError(f"{where}: model_type {model_type!r:.60} is not supported; minilora reads {known}")
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{where}: hidden_act {raw['hidden_act']!r:.60} is not supported, only 'silu'")
        hidden, heads = read.whole("hidden_size"), read.whole("num_attention_heads")
        layers = read.whole("num_hidden_layers", largest=MOST_LAYERS)
        # Trap: a Mistral without the key has 8, one with null as many as query heads.
        eight = model_type == "mistral" and "num_key_value_heads" not in raw
        key_value_heads = read.whole("num_key_value_heads", 8 if eight else heads)
        if raw.get("head_dim") is None and hidden % heads:
            raise CheckpointError(f"{where}: hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim "
                                  "is not given")
        head_dim = read.whole("head_dim", hidden // heads)
        if heads % key_value_heads:
            raise CheckpointError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads "
                                  f"{key_value_heads}")
        if heads * head_dim > LARGEST:
            raise CheckpointError(f"{where}: num_attention_heads {heads} times head_dim {head_dim} is above {LARGEST:,}")
        if head_dim % 2:
            raise CheckpointError(f"{where}: head_dim {head_dim} is odd; rotary embedding needs pairs")
        positions = read.whole("max_position_embeddings", {"llama": 2048, "mistral": 131072, "qwen2": 32768}[model_type])
        theta, scaling = _rope(read, raw, where, positions)
        return cls(
            model_type=model_type, vocab_size=read.whole("vocab_size"), hidden_size=hidden,
            intermediate_size=read.whole("intermediate_size"), num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_value_heads, head_dim=head_dim, max_position_embeddings=positions,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling,
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            attention_bias=model_type == "llama" and read.flag("attention_bias"), qkv_bias=model_type == "qwen2",
            mlp_bias=model_type == "llama" and read.flag("mlp_bias"),
            sliding_windows=_windows(read, raw, where, model_type, layers), raw=dict(raw))

    def to_dict(self) -> dict[str, Any]:
        """The config.json this was read from: what minilora does not use (token ids, names) stays in it."""
        return dict(self.raw)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's seven linears."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q),
                "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}


def end_ids(raw: dict[str, Any]) -> list[int]:
    """The ids that a config.json or generation_config.json names as `eos_token_id`: one or a list; all else is left out."""
    named = raw.get("eos_token_id")
    return [token for token in (named if isinstance(named, list) else [named]) if type(token) is int]


def linear_parameters(config: LlamaConfig) -> int:
    """Weights in the linears of all blocks: what QLoRA stores in 4 bits."""
    return config.num_hidden_layers * sum(rows * columns for rows, columns in config.linear_shapes().values())


def num_parameters(config: LlamaConfig) -> int:
    """All parameters, a tied head counted once."""
    shapes = config.linear_shapes()
    biased = ((("q_proj", "k_proj", "v_proj") if config.qkv_bias or config.attention_bias else ())
              + (("o_proj",) if config.attention_bias else ())
              + (("gate_proj", "up_proj", "down_proj") if config.mlp_bias else ()))
    biases = config.num_hidden_layers * sum(shapes[name][0] for name in biased)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    return linear_parameters(config) + biases + norms + tables


class _Reader:
    """Typed access to the entries of an untrusted object."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.where} lacks {key!r}, which every Llama needs; fetch the file again")
            return default
        return value

    def whole(self, key: str, default: int | None = None, largest: int = LARGEST) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
            raise CheckpointError(f"{self.where}: {key!r} must be a whole number from 1 to {largest:,}, not {value!r:.60}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < 1e12 and math.isfinite(value)):
            raise CheckpointError(f"{self.where}: {key!r} must be a positive number, not {value!r:.60}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key!r} must be true or false, not {value!r:.60}")
        return value


def _rope(read: _Reader, raw: dict[str, Any], where: str, positions: int) -> tuple[float, RopeScaling]:
    """Base and scaling, from `rope_theta` and `rope_scaling`, or transformers 5's one `rope_parameters`.

    Where one thing is said twice, what counts is what counts in transformers 5.
    """
    entry = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: rope parameters must be an object, not {entry!r:.60}")
    inner = _Reader(entry, f"{where}, rope parameters")
    theta = inner.number("rope_theta") if entry.get("rope_theta") is not None else read.number("rope_theta", 10_000.0)
    kind = entry.get("rope_type", entry.get("type", "default"))
    partial = entry.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise CheckpointError(f"{where}: partial_rotary_factor {partial!r:.60} is not supported, only rotation of whole heads")
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", inner.number("factor"))
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if low >= high:
            raise CheckpointError(f"{where}: low_freq_factor {low:g} must be below high_freq_factor {high:g}")
        length = "original_max_position_embeddings"
        original = (inner if raw.get(length) is None else read).whole(length, positions)
        return theta, RopeScaling("llama3", inner.number("factor"), low, high, original)
    raise CheckpointError(f"{where}: rope_type {kind!r:.60} is not supported, only default, linear and llama3")


def _windows(read: _Reader, raw: dict[str, Any], where: str, model_type: str, layers: int) -> tuple[int | None, ...]:
    """The attention window of each layer; None sees everything."""
    if model_type == "llama" or raw.get("sliding_window", 4096 if model_type == "mistral" else None) is None:
        return (None,) * layers
    if model_type == "qwen2" and not read.flag("use_sliding_window"):
        return (None,) * layers
    window = read.whole("sliding_window", 4096)
    types = raw.get("layer_types")
    if types is None:
        first = read.whole("max_window_layers", 28) if model_type == "qwen2" and raw.get("max_window_layers") != 0 else 0
        return tuple(window if layer >= first else None for layer in range(layers))
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in kinds for kind in types):
        raise CheckpointError(f"{where}: layer_types must name full_attention or sliding_attention for each of {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
