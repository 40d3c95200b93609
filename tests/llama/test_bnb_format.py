"""The 4-bit folder format: what we write comes back the same, what a file says is honoured, what it may not say is refused."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minilora.errors import CheckpointError
from minilora.layers.lora import LoRAConfig
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import add_lora
from minilora.llama.bnb_format import save_quantized
from minilora.llama.checkpoint import load_checkpoint
from minilora.quant.codebooks import DYNAMIC_8BIT, NF4_CODE
from tests.llama.model_folders import CONFIG, LAYOUTS, Q0, assert_same, random_tensors, refused, write_folder

STATE = f"{Q0}.quant_state.bitsandbytes__nf4"


def saved(folder: Path, double_quant: bool = True, blocksize: int = 64, config: dict[str, Any] = CONFIG) -> tuple[Any, Path]:
    """A 4-bit model and the folder it was saved to."""
    source = write_folder(folder / "source", config, random_tensors(config))
    model = load_checkpoint(source, double_quant=double_quant, blocksize=blocksize)
    save_quantized(model, folder / "saved")
    return model, folder / "saved"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_state(folder: Path, key: str = STATE, **values: Any) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[key].tolist())) | values
        text = json.dumps({k: v for k, v in state.items() if v != "absent"})
        tensors[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    edit(folder, change)


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    weight = model.model.layers[0].self_attn.q_proj.quantized
    expected = {"": weight.packed.view(512, 1), ".absmax": weight.nested.codes, ".quant_map": NF4_CODE,
                ".nested_absmax": weight.nested.absmax, ".nested_quant_map": DYNAMIC_8BIT}
    for part, value in expected.items():
        assert_same(value, tensors[Q0 + part], Q0 + part)
    assert json.loads(bytes(tensors[STATE].tolist())) == {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 32], "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": weight.nested.offset}
    assert {key for key in tensors if key.startswith(Q0)} == {Q0 + part for part in expected} | {STATE}
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["hidden_size"] == 32
    assert config["architectures"] == ["LlamaForCausalLM"]
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes" and quantization["load_in_4bit"] is True
    assert quantization["bnb_4bit_quant_type"] == "nf4" and quantization["bnb_4bit_use_double_quant"] is True
    assert quantization["llm_int8_skip_modules"] == ["lm_head"]


def test_without_double_quantization_absmax_is_float32(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, double_quant=False)
    tensors = load_file(folder / "model.safetensors")
    assert_same(model.model.layers[0].self_attn.q_proj.quantized.absmax, tensors[f"{Q0}.absmax"], "absmax")
    assert not any("nested" in key for key in tensors)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("family", ["llama", "qwen2", "tied"])
def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path, double_quant: bool, blocksize: int, family: str) -> None:
    config = {**CONFIG, "model_type": "qwen2" if family == "qwen2" else "llama", "tie_word_embeddings": family == "tied",
              "architectures": ["Qwen2ForCausalLM" if family == "qwen2" else "LlamaForCausalLM"]}
    model, folder = saved(tmp_path, double_quant, blocksize, config)
    again = load_checkpoint(folder, double_quant=not double_quant, blocksize=128)       # the file's own settings win
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert_same(value, second[key], key)
    layer = again.model.layers[0].self_attn.q_proj
    assert layer.blocksize == blocksize and layer.double_quant == double_quant and layer.quantized.dtype == torch.bfloat16
    (tmp_path / "again").mkdir()
    save_quantized(again, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_4_bit_folders_load_from_every_layout(tmp_path: Path, layout: str) -> None:
    model, folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    again = load_checkpoint(write_folder(tmp_path / "other", config, load_file(folder / "model.safetensors"), layout))
    for key, value in model.state_dict().items():
        assert_same(value, again.state_dict()[key], key)


def test_quantize_none_dequantizes_a_4_bit_folder(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    dense = load_checkpoint(folder, quantize=None, dtype=torch.float32)
    assert not any(isinstance(module, NF4Linear) for module in dense.modules())
    assert_same(model.model.layers[0].self_attn.q_proj.dense_weight(torch.float32), dense.get_parameter(Q0).detach(), Q0)


def test_linears_that_a_4_bit_folder_keeps_dense_stay_dense(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(Q0)]:
            del tensors[key]
        tensors[Q0] = torch.ones(32, 32, dtype=torch.bfloat16)
    edit(folder, change)
    model = load_checkpoint(folder)
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear)
    assert isinstance(model.model.layers[1].self_attn.q_proj, NF4Linear)


def test_codes_stored_as_another_type_are_the_same_bytes(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    edit(folder, lambda tensors: tensors.update({Q0: tensors[Q0].view(-1).view(torch.bfloat16)}))
    assert_same(model.model.layers[0].self_attn.q_proj.packed.view(-1),
                load_checkpoint(folder).model.layers[0].self_attn.q_proj.packed.view(-1), Q0)


def test_a_bfloat16_nested_dtype_decodes_with_its_two_roundings(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    nested = model.model.layers[0].self_attn.q_proj.quantized.nested
    offset = float(torch.tensor(nested.offset).bfloat16())
    edit_state(folder, nested_dtype="bfloat16", nested_offset=offset)
    rounded = (DYNAMIC_8BIT[nested.codes.long()] * nested.absmax.repeat_interleave(256)[:len(nested.codes)]).bfloat16()
    expected = (rounded.double() + offset).bfloat16().float()
    found = load_checkpoint(folder).model.layers[0].self_attn.q_proj.quantized.absmax
    assert_same(expected, found, "absmax")


def test_an_offset_rounded_in_a_float32_file_is_used_as_it_stands(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    nested = model.model.layers[0].self_attn.q_proj.quantized.nested
    offset = float(torch.tensor(nested.offset).bfloat16())
    edit_state(folder, nested_offset=offset)
    found = load_checkpoint(folder).model.layers[0].self_attn.q_proj.quantized
    assert found.nested is not None and found.nested.offset == offset
    assert_same(nested.codes, found.nested.codes, "codes")


@pytest.mark.parametrize(("values", "said"), [
    ({"quant_type": "fp4"}, "quant_type"), ({"dtype": "int8"}, "dtype"),
    ({"shape": [32, 31]}, "(32, 32)"), ({"shape": "x"}, "shape"), ({"shape": None}, "shape"),
    ({"blocksize": 0}, "blocksize"), ({"blocksize": 128}, "absmax"), ({"blocksize": "64"}, "blocksize"),
    ({"nested_blocksize": "absent"}, "nested_blocksize"), ({"nested_blocksize": 8}, "nested"),
    ({"nested_dtype": "x"}, "nested_dtype"),
    ({"nested_offset": "absent"}, "nested_offset"), ({"nested_offset": float("nan")}, "nested_offset"),
])
def test_a_quant_state_that_does_not_fit_is_named(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    _, folder = saved(tmp_path)
    edit_state(folder, **values)
    refused(folder, Q0, "model.safetensors", said)


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.pop(f"{Q0}.absmax"), f"{Q0}.absmax"),
    (lambda t: t.pop(f"{Q0}.quant_map"), f"{Q0}.quant_map"),
    (lambda t: t.pop(f"{Q0}.nested_quant_map"), f"{Q0}.nested_quant_map"),
    (lambda t: t.update({f"{Q0}.absmax": t[f"{Q0}.absmax"][:-1].clone()}), "absmax"),
    (lambda t: t.update({f"{Q0}.absmax": t[f"{Q0}.absmax"].float()}), "absmax"),
    (lambda t: t.update({Q0: t[Q0][:-1].clone()}), "512"),
    (lambda t: t.update({f"{Q0}.quant_map": t[f"{Q0}.quant_map"].flip(0)}), "quant_map"),
    (lambda t: t.update({f"{Q0}.nested_quant_map": t[f"{Q0}.nested_quant_map"] + 1}), "nested_quant_map"),
    (lambda t: t.update({STATE: torch.tensor(list(b"{nonsense"), dtype=torch.uint8)}), "JSON"),
    (lambda t: t.update({STATE: torch.tensor([255, 254], dtype=torch.uint8)}), "UTF-8"),
    (lambda t: t.pop(STATE), Q0),
    (lambda t: t.update({STATE.replace("nf4", "fp4"): t.pop(STATE)}), "nf4"),
    (lambda t: t.update({f"{Q0}.surprise": torch.ones(1)}), "surprise"),
])
def test_a_broken_4_bit_linear_is_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], said: str) -> None:
    _, folder = saved(tmp_path)
    edit(folder, change)
    refused(folder, Q0, said)


def test_a_dense_model_and_an_adapted_one_cannot_be_saved_as_4_bit(tmp_path: Path) -> None:
    source = write_folder(tmp_path, CONFIG, random_tensors(CONFIG))
    with pytest.raises(CheckpointError, match="no 4-bit layers"):
        save_quantized(load_checkpoint(source, quantize=None), tmp_path)
    model = load_checkpoint(source)
    add_lora(model, LoRAConfig(r=2))
    with pytest.raises(CheckpointError, match="merge"):
        save_quantized(model, tmp_path)
