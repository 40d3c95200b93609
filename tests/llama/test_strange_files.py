"""Files that a stranger may have made to do harm: what reading or fuzzing found, each ended with one line."""
from __future__ import annotations

import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.adapters import load_adapter, read_adapter_config
from minilora.errors import CheckpointError, MiniloraError
from minilora.llama import safetensors_file, strict_json
from minilora.llama.bnb_format import STATE, pending_nf4, read_nf4
from minilora.llama.charsmap import check_charsmap
from minilora.llama.config import LlamaConfig
from minilora.llama.safetensors_file import read_header
from minilora.llama.strict_json import parse_object, read_bytes
from minilora.llama.tokenizer import read_tokenizer
from minilora.llama.weights import WeightFiles
from minilora.quant.nf4 import quantize_nf4
from tests.llama.model_folders import CONFIG, Q0, random_tensors, refused, write_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import fuzz_inputs


def said(read: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000, text
    return text


# Any file


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG))
    if name != "config.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    refused(tmp_path, name)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no devices here")
def test_a_device_is_refused_and_not_read_for_ever(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG))
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    refused(tmp_path, "config.json")


def test_a_file_too_large_for_its_kind_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)          # takes no room on the disk
    assert "more than the 16,777,216" in said(lambda: LlamaConfig.from_json(path))
    assert "more than the 7" in said(lambda: read_bytes(path, 7))


def test_what_a_message_quotes_cannot_break_its_line_or_move_the_cursor() -> None:
    assert str(MiniloraError("a\nb \x1b[2J \u2028 \ud83d é")) == "a\\nb \\x1b[2J \\u2028 \\ud83d é"


def test_a_repeated_key_among_many_is_found_at_once() -> None:
    """Counting each key took a time that grew with the square of their number: an hour for these."""
    text = json.dumps({f"k{number}": 0 for number in range(300_000)})[:-1] + ', "k299999": 1}'
    assert "'k299999' stands twice" in said(lambda: parse_object(text.encode(), "index"))


# safetensors and index


def header(tmp_path: Path, tree: dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    text = json.dumps(tree).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("length", [(16 << 20) + 1, 1 << 40, (1 << 64) - 1])
def test_a_huge_header_is_refused_by_its_length(tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "safe_open", None)        # not even the library sees it
    assert f"{length:,} bytes" in said(lambda: read_header(header(tmp_path, {}, length=length)))


def entry(dtype: str = "F32", shape: tuple[int, ...] = (4,), start: int = 0, stop: int = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("tree", [
    {"a": entry(), "b": entry(start=8, stop=24)}, {"a": entry(shape=(5,))}, {"a": entry("F64")}, {"a": entry(stop=32)},
    {"a": entry(start=16, stop=0)}, {"a": entry(shape=(1 << 62, 4))}, {"a": entry("F3")}, {"a": entry(shape=(-4,))}, {"a": 1},
    {"a": entry() | {"dtype": {"F32": None}}},
    {"a" * 600: entry()}],
    ids=["overlap", "shape", "dtype", "past the end", "backwards", "overflow", "type", "negative", "no entry",
         "type as an object", "long name"])
def test_a_header_that_lies_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    assert "model.safetensors" in said(lambda: read_header(header(tmp_path, tree, b"\0" * 16)))


def test_a_name_with_a_line_break_stays_on_one_line(tmp_path: Path) -> None:
    refused(write_folder(tmp_path, CONFIG, {**random_tensors(CONFIG), "a\nb": torch.ones(1)}), "a\\nb")


@pytest.mark.parametrize("name", ["a" * 300, "\n", "a" * 255, "\ud83d"])
def test_a_shards_name_that_no_disk_has_is_refused(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), "safetensors shards")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {Q0: name}}))
    said(lambda: WeightFiles(tmp_path))


def test_a_tensors_name_too_long_to_quote_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), "safetensors shards")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a" * 5000: "x"}}))
    assert "5,000 characters" in said(lambda: WeightFiles(tmp_path))


# .bin


@pytest.mark.parametrize("number", range(len(fuzz_inputs.ODD)))
def test_what_torch_can_pickle_and_no_weight_may_be_is_refused_or_read_as_it_is(tmp_path: Path, number: int) -> None:
    odd = fuzz_inputs.ODD[number]
    torch.save({"odd": odd}, tmp_path / "pytorch_model.bin")
    plain = type(odd) in (Tensor, nn.Parameter) and odd.layout == torch.strided and odd.device.type == "cpu" and \
        not odd.is_nested and not odd.is_quantized and not odd.is_complex() and odd.numel() <= odd.untyped_storage().nbytes()
    if plain and odd.shape != (4, 4):       # which reads nine numbers as sixteen
        assert torch.equal(WeightFiles(tmp_path).read("odd").float(), odd.float())
    else:
        assert "pytorch_model.bin" in said(lambda: WeightFiles(tmp_path))


def test_a_terabyte_made_of_four_bytes_is_refused_before_it_is_made(tmp_path: Path) -> None:
    torch.save({"wide": torch.zeros(1).expand(1 << 38)}, tmp_path / "pytorch_model.bin")
    assert "more elements than the file has bytes for" in said(lambda: WeightFiles(tmp_path))


def test_a_compressed_record_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save(random_tensors(CONFIG), tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as whole, zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as bomb:
        for entry in whole.infolist():
            kind = zipfile.ZIP_DEFLATED if entry.filename.endswith("data.pkl") else zipfile.ZIP_STORED
            bomb.writestr(entry.filename, whole.read(entry), kind)
    assert "data.pkl' is compressed" in said(lambda: WeightFiles(tmp_path))


def test_a_zip_that_spans_disks_is_refused(tmp_path: Path) -> None:
    torch.save(random_tensors(CONFIG), tmp_path / "pytorch_model.bin")
    content = bytearray((tmp_path / "pytorch_model.bin").read_bytes())
    at = content.rindex(b"PK\x06\x07")                  # the locator of a zip64's directory
    content[at + 16:at + 20] = struct.pack("<I", 2)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in said(lambda: WeightFiles(tmp_path))


# Tokenizers


def sentencepiece(folder: Path, pieces: list[tuple[str, float, int]], table: bytes = b"") -> Path:
    parts = [fuzz_inputs._field(1, fuzz_inputs._field(1, text.encode()) + fuzz_inputs._field(2, score)
                                + fuzz_inputs._field(3, kind)) for text, score, kind in pieces]
    trainer = fuzz_inputs._field(3, 2) + fuzz_inputs._field(35, 1)
    path = folder / "tokenizer.model"
    path.write_bytes(b"".join([*parts, fuzz_inputs._field(2, trainer),
                               fuzz_inputs._field(3, fuzz_inputs._field(2, table))]))
    return path


@pytest.mark.parametrize(("piece", "words"), [
    (("new", float("nan"), 1), "score is no number"), (("new", float("-inf"), 1), "score is no number"),
    (("a" * 257, 0.0, 1), "more than 256 characters")])
def test_a_piece_that_no_model_has_is_refused(tmp_path: Path, piece: tuple[str, float, int], words: str) -> None:
    assert words in said(lambda: read_tokenizer(sentencepiece(tmp_path, [*fuzz_inputs.PIECES, piece])))


def test_a_table_of_replacements_is_followed(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(sentencepiece(tmp_path, fuzz_inputs.PIECES, fuzz_inputs.charsmap()))
    assert tokenizer.encode("aé") == tokenizer.encode("bce")


@pytest.mark.parametrize(("unit", "value"), [
    (0, 1 << 20), (256 ^ 0x61, 0x61 | 1 << 30), (512, 1 << 31 | 1), (512, 1 << 31 | 500), (256 ^ 0xC3, 0xC3 | 1 << 28)])
def test_a_table_of_replacements_that_leads_outside_is_refused(tmp_path: Path, unit: int, value: int) -> None:
    """The library would panic in the middle of a text that begins with "a" or "é"."""
    table = bytearray(fuzz_inputs.charsmap())
    struct.pack_into("<I", table, 4 + 4 * unit, value)
    text = said(lambda: read_tokenizer(sentencepiece(tmp_path, fuzz_inputs.PIECES, bytes(table))))
    assert "replacement" in text and "tokenizer.model" in text


@pytest.mark.parametrize("cut", [3, 500, 4098])
def test_a_table_of_replacements_cut_short_is_refused(cut: int) -> None:
    check_charsmap(fuzz_inputs.charsmap())
    with pytest.raises(ValueError, match="replacements"):
        check_charsmap(fuzz_inputs.charsmap()[:cut])


@pytest.mark.parametrize(("change", "words"), [
    ({"merges": [["a", "<unk>"]]}, "merge 0 is of what is not in the vocabulary"), ({"merges": [["a"]]}, "merge 0"),
    ({"merges": ["a b", "a  b"]}, "merge 1"), ({"unk_token": "\0"}, "unk_token '\\x00' is not in the vocabulary"),
    ({"unk_token": 7}, "unk_token 7"), ({"continuing_subword_prefix": "##"}, "prefixes or suffixes"),
    ({"vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 3}, "merges": []}, "two tokens of the vocabulary have the same")])
def test_a_tokenizer_that_the_library_would_panic_over_is_refused(
        tmp_path: Path, change: dict[str, Any], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    content = {**fuzz_inputs.TOKENIZER, "model": {**fuzz_inputs.TOKENIZER["model"], **change}}      # type: ignore[dict-item]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert words in said(lambda: read_tokenizer(tmp_path))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("spelled", ["a" * 3000, "\ud83d"])
def test_a_special_token_that_is_no_text_is_refused(tmp_path: Path, spelled: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(fuzz_inputs.TOKENIZER))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": spelled}))
    assert "bos_token" in said(lambda: read_tokenizer(tmp_path))


# Adapters


@pytest.mark.parametrize(("change", "words"), [
    ({"lora_alpha": 10 ** 400}, "adapter_config.json"), ({"peft_type": "x" * 5000}, "peft_type"),
    ({"bias": "y" * 5000}, "bias"), ({"r": 10 ** 12}, "has shape (2, 4), this model needs (1000000000000, 4)")])
def test_an_adapter_with_absurd_settings_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(fuzz_inputs.ADAPTER_CONFIG | change))
    (tmp_path / "adapter_model.safetensors").write_bytes(fuzz_inputs.LORA)
    layer = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 6)}),
                           "mlp": nn.ModuleDict({"up_proj": nn.Linear(4, 6)})})
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([layer])})})
    assert words in said(lambda: load_adapter(model, tmp_path))


def test_an_adapter_is_compared_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file may hold more than memory does."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(fuzz_inputs.ADAPTER_CONFIG))
    save_file({"base_model.model.wide": torch.zeros(10)}, tmp_path / "adapter_model.safetensors")
    monkeypatch.setattr("minilora.adapters.read_tensor", None)
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 6)})
    assert "lacks base_model.model.q_proj.lora_A.weight" in said(lambda: load_adapter(model, tmp_path))


def test_an_adapters_settings_are_small(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fuzz_inputs.ADAPTER_CONFIG, "more": ["q_proj"] * 200_000}))
    assert f"more than the {1 << 20:,}" in said(lambda: read_adapter_config(tmp_path))


# 4 bits


def four_bit(folder: Path, double_quant: bool = True) -> tuple[Path, dict[str, Tensor]]:
    weight = quantize_nf4(torch.randn(32, 40, generator=torch.Generator().manual_seed(0)), 64, double_quant)
    tensors = {pending.key: pending.make() for pending in pending_nf4("q_proj", weight)}
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors", tensors


def described(path: Path, **changes: Any) -> None:
    tensors = load_file(path)
    key = f"q_proj.weight{STATE}"
    state = json.loads(bytes(tensors[key].tolist())) | changes
    save_file({**tensors, key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}, path)


@pytest.mark.parametrize("changes", [
    {"blocksize": 10 ** 30}, {"blocksize": True}, {"blocksize": 0}, {"nested_blocksize": 1 << 40}, {"shape": [10 ** 30, 40]},
    {"shape": "32"}, {"shape": {"32": 40}}, {"dtype": ["float32"]}, {"dtype": "x" * 9000}, {"nested_offset": True},
    {"nested_offset": float("nan")}, {"quant_type": "fp4" * 3000}, {"padding": "x" * 70_000}],
    ids=lambda changes: str(changes)[:30])
def test_a_description_that_does_not_fit_its_weight_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path, _ = four_bit(tmp_path)
    described(path, **changes)
    assert "q_proj.weight" in said(lambda: read_nf4(WeightFiles(tmp_path), "q_proj", (32, 40)))


@pytest.mark.parametrize(("double_quant", "part"), [(True, ".nested_absmax"), (False, ".absmax")])
def test_constants_that_are_not_finite_are_refused(tmp_path: Path, double_quant: bool, part: str) -> None:
    path, tensors = four_bit(tmp_path, double_quant)
    tensors[f"q_proj.weight{part}"][0] = float("nan")
    save_file(tensors, path)
    assert f"{part}: holds NaN" in said(lambda: read_nf4(WeightFiles(tmp_path), "q_proj", (32, 40)))


def test_the_limits_leave_room_for_what_is_published() -> None:
    """Llama 3.1 405B in 4 bits: 126 blocks of 7 linears, 6 tensors each; tokenizers of 256,000 tokens."""
    index = 126 * 7 * 6 * 150
    assert index * 10 < strict_json.LARGEST_OBJECT and 10 * 35_000_000 > strict_json.LARGEST_FILE > 35_000_000
