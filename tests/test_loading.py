"""`load_model` as a stranger calls it: what it takes, what it gives, what it refuses before it reads a weight."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn

from minilora import CheckpointError, ConfigError, HubError, NF4Linear, load_model, load_tokenizer, quantize_nf4
from minilora.generate import generate_ids
from minilora.loading import total_memory
from tests.models import SHAPE, write_model

IDS = torch.tensor([[256, 70, 71, 72]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def test_a_path_may_be_text_or_a_path_and_the_model_is_ready_to_run(folder: Path) -> None:
    for name in (folder, str(folder), f"{folder}/"):
        model = load_model(name)
        assert not model.training and model.dtype == torch.bfloat16 and model(IDS).shape == (1, 4, 259)
    assert model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bit_linears_hold_the_quantized_weights_of_the_file(folder: Path, dtype: torch.dtype, double_quant: bool) -> None:
    dense = load_model(folder, quantize=None, dtype=torch.float32)
    model = load_model(folder, dtype=dtype, double_quant=double_quant, device=torch.device("cpu"), blocksize=32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert len(layers) == 14 and type(model.lm_head) is nn.Linear
    for name, layer in layers.items():
        expected = quantize_nf4(dense.get_parameter(f"{name}.weight"), 32, double_quant)
        assert torch.equal(layer.packed, expected.packed) and torch.equal(layer.quantized.absmax, expected.absmax), name
        assert layer.dense_weight().dtype == dtype
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype and torch.equal(parameter, dense.get_parameter(name).to(dtype)), name


@pytest.mark.parametrize(("options", "said"), [
    ({"quantize": "int8"}, "quantize must be"), ({"quantize": False}, "quantize must be"),
    ({"dtype": "float32"}, "dtype must be"),
    ({"dtype": torch.int8}, "dtype must be"), ({"dtype": None}, "dtype must be"), ({"device": "gpu"}, "unknown device"),
    ({"device": 0.5}, "unknown device"), ({"blocksize": 0}, "blocksize must be"), ({"blocksize": 64.0}, "blocksize must be"),
])
def test_an_impossible_argument_is_named_in_one_line(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_model(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is there")
def test_a_gpu_that_is_not_there_is_said_to_be_absent(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        load_model(folder, device="cuda")
    assert load_model(folder, device="auto").device.type == "cpu"


@pytest.mark.parametrize("name", [Path("models/nothing"), Path("nothing-of-this-name"), None, 7, b"model"])
def test_a_path_or_what_is_no_name_is_never_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise AssertionError("asked the hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="name a model folder"):
        load_model(name)


def test_a_bad_adapter_is_refused_before_a_weight_is_read(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no such adapter folder"):
        load_model(folder, adapter=tmp_path / "nothing")


def test_stories260k_writes_its_authors_ids(shared_data: Path) -> None:
    """The greedy ids of llama2.c's own program on the original file, from BOS (../shared/data/README.md)."""
    model = load_model(shared_data / "stories260K", quantize=None, dtype=torch.float32)
    tokenizer: Any = SimpleNamespace(eos_id=None)
    assert generate_ids(model, tokenizer, [[1]], max_new_tokens=14) == [
        [461, 461, 401, 401, 401, 461, 378, 455, 473, 456, 435, 299, 362, 409]]


def test_trained_weights_lose_to_4_bits_what_normal_ones_do(shared_data: Path) -> None:
    """NF4's level is one for normal weights (root mean square error 0.092 spreads at blocks of 64); these were trained."""
    dense = load_model(shared_data / "stories260K", quantize=None, dtype=torch.float32)
    model = load_model(shared_data / "stories260K", dtype=torch.float32, double_quant=False)
    for name, layer in ((name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear)):
        w, q = dense.get_parameter(f"{name}.weight").detach(), layer.quantized
        error = w - q.dequantize()
        bound = 0.1519036 * q.absmax.repeat_interleave(64)[: w.numel()].view(w.shape) * (1 + 1e-6)
        assert (error.abs() <= bound).all(), name
        assert 0.07 < float(error.square().mean().sqrt() / w.square().mean().sqrt()) < 0.11, name
        w.copy_(q.dequantize())
    ids = torch.tensor([[1, 461, 461, 401, 401, 401, 461, 378, 455, 473]])
    assert torch.equal(model(ids), dense(ids)), "the 4-bit model is the dense one of its dequantized weights, to the bit"


def test_a_tokenizer_is_named_as_a_model_is(folder: Path, tmp_path: Path) -> None:
    ids = load_tokenizer(folder).encode("CT (x)")
    assert load_tokenizer(str(folder)).encode("CT (x)") == load_tokenizer(folder / "tokenizer.json").encode("CT (x)") == ids
    assert load_tokenizer("tiny").decode(load_tokenizer("tiny").encode("CT (x)")) == "CT (x)"
    for name in (tmp_path / "nothing", str(tmp_path / "nothing")):
        with pytest.raises(CheckpointError, match="no such folder"):
            load_tokenizer(name)
    with pytest.raises(HubError, match="no such folder here"):
        load_tokenizer("nobody/nothing")


@pytest.mark.parametrize(("options", "bits"), [({}, 4.127), ({"double_quant": False}, 4.5), ({"quantize": None}, 16)])
def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_read(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], bits: float) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "hidden_size": 8192, "intermediate_size": 28672, "head_dim": 128,
                                                  "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
                                                  "num_hidden_layers": 80}))
    linears = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192)
    needed = (linears * bits / 8 + (161 * 8192 + 2 * 32000 * 8192) * 2) / 1e9
    monkeypatch.setattr("minilora.loading.total_memory", lambda device: int(needed * 0.999 * 1e9))
    with pytest.raises(CheckpointError, match=rf"the weights take {needed:,.1f} GB, and there are .* of memory here"):
        load_model(tmp_path, **options)
    monkeypatch.setattr("minilora.loading.total_memory", lambda device: int(needed * 1.001 * 1e9))
    with pytest.raises(CheckpointError, match="no weights"):
        load_model(tmp_path, **options)


def test_the_memory_of_this_machine_is_told() -> None:
    assert 1e8 < total_memory(torch.device("cpu")) < 1e15


@pytest.mark.parametrize("blocksize", [0, -1, True, 64.0, (1 << 30) + 1, 10 ** 20])
def test_a_block_size_that_no_checkpoint_can_name_is_refused(blocksize: int) -> None:
    with pytest.raises(ConfigError, match="blocksize must be a positive whole number of weights, up to 1,073,741,824"):
        load_model("tiny", blocksize=blocksize)
