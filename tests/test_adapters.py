"""Adapters on disk: round trips, what is recorded beside them, and what is refused."""
from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minilora import CheckpointError, LoRAConfig, add_lora, load_adapter, load_model, save_adapter
from minilora.layers.qlora import lora_layers
from tests.models import write_model

IDS = torch.arange(20)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


def trained(base: Path, config: LoRAConfig | None = None, **options: object) -> nn.Module:
    model = load_model(base, dtype=torch.float32, **options)
    add_lora(model, config or LoRAConfig(r=4, alpha=8), torch.Generator().manual_seed(0))
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B.weight, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("config", [LoRAConfig(r=4), LoRAConfig(r=4, alpha=3, use_rslora=True), LoRAConfig(r=2, use_dora=True),
                                    LoRAConfig(r=3, target_modules=("q_proj", "v_proj"), dropout=0.1)])
def test_a_saved_adapter_loads_to_the_same_model(base: Path, tmp_path: Path, config: LoRAConfig) -> None:
    model = trained(base, config)
    save_adapter(model, tmp_path / "adapter")
    again = load_model(base, dtype=torch.float32, adapter=tmp_path / "adapter")
    assert torch.equal(model.eval()(IDS), again(IDS))


def test_keys_are_pefts_and_tensors_float32(base: Path, tmp_path: Path) -> None:
    save_adapter(trained(base), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 64)
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (64, 4)
    assert len(tensors) == 2 * 7 * 2 and all(t.dtype == torch.float32 for t in tensors.values())


def test_another_block_size_warns_and_the_same_does_not(base: Path, tmp_path: Path) -> None:
    save_adapter(trained(base), tmp_path / "adapter")
    recorded = json.loads((tmp_path / "adapter" / "minilora.json").read_text())["base_quantization"]
    assert recorded == {"blocksize": 64, "double_quant": True, "quant_type": "nf4"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(base, adapter=tmp_path / "adapter")
    for options in ({"blocksize": 128}, {"double_quant": False}, {"quantize": None}):
        with pytest.warns(UserWarning, match="trained on a base stored as nf4 in blocks of 64 with double"):
            load_model(base, adapter=tmp_path / "adapter", **options)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


@pytest.mark.parametrize("changes, words", [
    ({"r": 8}, r"lora_A.weight has shape \(4, 64\), this model needs \(8, 64\)"), ({"r": "remove"}, "lacks r"),
    ({"r": 0}, "r must be"), ({"lora_alpha": "x"}, "alpha must be"), ({"target_modules": "all"}, "target_modules"),
    ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"target_modules": ["q_proj"]}, "no place"), ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
    ({"target_modules": ["query"]}, "no place")])
def test_an_adapter_that_does_not_fit_is_refused(base: Path, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    folder = tmp_path / "adapter"
    save_adapter(trained(base), folder)
    edit(folder, **changes)
    model = load_model(base)
    with pytest.raises(CheckpointError, match=words) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value)
    assert next(lora_layers(model), None) is None, "a refused adapter must leave the model as it was"


def test_an_adapter_of_another_models_shape_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(trained(base), tmp_path / "adapter")
    other = load_model(write_model(tmp_path / "other", hidden_size=128))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_adapter(other, tmp_path / "adapter")
    deeper = load_model(write_model(tmp_path / "deeper", num_hidden_layers=3))
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.2"):
        load_adapter(deeper, tmp_path / "adapter")


def test_damaged_files_are_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(trained(base), folder)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_adapter(load_model(base), folder)
    tensors = {k: t.clone() for k, t in load_file_bytes(content, tmp_path).items()}
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match="NaN"):
        load_adapter(load_model(base), folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no adapter_model"):
        load_adapter(load_model(base), folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        load_adapter(load_model(base), folder)
    with pytest.raises(CheckpointError, match="no such adapter folder"):
        load_adapter(load_model(base), tmp_path / "nothing")


def load_file_bytes(content: bytes, tmp_path: Path) -> dict[str, torch.Tensor]:
    (tmp_path / "copy.safetensors").write_bytes(content)
    return load_file(tmp_path / "copy.safetensors")
