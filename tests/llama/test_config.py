"""config.json: what is read, what is assumed, what is refused."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.errors import CheckpointError
from minilora.llama.config import LARGEST, LlamaConfig, RopeScaling, linear_parameters, num_parameters
from minilora.llama.model import LlamaForCausalLM

TINY: dict[str, Any] = {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
                        "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


def read(**changes: Any) -> LlamaConfig:
    return LlamaConfig.from_dict({**TINY, **changes})


def test_llama_2_7b_has_6738415616_parameters_and_6476005376_in_its_224_linears() -> None:
    config = LlamaConfig.from_dict(LLAMA_2_7B)
    assert num_parameters(config) == 6_476_005_376 + 2 * 32000 * 4096 + 65 * 4096 == 6_738_415_616
    assert linear_parameters(config) == 6_476_005_376
    assert config.num_hidden_layers * len(config.linear_shapes()) == 224


def test_meditron_7b_has_6738554880_parameters_17_rows_more_in_both_tables() -> None:
    config = LlamaConfig.from_dict({**LLAMA_2_7B, "vocab_size": 32017})
    assert num_parameters(config) == 6_738_415_616 + 2 * 17 * 4096 == 6_738_554_880
    assert linear_parameters(config) == 6_476_005_376


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 2, "head_dim": 10},
    {"model_type": "qwen2"}, {"model_type": "mistral", "num_key_value_heads": 1}], ids=str)
def test_counted_parameters_are_those_of_the_model(changes: dict[str, Any]) -> None:
    config = read(**changes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_optional_keys_take_the_defaults_of_hugging_face() -> None:
    config = read()
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps, config.rope_theta) == (4, 8, 1e-6, 10_000.0)
    assert (config.max_position_embeddings, config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (
        2048, False, False, False)
    assert config.rope_scaling == RopeScaling() and config.sliding_windows == (None, None, None)
    assert read(num_key_value_heads=None, head_dim=None, rope_scaling=None) == config


@pytest.mark.parametrize(("changes", "key_value_heads"), [
    ({}, 8), ({"num_key_value_heads": None}, 16), ({"num_key_value_heads": 4}, 4)])
def test_mistral_without_the_key_has_eight_key_value_heads(changes: dict[str, Any], key_value_heads: int) -> None:
    assert read(model_type="mistral", num_attention_heads=16, **changes).num_key_value_heads == key_value_heads


@pytest.mark.parametrize(("changes", "windows"), [
    ({"model_type": "llama", "sliding_window": 5}, (None, None, None)),
    ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5}, (5, 5, 5)),
    ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}, (None, None, None)),
    ({"model_type": "mistral", "num_key_value_heads": 2}, (4096, 4096, 4096)),
    ({"model_type": "qwen2", "sliding_window": 5}, (None, None, None)),
    ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": False, "max_window_layers": 0}, (None, None, None)),
    ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True}, (None, None, None)),
    ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, (5, 5, 5)),
    ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2}, (None, None, 5)),
    ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2,
      "layer_types": ["sliding_attention", "full_attention", "full_attention"]}, (5, None, None)),
], ids=str)
def test_each_layer_has_the_window_its_family_gives_it(changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(**changes).sliding_windows == windows


@pytest.mark.parametrize(("changes", "theta", "scaling"), [
    ({"rope_theta": 5e5}, 5e5, RopeScaling()),
    ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, RopeScaling()),
    ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}, 1e6, RopeScaling("linear", 2.0)),
    ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
    ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
], ids=str)
def test_rope_is_read_from_old_and_new_keys(changes: dict[str, Any], theta: float, scaling: RopeScaling) -> None:
    config = read(**changes)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_a_config_survives_the_way_through_json(tmp_path: Path, model_type: str) -> None:
    raw = {**TINY, "model_type": model_type, "num_key_value_heads": 2, "sliding_window": 7, "bos_token_id": 1,
           "eos_token_id": [2, 3], "rope_scaling": LLAMA3}
    config = LlamaConfig.from_dict(raw)
    assert config.to_dict() == raw
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert LlamaConfig.from_json(tmp_path) == LlamaConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_a_missing_key_is_named_with_its_file(tmp_path: Path, key: str, how: str) -> None:
    raw = {**TINY, key: None} if how == "null" else {name: value for name, value in TINY.items() if name != key}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        LlamaConfig.from_json(path)
    assert key in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [
    ("vocab_size", "97"), ("vocab_size", 97.0), ("vocab_size", True), ("vocab_size", 0), ("vocab_size", -1),
    ("hidden_size", LARGEST + 1), ("hidden_size", 10**40), ("hidden_size", [32]), ("hidden_size", 33),
    ("intermediate_size", {}),
    ("num_hidden_layers", 0), ("num_hidden_layers", 1 << 20), ("num_attention_heads", float("nan")),
    ("num_key_value_heads", 3), ("num_key_value_heads", 8), ("num_key_value_heads", False),
    ("head_dim", 7), ("head_dim", 0), ("head_dim", LARGEST), ("max_position_embeddings", -5),
    ("max_position_embeddings", "long"),
    ("rms_norm_eps", 0), ("rms_norm_eps", -1e-5), ("rms_norm_eps", float("nan")), ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", True),
    ("rope_theta", 0), ("rope_theta", float("inf")), ("rope_theta", 10**400), ("rope_theta", "big"),
    ("tie_word_embeddings", 1), ("tie_word_embeddings", "true"), ("attention_bias", 0), ("mlp_bias", "no"),
    ("hidden_act", "gelu"), ("hidden_act", ["silu"]), ("hidden_act", None),
    ("partial_rotary_factor", 0.5), ("partial_rotary_factor", "half"),
], ids=lambda value: str(value)[:20])
def test_an_impossible_value_is_refused_by_its_key(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(**{key: value})
    assert key in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "gemma", "", None, 3, ["llama"], {"llama": 1}], ids=str)
def test_another_architecture_is_refused_with_the_three_that_are_read(model_type: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(model_type=model_type)
    assert all(word in str(caught.value) for word in ("model_type", repr(model_type), "llama", "mistral", "qwen2"))


@pytest.mark.parametrize("entry", [
    {"rope_type": "yarn", "factor": 4.0}, {"type": "dynamic", "factor": 4.0}, {"rope_type": "longrope"},
    {"rope_type": ["linear"]}], ids=str)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_another_rope_scaling_is_refused_by_its_name(key: str, entry: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"rope_type .* not supported"):
        read(**{key: entry})


@pytest.mark.parametrize(("entry", "named"), [
    ("linear", "rope"), ([1], "rope"), ({"type": "linear"}, "factor"), ({"type": "linear", "factor": -2.0}, "factor"),
    ({**LLAMA3, "factor": None}, "factor"), ({**LLAMA3, "factor": float("nan")}, "factor"),
    ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor"), ({**LLAMA3, "high_freq_factor": "4"}, "high_freq_factor"),
    ({**LLAMA3, "original_max_position_embeddings": 0.5}, "original_max_position_embeddings")], ids=str)
def test_a_broken_rope_scaling_is_refused_by_its_key(entry: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read(rope_scaling=entry)


@pytest.mark.parametrize("types", [
    "sliding_attention", ["full_attention"], ["full_attention"] * 2 + ["linear_attention"], [{}, [], 1]], ids=str)
def test_layer_types_that_are_no_attention_of_each_layer_are_refused(types: Any) -> None:
    with pytest.raises(CheckpointError, match="layer_types"):
        read(model_type="qwen2", use_sliding_window=True, sliding_window=4, layer_types=types)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1, "a": 2}', '{"hidden_size": 32,}', "[" * 100_000])
def test_what_is_no_json_object_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        LlamaConfig.from_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LlamaConfig.from_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="UTF-8"):
        LlamaConfig.from_json(tmp_path)


@pytest.mark.parametrize(("own", "beside", "expected"), [
    (2, [2, 7], [2, 7]), ([3, 2], 7, [3, 2, 7]), (None, 7, [7]), (2, 2, 2), (2, None, 2), (2, ["7", True, None, 7.0, [7]], 2),
    (2, {"7": 7}, 2), ([2, "x"], [2], [2, "x"])], ids=str)
def test_end_tokens_of_generation_config_join_those_of_config(tmp_path: Path, own: Any, beside: Any, expected: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "eos_token_id": own}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": beside}))
    for path in (tmp_path, tmp_path / "config.json"):
        assert LlamaConfig.from_json(path).to_dict() == {**TINY, "eos_token_id": expected}


@pytest.mark.parametrize("content", [b"", b"{", b"[2, 7]", b"\xff\xfe{}", b'{"eos_token_id": 2, "eos_token_id": 7}'])
def test_a_broken_generation_config_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as caught:
        LlamaConfig.from_json(tmp_path)
    assert "\n" not in str(caught.value)
