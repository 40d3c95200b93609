"""Adapters on disk: round trips, what is recorded beside them, and what is refused."""
from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minilora import CheckpointError, ConfigError, LoRAConfig, OutputError, add_lora, load_adapter, load_model, save_adapter
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


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_another_model_of_the_same_shape_warns(base: Path, tmp_path: Path, quantize: Any) -> None:
    save_adapter(add_lora(load_model(base, quantize=quantize), LoRAConfig(r=4)), tmp_path / "adapter")
    other = write_model(tmp_path / "other", seed=1)
    with pytest.warns(UserWarning, match="trained over other weights than these: over another model"):
        load_model(other, adapter=tmp_path / "adapter", quantize=quantize)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(base, adapter=tmp_path / "adapter", quantize=quantize, dtype=torch.float32)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


@pytest.mark.parametrize("changes, words", [
    ({"r": 8}, r"lora_A.weight has shape \(4, 64\), this model needs \(8, 64\)"), ({"r": "remove"}, "lacks r"),
    ({"r": 0}, "r must be"), ({"lora_alpha": "x"}, "alpha must be"), ({"target_modules": "all"}, "target_modules"),
    ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"target_modules": ["q_proj"]}, "no place"), ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
    ({"target_modules": ["query"]}, "no place"), ({"target_modules": ["proj"]}, "no place"),
    ({"layers_to_transform": 0}, "layers_to_transform"), ({"layers_to_transform": [0, 1]}, "layers_to_transform"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"), ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"lora_bias": True}, "lora_bias"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"), ({"init_lora_weights": "OLoRA"}, "OLoRA"),
    ({"init_lora_weights": "loftq"}, "loftq"), ({"use_dora": True, "use_rslora": True}, "lora_magnitude_vector"),
    ({"lora_alpha": float("inf")}, "alpha must be"), ({"r": 4.0}, "r must be"), ({"target_modules": None}, "target_modules"),
    ({"use_rslora": "false"}, "use_rslora must be true or false"), ({"use_dora": 1}, "use_dora must be true or false")])
def test_an_adapter_that_does_not_fit_is_refused(base: Path, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    folder = tmp_path / "adapter"
    save_adapter(trained(base), folder)
    edit(folder, **changes)
    model = load_model(base)
    with pytest.raises(CheckpointError, match=words) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value)
    assert next(lora_layers(model), None) is None, "a refused adapter must leave the model as it was"


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", None])
def test_starts_that_leave_the_base_alone_are_read(base: Path, tmp_path: Path, start: object) -> None:
    model = trained(base)
    save_adapter(model, tmp_path / "adapter")
    edit(tmp_path / "adapter", init_lora_weights=start, layers_to_transform=None, lora_bias=False, rank_pattern={})
    assert torch.equal(load_model(base, dtype=torch.float32, adapter=tmp_path / "adapter")(IDS), model.eval()(IDS))


def test_an_adapter_on_some_of_a_kind_names_them_in_full_and_comes_back(base: Path, tmp_path: Path) -> None:
    model = trained(base, LoRAConfig(r=2, target_modules=("layers.0.self_attn.q_proj", "up_proj")))
    save_adapter(model, tmp_path / "adapter")
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    again = load_model(base, dtype=torch.float32, adapter=tmp_path / "adapter")
    assert [name for name, _ in lora_layers(again)] == [name for name, _ in lora_layers(model)]
    assert torch.equal(model.eval()(IDS), again(IDS))


def test_layers_of_several_settings_do_not_fit_one_folder(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    model.model.layers[1].mlp.up_proj.alpha = 99
    with pytest.raises(ConfigError, match="differ in"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="no LoRA"):
        save_adapter(load_model(base), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists(), "a refused save leaves nothing behind"


def test_a_folder_that_cannot_be_made_says_so(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot write") as caught:
            save_adapter(trained(base), str(folder))
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "x"


def test_a_second_adapter_is_refused_and_the_first_stays(base: Path, tmp_path: Path) -> None:
    save_adapter(trained(base), tmp_path / "adapter")
    model = load_model(str(base), dtype=torch.float32, adapter=str(tmp_path / "adapter"))
    before = model(IDS)
    with pytest.raises(CheckpointError, match="already"):
        load_adapter(model, str(tmp_path / "adapter"))
    assert torch.equal(model(IDS), before)


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
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
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
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        load_adapter(load_model(base), folder)
    with pytest.raises(CheckpointError, match="no such adapter folder"):
        load_adapter(load_model(base), tmp_path / "nothing")


def load_file_bytes(content: bytes, tmp_path: Path) -> dict[str, torch.Tensor]:
    (tmp_path / "copy.safetensors").write_bytes(content)
    return load_file(tmp_path / "copy.safetensors")
