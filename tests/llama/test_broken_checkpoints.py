"""Every folder that does not fit is refused in one line that names the file, the key and what to do."""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.errors import ConfigError
from minilora.llama.checkpoint import load_checkpoint
from tests.llama.model_folders import CONFIG, EMBED, HEAD, LAYOUTS, Q0, random_tensors, refused, write_folder


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
@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\\y", "a\0b", 7, None,
                                  ["x"]])
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


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{", b"[]", b"{}", b'{"weight_map": []}', b"[" * 100_000,
                                     b'{"weight_map": {"a": "b", "a": "c"}}'])
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
    tensors = {**random_tensors(CONFIG), Q0: torch.ones(32, 31)}
    refused(write_folder(tmp_path, CONFIG, tensors, layout), Q0, "(32, 31)", "(32, 32)")


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


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("name", [EMBED, HEAD, "model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_dense_weight_that_is_not_finite_is_named(tmp_path: Path, name: str, quantize: Any) -> None:
    tensors = random_tensors(CONFIG)
    tensors[name].view(-1)[5] = float("nan")
    refused(write_folder(tmp_path, CONFIG, tensors), name, "NaN", quantize=quantize)


def test_a_value_that_float16_cannot_hold_is_named_and_loads_in_bfloat16(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["model.norm.weight"][3] = 1e6
    refused(write_folder(tmp_path, CONFIG, tensors), "model.norm.weight", "too large for torch.float16", "bfloat16",
            dtype=torch.float16)
    assert load_checkpoint(tmp_path).model.norm.weight[3] == torch.tensor(1e6).bfloat16()


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
