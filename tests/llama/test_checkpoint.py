"""Model folders in every layout load to the same weights, and every broken one is refused in one line."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError
from minilora.layers.nf4_linear import NF4Linear
from minilora.llama.checkpoint import load_checkpoint, save_checkpoint
from minilora.llama.safetensors_file import Pending, write_safetensors
from minilora.quant.nf4 import quantize_nf4

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 48, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
           "mlp.down_proj")
EMBED, HEAD, Q0 = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
LAYOUTS = ("safetensors", "safetensors shards", "bin", "bin shards")


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Weights by Hugging Face's names, in the order a model has them."""
    h, i, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    sizes = dict(zip(LINEARS, ((h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i))))
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
    assert {name for name in layers} == {f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS}
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


def cut(folder: Path, name: str, keep: float = 0.5) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:int(len(content) * keep)])


def edit_index(folder: Path, kind: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = next(folder.glob(f"*.{kind}.index.json"))
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_short_is_named(tmp_path: Path, layout: str, keep: float) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), layout)
    name = next(path.name for path in sorted(tmp_path.iterdir()) if path.suffix in (".bin", ".safetensors"))
    cut(tmp_path, name, keep)
    refused(tmp_path, name)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_shard_missing_from_disk_is_named_with_its_index(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), f"{kind} shards")
    shard = next(tmp_path.glob(f"*-00002-of-00002.{kind}"))
    shard.unlink()
    refused(tmp_path, shard.name, f"{kind}.index.json")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_shard_missing_from_the_index_is_told_by_its_tensors(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), f"{kind} shards")
    edit_index(tmp_path, kind, lambda m: [m.pop(key) for key in list(m) if "00001-of" in m[key]])
    refused(tmp_path, "missing", f"{kind}.index.json")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\\y", "a\0b", 7, None, ["x"]])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, kind: str, name: Any) -> None:
    write_folder(tmp_path / "m", CONFIG, random_tensors(CONFIG), f"{kind} shards")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    edit_index(tmp_path / "m", kind, lambda m: m.update({Q0: name}))
    refused(tmp_path / "m", "plain file name", f"{kind}.index.json")


def test_a_tensor_that_is_not_where_the_index_says_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), "safetensors shards")
    edit_index(tmp_path, "safetensors", lambda m: m.update({EMBED: m[Q0]}) if m[EMBED] != m[Q0] else m.update({EMBED: m[HEAD]}))
    refused(tmp_path, EMBED, "index.json")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    write_folder(tmp_path, CONFIG, tensors, "safetensors shards")
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), EMBED: tensors[EMBED]}, second)
    refused(tmp_path, EMBED, "00001-of-00002", "00002-of-00002")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": "b", "a": "c"}}',
                                     b"[" * 100_000])
def test_a_garbage_index_is_named(tmp_path: Path, content: bytes) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), "safetensors shards")
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    refused(tmp_path, "model.safetensors.index.json")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{", b"[]", b"{}"])
def test_a_garbage_config_is_named(tmp_path: Path, content: bytes) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG))
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, "config.json")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads"])
def test_a_config_without_a_needed_key_names_it(tmp_path: Path, key: str) -> None:
    write_folder(tmp_path, {k: v for k, v in CONFIG.items() if k != key}, random_tensors(CONFIG))
    refused(tmp_path, "config.json", key)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_shape_names_key_expected_and_found(tmp_path: Path, layout: str) -> None:
    refused(write_folder(tmp_path, CONFIG, {**random_tensors(CONFIG), Q0: torch.ones(32, 31)}, layout), Q0, "(32, 31)", "(32, 32)")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_tensor_is_named_with_its_shape(tmp_path: Path, layout: str) -> None:
    tensors = random_tensors(CONFIG)
    del tensors[Q0]
    refused(write_folder(tmp_path, CONFIG, tensors, layout), Q0, "missing", "(32, 32)")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unexpected_tensor_is_named(tmp_path: Path, layout: str) -> None:
    extra = "model.layers.0.self_attn.q_proj.bias"
    refused(write_folder(tmp_path, CONFIG, {**random_tensors(CONFIG), extra: torch.ones(32)}, layout), extra, "unexpected")


def test_whole_number_weights_are_refused(tmp_path: Path) -> None:
    refused(write_folder(tmp_path, CONFIG, {**random_tensors(CONFIG), Q0: torch.ones(32, 32, dtype=torch.int8)}), Q0, "I8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    tensors = random_tensors(CONFIG)
    tensors[Q0][3, 4] = value
    refused(write_folder(tmp_path, CONFIG, tensors), Q0, "model.safetensors")


class Malicious:
    """Unpickled the careless way, it would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(tmp_path: Path, new_format: bool) -> None:
    tensors: dict[str, Any] = {**random_tensors(CONFIG), "evil": Malicious(str(tmp_path / "owned"))}
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), "bin")
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    refused(tmp_path, "pytorch_model.bin", "system", "safetensors")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [{"state_dict": {Q0: torch.ones(2)}}, [torch.ones(2)], {Q0: 3}])
def test_a_bin_file_of_another_form_is_refused(tmp_path: Path, content: Any) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), "bin")
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "flat dictionary")


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


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", CONFIG, random_tensors(CONFIG), "safetensors shards")
    shard = tmp_path / "m" / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to("../elsewhere.safetensors")
    refused(tmp_path / "m", shard.name, "link")


def test_folders_that_hold_no_model_say_what_they_lack(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, "no weights")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    refused(tmp_path, "model.safetensors.index.json")


@pytest.mark.parametrize("found", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"load_in_8bit": True},
                                   {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "x"])
def test_other_quantization_methods_are_refused(tmp_path: Path, found: Any) -> None:
    refused(write_folder(tmp_path, {**CONFIG, "quantization_config": found}, random_tensors(CONFIG)), "config.json", "quantiz")


def test_quantize_takes_nf4_or_none_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nf4"):
        load_checkpoint(tmp_path, quantize="int8")       # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 9_000, 1])
def test_a_saved_checkpoint_loads_the_same(tmp_path: Path, tied: bool, max_shard_bytes: int) -> None:
    config = {**CONFIG, "tie_word_embeddings": tied}
    tensors = random_tensors(config)
    model = load_checkpoint(write_folder(tmp_path / "a", config, tensors), quantize=None)
    (tmp_path / "b").mkdir()
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


def test_a_4_bit_model_is_saved_dequantized(tmp_path: Path) -> None:
    model = load_checkpoint(write_folder(tmp_path, CONFIG, random_tensors(CONFIG)))
    (tmp_path / "dense").mkdir()
    save_checkpoint(model, tmp_path / "dense", torch.float32)
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert_same(model.model.layers[0].self_attn.q_proj.dense_weight(torch.float32), stored[Q0], Q0)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_streamed_safetensors_equal_the_librarys(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3, dtype=torch.uint8), "é": torch.randn(2, 3), "a": torch.randn(5).half(), "z": torch.zeros(0, 4)}
    write_safetensors(tmp_path / "x.safetensors", [Pending(k, v.dtype, tuple(v.shape), lambda v=v: v) for k, v in tensors.items()])
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
def test_peak_memory_is_the_result_and_one_tensor(tmp_path: Path, layout: str) -> None:
    big = {**CONFIG, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 24, "vocab_size": 64}
    tensors = random_tensors(big)
    size = sum(tensor.nbytes for tensor in tensors.values())
    small = write_folder(tmp_path / "small", {**big, "num_hidden_layers": 1}, {k: v for k, v in tensors.items()
                                                                               if ".layers." not in k or ".layers.0." in k}, layout)
    write_folder(tmp_path / "big", big, tensors, layout)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", PEAK, str(small), str(tmp_path / "big")], env=environment, capture_output=True,
                         text=True, check=True)
    grown = int(run.stdout.split()[-1])
    result = size * 4.127 / 16
    assert grown < result + 0.15 * size, f"loading {size / 1e6:.0f} MB took {grown / 1e6:.0f} MB; the 4-bit model is {result / 1e6:.0f}"
