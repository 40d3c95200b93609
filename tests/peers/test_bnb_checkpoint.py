"""4-bit folders go both ways between minilora and transformers + bitsandbytes, with equal weights to the bit."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minilora.layers.nf4_linear import NF4Linear
from minilora.llama.bnb_format import save_quantized
from minilora.llama.checkpoint import load_checkpoint, save_checkpoint
from tests.llama.model_folders import CONFIG, Q0, assert_same, random_tensors, write_folder

bitsandbytes = pytest.importorskip("bitsandbytes", reason="install the [peers] extra")
transformers = pytest.importorskip("transformers", reason="install the [peers] extra")

# Rows are whole blocks: on others bitsandbytes' CPU build misplaces blocks (tests/peers/test_bitsandbytes.py).
WIDE = {**CONFIG, "hidden_size": 128, "intermediate_size": 384, "num_key_value_heads": 4}
IDS = torch.tensor([[1, 7, 30, 2]])


def theirs_from(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options)


def their_weight(linear: Any) -> Tensor:
    found: Tensor = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return found


def four_bit(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def assert_same_weights(ours: Any, theirs: Any) -> None:
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, NF4Linear)}
    others = four_bit(theirs)
    assert layers.keys() == others.keys() and len(layers) == 14
    for name, layer in layers.items():
        expected = their_weight(others[name])
        assert_same(expected, layer.dense_weight(expected.dtype), name)
    for name, parameter in ours.named_parameters():
        assert_same(theirs.get_parameter(name).detach().float(), parameter.detach().float(), name)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("family", "blocksize"), [("llama", 64), ("qwen2", 64), ("tied", 64), ("llama", 32), ("llama", 128)])
def test_transformers_loads_what_we_save(tmp_path: Path, double_quant: bool, family: str, blocksize: int) -> None:
    config = {**WIDE, "model_type": "qwen2" if family == "qwen2" else "llama", "tie_word_embeddings": family == "tied",
              "architectures": ["Qwen2ForCausalLM" if family == "qwen2" else "LlamaForCausalLM"]}
    ours = load_checkpoint(write_folder(tmp_path / "dense", config, random_tensors(config)), double_quant=double_quant,
                           blocksize=blocksize, dtype=torch.float32)
    (tmp_path / "q").mkdir()
    save_quantized(ours, tmp_path / "q")
    theirs = theirs_from(tmp_path / "q")
    assert_same_weights(ours, theirs)
    with torch.no_grad():
        expected, found = theirs(IDS).logits, ours(IDS)
    assert (expected - found).abs().max() <= 0.02 * expected.abs().max()       # its no-grad kernel rounds codes to bfloat16


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_we_load_what_transformers_saves(tmp_path: Path, double_quant: bool, dtype: torch.dtype) -> None:
    write_folder(tmp_path / "dense", WIDE, random_tensors(WIDE, torch.float32))
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", device_map="cpu", dtype=dtype,
                                                               quantization_config=how)
    assert len(four_bit(theirs)) == 14
    theirs.save_pretrained(tmp_path / "q")
    ours = load_checkpoint(tmp_path / "q", dtype=torch.float32)
    again = theirs_from(tmp_path / "q")
    for name, module in four_bit(theirs).items():
        layer = ours.get_submodule(name)
        # The file's type says how it was written; what a merge here would make is of this model's.
        assert layer.double_quant == double_quant and layer.weight_dtype == torch.float32
        assert_same(their_weight(module), layer.dense_weight(dtype), name)
    assert four_bit(again).keys() == four_bit(theirs).keys()


def test_a_bfloat16_nested_dtype_gives_bitsandbytes_weights(tmp_path: Path) -> None:
    ours = load_checkpoint(write_folder(tmp_path / "dense", WIDE, random_tensors(WIDE)))
    (tmp_path / "q").mkdir()
    save_quantized(ours, tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    for key in [key for key in tensors if key.endswith("bitsandbytes__nf4")]:
        state = json.loads(bytes(tensors[key].tolist()))
        state |= {"nested_dtype": "bfloat16", "nested_offset": float(torch.tensor(state["nested_offset"]).bfloat16())}
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    edited = load_checkpoint(tmp_path / "q", dtype=torch.float32)
    assert_same_weights(edited, theirs_from(tmp_path / "q"))
    assert not torch.equal(edited.get_submodule(Q0.removesuffix(".weight")).dense_weight(),
                           ours.get_submodule(Q0.removesuffix(".weight")).dense_weight())


@pytest.mark.parametrize("family", ["llama", "qwen2", "tied"])
def test_transformers_loads_a_plain_checkpoint_of_ours(tmp_path: Path, family: str) -> None:
    config = {**WIDE, "model_type": "qwen2" if family == "qwen2" else "llama", "tie_word_embeddings": family == "tied",
              "architectures": ["Qwen2ForCausalLM" if family == "qwen2" else "LlamaForCausalLM"]}
    tensors = random_tensors(config, torch.float32)
    ours = load_checkpoint(write_folder(tmp_path / "a", config, tensors), quantize=None, dtype=torch.float32)
    (tmp_path / "b").mkdir()
    save_checkpoint(ours, tmp_path / "b", torch.float32, max_shard_bytes=300_000)
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    theirs, loading = theirs_from(tmp_path / "b", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    for name, tensor in tensors.items():
        assert_same(tensor, theirs.get_parameter(name).detach(), name)


def test_a_head_that_transformers_made_4_bit_is_saved_as_it_is(tmp_path: Path) -> None:
    write_folder(tmp_path / "dense", WIDE, random_tensors(WIDE))
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["o_proj"])
    theirs_from(tmp_path / "dense", quantization_config=how).save_pretrained(tmp_path / "theirs")
    ours = load_checkpoint(tmp_path / "theirs", dtype=torch.float32)
    assert isinstance(ours.lm_head, NF4Linear)
    save_quantized(ours, tmp_path / "ours")
    again = load_checkpoint(tmp_path / "ours", dtype=torch.float32)
    assert isinstance(again.lm_head, NF4Linear) and torch.equal(again(IDS), ours(IDS))
    save_checkpoint(ours, tmp_path / "plain")
    assert torch.equal(load_checkpoint(tmp_path / "plain", quantize=None, dtype=torch.float32).lm_head.weight,
                       ours.lm_head.dense_weight(torch.float32))
