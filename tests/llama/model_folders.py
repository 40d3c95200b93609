"""Model folders that tests write: every layout Hugging Face has used, with random weights."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minilora.errors import CheckpointError
from minilora.llama.checkpoint import load_checkpoint

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 32,
    "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 48,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
           "mlp.down_proj")
EMBED, HEAD, Q0 = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
LAYOUTS = ("safetensors", "safetensors shards", "bin", "bin shards")


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Weights by Hugging Face's names, in the order a model has them."""
    h, i, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    sizes = dict(zip(LINEARS, ((h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)), strict=True))
    shapes: dict[str, tuple[int, ...]] = {EMBED: (v, h)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{name}.weight": size for name, size in sizes.items()}
        if config["model_type"] == "qwen2":
            shapes |= {f"{at}{name}.bias": sizes[name][:1] for name in LINEARS[:3]}
        shapes |= {f"{at}input_layernorm.weight": (h,), f"{at}post_attention_layernorm.weight": (h,)}
    shapes["model.norm.weight"] = (h,)
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = (v, h)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], layout: str = "safetensors") -> Path:
    """A Hugging Face folder; shards take every second tensor, and the index lists them backwards."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind, stem = ("bin", "pytorch_model") if layout.startswith("bin") else ("safetensors", "model")
    save: Callable[[dict[str, Tensor], Path], Any] = torch.save if kind == "bin" else save_file         # type: ignore[assignment]
    if not layout.endswith("shards"):
        save(tensors, folder / f"{stem}.{kind}")
        return folder
    weight_map = {}
    for part in (0, 1):
        name = f"{stem}-{part + 1:05d}-of-00002.{kind}"
        save({key: tensors[key] for key in list(tensors)[part::2]}, folder / name)
        weight_map |= dict.fromkeys(list(tensors)[part::2], name)
    index = {"metadata": {"total_size": 1}, "weight_map": dict(reversed(weight_map.items()))}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def assert_same(expected: Tensor, found: Tensor, name: str) -> None:
    assert expected.shape == found.shape and expected.dtype == found.dtype, f"{name}: {found.shape} {found.dtype}"
    different = (expected != found).flatten().nonzero()
    assert not len(different), f"{name}: element {int(different[0])} differs first"


def refused(folder: Path, *said: str, **options: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, **options)
    text = str(caught.value)
    assert "\n" not in text, text
    for part in said:
        assert part in text, f"{part!r} is not in: {text}"
