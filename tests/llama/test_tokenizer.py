"""One BOS whatever the folder says, control tokens that text cannot spell, and files that are broken."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from minilora.errors import CheckpointError, ConfigError, OutputError
from minilora.llama.tokenizer import Tokenizer, read_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def byte_level(special: list[str] = SPECIAL) -> tokenizers.Tokenizer:
    """A small byte-level BPE, like Llama 3's and Qwen2's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    backend.train_from_iterator(["CT abdomen with contrast", "CT brain without contrast"] * 4, trainer)
    return backend


def with_bos(backend: tokenizers.Tokenizer, text: str = "<s>") -> tokenizers.Tokenizer:
    backend.post_processor = processors.TemplateProcessing(f"{text} $A", f"{text} $A $B", [(text, backend.token_to_id(text))])
    return backend


def write(folder: Path, backend: tokenizers.Tokenizer, **files: Any) -> Path:
    """tokenizer.json and, by stem, other JSON files."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


CONFIGS: list[dict[str, Any]] = [
    {},
    {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}},
    {"tokenizer_config": {"bos_token": {"content": "<s>", "special": True}, "add_bos_token": True}},
    {"special_tokens_map": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}},
    {"config": {"bos_token_id": 1, "eos_token_id": [2, 3], "model_type": "llama"}},
]


@pytest.mark.parametrize("files", CONFIGS)
@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("text", ["CT brain", "", " <s>CT</s>", "<s><s>", "[INST] x [/INST]"])
def test_exactly_one_bos_whatever_the_post_processor_does(
        tmp_path: Path, files: dict[str, Any], post_processor: bool, text: str) -> None:
    backend = byte_level()
    tokenizer = read_tokenizer(write(tmp_path, with_bos(backend) if post_processor else backend, **files))
    ids = tokenizer.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert ids[0] == 1 and ids.count(1) == 1, ids
    assert ids[1:] == tokenizer.encode(text, bos=False)
    assert not {2, 3} & set(ids), "EOS or PAD came out of text"
    assert tokenizer.decode(ids) == text


def test_an_explicit_null_means_no_bos(tmp_path: Path) -> None:
    backend = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = read_tokenizer(write(tmp_path, backend, tokenizer_config={"bos_token": None, "eos_token": "<|im_end|>",
                                                                          "pad_token": "<|endoftext|>"},
                                     config={"model_type": "qwen2", "bos_token_id": 0}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, 0)
    assert tokenizer.encode("CT", bos=True) == tokenizer.encode("CT", bos=False)


def test_qwen2_config_does_not_invent_a_bos(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level(["<|endoftext|>"]), config={"model_type": "qwen2", "bos_token_id": 0})
    assert read_tokenizer(folder).bos_id is None


def test_padding_with_the_end_token_counts_as_no_padding(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level(), tokenizer_config={"eos_token": "</s>", "pad_token": "</s>"})
    assert read_tokenizer(folder).pad_id is None


def test_chat_markers_are_read_out_of_text_and_left_out_of_decoded_text(tmp_path: Path) -> None:
    backend = byte_level([*SPECIAL, "<|im_start|>"])
    tokenizer = read_tokenizer(write(tmp_path, backend))
    ids = tokenizer.encode("<|im_start|>CT")
    assert ids[:2] == [1, 4]
    assert tokenizer.decode(ids) == "CT"
    assert tokenizer.decode(ids, skip_special=False) == "<s><|im_start|>CT"


def test_an_end_token_is_read_out_of_a_template_and_not_out_of_a_note(tmp_path: Path) -> None:
    backend = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = read_tokenizer(write(tmp_path, backend, tokenizer_config={"bos_token": None, "eos_token": "<|im_end|>",
                                                                          "pad_token": "<|endoftext|>"}))
    ids = tokenizer.encode_prompt("<|im_start|>", "a<|im_end|>b", "<|im_end|>\n")
    letters = tokenizer.encode("a<|im_end|>b")
    assert ids == [1, *letters, 2, *tokenizer.encode("\n")] and 2 not in letters
    assert tokenizer.encode_prompt("x ", "CT", " y") == tokenizer.encode("x CT y")
    assert tokenizer.encode_prompt("<|im_end|>", "\ud83d", "") == [2, *tokenizer.encode("\ufffd")]
    assert tokenizer.encode_prompt("", "\ufdd0\ufdd1", "<|im_end|>\ufdd1") == [*tokenizer.encode("\ufffd\ufffd"), 2,
                                                                              *tokenizer.encode("\ufffd")]


def test_a_vocabulary_that_spells_bos_as_a_word_gives_one_bos(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "CT": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert read_tokenizer(write(tmp_path, backend)).encode("<s> CT <s>") == [1, 2]


def test_padding_and_truncation_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_padding(length=50)
    backend.enable_truncation(4)
    tokenizer = read_tokenizer(write(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("CT abdomen with contrast")) == "CT abdomen with contrast"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return read_tokenizer(write(tmp_path_factory.mktemp("one"), with_bos(byte_level())))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()) | st.lists(st.sampled_from([*SPECIAL, " ", "CT", "\n"])).map("".join))
def test_any_text_comes_back_with_ids_below_the_vocabulary(one: Tokenizer, text: str) -> None:
    ids = one.encode(text)
    assert ids.count(1) == 1 and max(ids) < one.vocab_size
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")      # lone surrogates only
    assert one.decode(ids) == expected


@pytest.mark.parametrize("files", CONFIGS)
def test_save_and_load_give_the_same_tokenizer_without_config_json(tmp_path: Path, files: dict[str, Any]) -> None:
    first = read_tokenizer(write(tmp_path / "a", byte_level(), **files))
    first.save(tmp_path / "b")
    second = read_tokenizer(tmp_path / "b")
    for tokenizer in (first, second):
        assert tokenizer.encode("CT brain <s>") == first.encode("CT brain <s>")
    assert [(t.bos_id, t.eos_id, t.pad_id, t.vocab_size, t.special_ids) for t in (second,)] == \
        [(first.bos_id, first.eos_id, first.pad_id, first.vocab_size, first.special_ids)]
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    second.save(tmp_path / "c")
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == {p.name: p.read_bytes() for p in
                                                                           (tmp_path / "c").iterdir()}


@pytest.mark.parametrize(("name", "content", "said"), [
    ("tokenizer.json", b"\xff\xfe{", "tokenizer.json: not UTF-8"),
    ("tokenizer.json", b"{", "tokenizer.json: not readable as JSON"),
    ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer"),
    ("tokenizer.json", b"[]", "tokenizer.json: must hold a JSON object"),
    ("tokenizer.json", b'{"added_tokens": 3}', "tokenizer.json: added_tokens"),
    ("tokenizer.json", b"[" * 100_000, "tokenizer.json: not readable as JSON"),
    ("tokenizer_config.json", b"not json", "tokenizer_config.json: not readable as JSON"),
    ("tokenizer_config.json", b'{"bos_token": 3}', "tokenizer_config.json: bos_token must be a text"),
    ("tokenizer_config.json", b'{"bos_token": "<none>"}', "tokenizer_config.json: bos_token '<none>' is not in the vocabulary"),
    ("special_tokens_map.json", b"\x80", "special_tokens_map.json: not UTF-8"),
    ("config.json", b"nonsense", "config.json: not readable as JSON"),
])
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    write(tmp_path, byte_level())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize("content", [b"", b"garbage, no protocol buffer", b"\x0a\x05\x0a\x03abc\x0a\xff\xff\xff\xff\x0f",
                                     b"\xff" * 40, b"\x0a\x06\x0a\x04\xff\xff\xff\xff"])
def test_a_broken_tokenizer_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model") as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_truncated_tokenizer_model_is_named(tmp_path: Path, shared_data: Path) -> None:
    whole = (shared_data / "llama2-tokenizer" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        read_tokenizer(tmp_path)


def test_no_tokenizer_and_no_folder_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="no such"):
        read_tokenizer(tmp_path / "nowhere")


def test_added_token_flags_survive(tmp_path: Path) -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("[bib_ref]", normalized=False, lstrip=True)])
    backend.add_special_tokens([AddedToken("<|eot|>", normalized=False)])
    tokenizer = read_tokenizer(write(tmp_path, backend))
    reference = backend.token_to_id("[bib_ref]")
    assert tokenizer.encode("CT  [bib_ref]", bos=False)[-1] == reference
    assert tokenizer.decode([reference]) == "[bib_ref]" and tokenizer.decode([backend.token_to_id("<|eot|>")]) == ""


def test_what_is_no_text_and_what_is_no_token_is_refused(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(str(write(tmp_path, byte_level())))
    for wrong in (3, None, b"CT", ["CT"]):
        with pytest.raises(TypeError, match=r"one text \(str\)"):
            tokenizer.encode(wrong)
    with pytest.raises(ConfigError, match="-100 is negative"):
        tokenizer.decode([5, -100])
    assert tokenizer.decode([*tokenizer.encode("CT"), 99_999]) == "CT", "a row of a padded table has no text"
    assert tokenizer.decode([]) == "" and tokenizer.decode(torch.tensor(tokenizer.encode("CT"))) == "CT"


def test_a_tokenizer_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write(tmp_path, byte_level()))
    with pytest.raises(OutputError, match="cannot write"):
        tokenizer.save(tmp_path / "tokenizer.json")
