"""Models by their shape: the right parts under the right names, of random weights as wide as they should be."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from minilora import load_model
from minilora.llama.config import LlamaConfig
from minilora.shapes import SHAPES, random_model, shape_of
from tests.models import SHAPE, write_model
from tests.test_hub import ID, FakeHub

CONFIG = LlamaConfig.from_dict({**SHAPES["110m"], "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
                                "intermediate_size": 320, "num_hidden_layers": 2, "vocab_size": 300})


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_random_model_has_the_parts_of_a_loaded_one(tmp_path: Path, quantize: Any, double_quant: bool) -> None:
    loaded = load_model(write_model(tmp_path / "model"), quantize=quantize, double_quant=double_quant)
    made = random_model(LlamaConfig.from_dict(SHAPE), quantize, double_quant=double_quant)
    first, second = ({name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
                     for model in (made, loaded))
    assert first == second


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_its_weights_are_as_wide_as_they_should_be(quantize: Any) -> None:
    model = random_model(CONFIG, quantize, torch.float32)
    down = model.model.layers[1].mlp.down_proj
    weight = down.dense_weight() if quantize else down.weight
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.randint(0, 300, (2, 9))).isfinite().all()


def test_the_same_seed_makes_the_same_weights() -> None:
    first, second, other = (random_model(CONFIG, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_of_a_hub_id_the_configuration_alone_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, ["config.json", "model.safetensors", "tokenizer.json"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(Exception, match="model_type"):
        shape_of(ID)            # the fake's config.json is empty
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"] and len(hub.calls) == 1
    hub.files = []
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["1.1b"]))
    assert shape_of(ID).to_dict() == shape_of("1.1b").to_dict()
