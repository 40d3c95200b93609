"""Added tokens behind a tokenizer.model: a text is cut around them as transformers' LlamaTokenizer cuts it."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.errors import CheckpointError
from minilora.llama.sentencepiece import merges_of, read_sentencepiece
from minilora.llama.tokenizer import Tokenizer, read_tokenizer

transformers = pytest.importorskip("transformers", reason="install the [peers] extra")
sentencepiece = pytest.importorskip("sentencepiece", reason="install the [peers] extra")

ADDED = ["<CLS>", "<PAD>", "[bib]", "[table]", "<|im_start|>"]
TEXTS = ["[bib]y", "[table]\nz", "<CLS>x", "[bib][table]q", "\n[bib]y", "a[bib]", "a [bib] b", "[bib] y", " [bib]y", "▁[bib]y",
         "[bib]", "", "x", "  x", "▁x", "<|im_start|>question\nCT  brain?<|im_start|>answer\n"]
JOINED = st.lists(st.sampled_from([*ADDED[2:], "CT", " ", "  ", "▁", "\n", "y", "é", "."]), max_size=12).map("".join)

Both = tuple[Tokenizer, tokenizers.Tokenizer]       # ours and transformers'


def write(folder: Path, shared_data: Path, **config: Any) -> Path:
    """Llama 2's tokenizer.model, and added tokens in tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    shutil.copy(shared_data / "llama2-tokenizer" / "tokenizer.model", folder)
    tokens = {**dict(enumerate(("<unk>", "<s>", "</s>"))), **dict(enumerate(ADDED, 32000))}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<PAD>",
        "added_tokens_decoder": {str(number): {"content": text, "special": text.startswith("<"), "normalized": False}
                                 for number, text in tokens.items()}, **config}))
    return folder


def peer_of(folder: Path) -> tokenizers.Tokenizer:
    """transformers' tokenizer, its merges in the order of the pieces' scores.

    Trap: transformers 5 takes them in the order of the vocabulary, and so cuts "\n  y" otherwise than SentencePiece does.
    """
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    content = json.loads(peer.backend_tokenizer.to_str())
    content["model"]["merges"] = merges_of(read_sentencepiece(folder / "tokenizer.model").pieces)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="module", ids=str, params=[
    {"legacy": True}, {"legacy": False}, {"legacy": False, "add_prefix_space": False}])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Both:
    folder = write(tmp_path_factory.mktemp("model"), shared_data, **request.param)
    return read_tokenizer(folder), peer_of(folder)


def assert_equal(both: Both, text: str) -> None:
    ours, theirs = both
    expected, found = theirs.encode(text, add_special_tokens=False).ids, ours.encode(text, bos=False)
    assert found == expected, f"{text!r}: {[ours.token(i) for i in found]}, expected {[ours.token(i) for i in expected]}"


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers_where_the_folder_says_legacy(both: Both, text: str) -> None:
    assert_equal(both, text)


def test_ids_equal_transformers_as_it_is_where_no_spaces_run_together(tmp_path: Path, shared_data: Path) -> None:
    folder = write(tmp_path, shared_data, legacy=False)
    ours, theirs = read_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.encode("[bib]y", bos=False) == [32002, 29891]
    for text in TEXTS:
        if "  " not in text:
            assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False), repr(text)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(text=JOINED | st.text(max_size=30))
def test_ids_equal_transformers_on_any_text_where_the_folder_says_legacy(both: Both, text: str) -> None:
    assert_equal(both, text)


@pytest.mark.parametrize("config", [{}, {"legacy": None}])
def test_a_folder_that_does_not_say_legacy_is_cut_as_by_transformers_and_begins_as_in_sentencepiece(
        tmp_path: Path, shared_data: Path, config: dict[str, Any]) -> None:
    folder = write(tmp_path, shared_data, **config)
    ours, theirs = read_tokenizer(folder), peer_of(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in TEXTS:
        if not text.startswith((" ", "▁")):
            assert_equal((ours, theirs), text)
    for text in ("x", " x", "▁x", "  CT\nbrain ", ""):
        assert ours.encode(text, bos=False) == pieces.encode(text)


def test_a_copy_of_the_folder_cuts_alike(tmp_path: Path, shared_data: Path) -> None:
    first = read_tokenizer(write(tmp_path / "a", shared_data, legacy=False))
    first.save(tmp_path / "b")
    second = read_tokenizer(tmp_path / "b")
    assert [second.encode(text) for text in TEXTS] == [first.encode(text) for text in TEXTS]
    assert first.decode(first.encode("a[bib]y")) == "a[bib]y"


@pytest.mark.parametrize("key", ["legacy", "add_prefix_space"])
def test_a_setting_that_is_neither_true_nor_false_is_refused(tmp_path: Path, shared_data: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json: {key} must be true or false, not 'no'"):
        read_tokenizer(write(tmp_path, shared_data, **{key: "no"}))
