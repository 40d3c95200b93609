"""Model folders in every layout load to the same weights, streamed, and saved ones load again."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minilora.layers.lora import LoRAConfig
from minilora.layers.merge import merge_lora
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import add_lora
from minilora.llama.bnb_format import save_quantized
from minilora.llama.checkpoint import load_checkpoint, save_checkpoint
from minilora.llama.safetensors_file import Pending, write_safetensors
from minilora.quant.nf4 import quantize_nf4
from tests.llama.model_folders import (
    CONFIG,
    EMBED,
    HEAD,
    LAYOUTS,
    LINEARS,
    Q0,
    assert_same,
    random_tensors,
    refused,
    write_folder,
)

IDS = torch.tensor([[1, 9, 30]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_layout_loads_the_weights_of_the_file(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    tensors = random_tensors(CONFIG, dtype)
    model = load_checkpoint(write_folder(tmp_path, CONFIG, tensors, layout), quantize=None, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(tensor.float(), parameters[name].detach(), name)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model(torch.tensor([[1, 5, 7]])).isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_block_linears_and_nothing_else_are_quantized(tmp_path: Path, layout: str, double_quant: bool) -> None:
    tensors = random_tensors(CONFIG, torch.float32)
    model = load_checkpoint(write_folder(tmp_path, CONFIG, tensors, layout), double_quant=double_quant, blocksize=32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert set(layers) == {f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS}
    for name, layer in layers.items():
        expected = quantize_nf4(tensors[f"{name}.weight"], 32, double_quant)
        assert_same(expected.packed, layer.quantized.packed, name)
        assert_same(expected.absmax, layer.quantized.absmax, name)
        assert (layer.quantized.nested is not None) == double_quant and layer.quantized.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert_same(tensors[name].bfloat16(), parameter.detach(), name)
    assert isinstance(model.lm_head, nn.Linear) and model.dtype == torch.bfloat16


def test_qwen2_biases_come_with_quantized_and_dense_linears(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    tensors = random_tensors(config, torch.float32)
    folder = write_folder(tmp_path, config, tensors)
    for quantize in ("nf4", None):
        model = load_checkpoint(folder, quantize=quantize, dtype=torch.float32)      # type: ignore[arg-type]
        for name in (name for name in tensors if name.endswith(".bias")):
            assert_same(tensors[name], model.get_parameter(name).detach(), name)


def test_safetensors_are_preferred_where_both_uploads_exist(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG, seed=1), "bin shards")
    tensors = random_tensors(CONFIG, seed=2)
    model = load_checkpoint(write_folder(tmp_path, CONFIG, tensors, "safetensors shards"), quantize=None)
    assert_same(tensors[EMBED], model.get_parameter(EMBED).detach(), EMBED)


def test_old_bin_files_of_the_format_before_zip_load(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    write_folder(tmp_path, CONFIG, tensors, "bin")
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(tensors[Q0], load_checkpoint(tmp_path, quantize=None).get_parameter(Q0).detach(), Q0)


def test_bin_tensors_that_are_views_load(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    write_folder(tmp_path, CONFIG, tensors, "bin")
    torch.save({**tensors, Q0: torch.cat([tensors[Q0], tensors[Q0]]).t()[:, 32:].t()}, tmp_path / "pytorch_model.bin")
    for quantize in ("nf4", None):
        model = load_checkpoint(tmp_path, quantize=quantize)        # type: ignore[arg-type]
        layer = model.model.layers[0].self_attn.q_proj
        assert_same((quantize_nf4(tensors[Q0]).dequantize() if quantize else tensors[Q0]),
                    layer.dense_weight() if quantize else layer.weight.detach(), Q0)


@pytest.mark.parametrize("present", ["embedding", "head", "both"])
def test_tied_heads_may_be_stored_under_either_name(tmp_path: Path, present: str) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    table = tensors[EMBED]
    if present != "embedding":
        tensors[HEAD] = table.clone()
    if present == "head":
        del tensors[EMBED]
    model = load_checkpoint(write_folder(tmp_path, config, tensors), quantize=None)
    assert_same(table, model.get_parameter(EMBED).detach(), EMBED)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    refused(write_folder(tmp_path, config, {**tensors, HEAD: tensors[EMBED] + 1}), "lm_head.weight", "tie_word_embeddings")


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    load_checkpoint(write_folder(tmp_path, CONFIG, {**random_tensors(CONFIG), **extra}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_missing_vocabulary_rows_are_refused_or_padded_with_the_mean(tmp_path: Path, layout: str, tied: bool) -> None:
    config = {**CONFIG, "tie_word_embeddings": tied}
    tensors = random_tensors(config, torch.float32)
    folder = write_folder(tmp_path, {**config, "vocab_size": 51}, tensors, layout)
    refused(folder, "48 rows", "vocab_size 51", "--pad-vocab", "weight")
    model = load_checkpoint(folder, quantize=None, dtype=torch.float32, pad_vocab=True)
    for name in (EMBED,) if tied else (EMBED, HEAD):
        table = model.get_parameter(name).detach()
        assert_same(tensors[name], table[:48], name)
        assert_same(tensors[name].mean(0).expand(3, -1), table[48:], name)
    assert model(torch.tensor([[1, 50]])).shape[-1] == 51


def test_more_rows_than_config_says_are_refused(tmp_path: Path) -> None:
    refused(write_folder(tmp_path, {**CONFIG, "vocab_size": 40}, random_tensors(CONFIG)), EMBED, "(48, 32)", "(40, 32)",
            pad_vocab=True)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    write_folder(snapshot, CONFIG, tensors, "safetensors shards")
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / f"{number:040x}")
        file.symlink_to(f"../../blobs/{number:040x}")
    assert_same(tensors[EMBED], load_checkpoint(snapshot, quantize=None).get_parameter(EMBED).detach(), EMBED)
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    load_checkpoint(linked)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 9_000, 1])
def test_a_saved_checkpoint_loads_the_same(tmp_path: Path, tied: bool, max_shard_bytes: int) -> None:
    config = {**CONFIG, "tie_word_embeddings": tied}
    tensors = random_tensors(config)
    model = load_checkpoint(write_folder(tmp_path / "a", config, tensors), quantize=None)
    save_checkpoint(model, tmp_path / "b", torch.float32, 1 if max_shard_bytes > 10_000 else 5_000_000_000)    # to be replaced
    for shard in (tmp_path / "b").glob("model-*"):
        shard.unlink()
    save_checkpoint(model, tmp_path / "b", torch.bfloat16, max_shard_bytes)
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes < 10_000) == (tmp_path / "b" / "model.safetensors.index.json").exists()
    stored = {key: value for file in files for key, value in load_file(file).items()}
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(tensor, stored[name], name)
    again = load_checkpoint(tmp_path / "b", quantize=None)
    ids = torch.tensor([[1, 9, 30]])
    assert_same(model(ids), again(ids), "logits")


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_a_tied_head_that_was_adapted_is_saved_as_its_own(tmp_path: Path, quantize: Any) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    model = load_checkpoint(write_folder(tmp_path / "a", config, random_tensors(config)), quantize, dtype=torch.float32)
    add_lora(model, LoRAConfig(r=2, target_modules=("lm_head",)))
    torch.nn.init.normal_(model.lm_head.lora_B.weight)
    expected, embedding = model(IDS), model.model.embed_tokens.weight.detach().clone()
    merge_lora(model)
    (save_checkpoint if quantize is None else save_quantized)(model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False
    again = load_checkpoint(tmp_path / "b", quantize, dtype=torch.float32)
    torch.testing.assert_close(again(IDS), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(again.model.embed_tokens.weight, embedding)


def test_a_4_bit_model_is_saved_dequantized(tmp_path: Path) -> None:
    model = load_checkpoint(write_folder(tmp_path, CONFIG, random_tensors(CONFIG)))
    save_checkpoint(model, tmp_path / "dense", torch.float32)
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert_same(model.model.layers[0].self_attn.q_proj.dense_weight(torch.float32), stored[Q0], Q0)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_streamed_safetensors_equal_the_librarys(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3, dtype=torch.uint8), "é": torch.randn(2, 3), "a": torch.randn(5).half(),
               "z": torch.zeros(0, 4)}
    pending = [Pending(key, value.dtype, tuple(value.shape), value.detach) for key, value in tensors.items()]
    write_safetensors(tmp_path / "x.safetensors", pending)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert_same(tensor, found[key], key)


PEAK = """
import re, sys, torch
from minilora.llama.checkpoint import load_checkpoint
torch.set_num_threads(1)
# Not getrusage: its ru_maxrss starts at the parent's.
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
load_checkpoint(sys.argv[1])                  # a small folder first: libraries, kernels and thread pools take their memory
before = peak()
model = load_checkpoint(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_peak_memory_is_the_result_and_two_tensors(tmp_path: Path, layout: str) -> None:
    big = {**CONFIG, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 24, "vocab_size": 64}
    tensors = random_tensors(big)
    size = sum(tensor.nbytes for tensor in tensors.values())
    first = {key: value for key, value in tensors.items() if ".layers." not in key or ".layers.0." in key}
    small = write_folder(tmp_path / "small", {**big, "num_hidden_layers": 1}, first, layout)
    write_folder(tmp_path / "big", big, tensors, layout)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", PEAK, str(small), str(tmp_path / "big")], env=environment, capture_output=True,
                         text=True, check=True)
    grown = int(run.stdout.split()[-1])
    result = size * 4.127 / 16
    assert grown < result + 0.4 * size, (f"loading {size / 1e6:.0f} MB took {grown / 1e6:.0f} MB; the 4-bit model is "
                                          f"{result / 1e6:.0f} MB")
