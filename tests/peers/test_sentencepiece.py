"""A tokenizer.model read by us gives the ids of the sentencepiece library, on the real Llama 2 file and hard strings."""
from __future__ import annotations

import json
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.errors import CheckpointError
from minilora.llama.sentencepiece import merges_of, read_sentencepiece
from minilora.llama.tokenizer import Tokenizer, read_tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="install the [peers] extra")

MEDITRON_TOKENS = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "[bib_ref]", "[/bib_ref]", "[fig_ref]", "[/fig_ref]", "[bib]",
                   "[/bib]", "[fig]", "[/fig]", "[table]", "[/table]", "[formula]", "[/formula]"]
HAND_WRITTEN = [
    "", " ", "  ", "   x", "x   ", "\n", "\n\n\n", " \n ", "\t", "\r\n", "\x00", "a\x00b", "\x07\x1b[0m", "\u00a0", "\u3000x",
    "▁", "▁▁", " ▁ x", "x▁y", "<s>", "</s>", "<unk>", " <s> </s>", "<0x0A>", "<0xZZ>", "0", "00", "1234567890", "3.14159",
    "1,000,000",
    "é", "e\u0301", "Å", "A\u030a", "ﬁ", "①", "½", "\u200b", "\u200d", "\u202e abc", "\ufeff", "\ufffd", "\u0378", "\U000e0001",
    "\U0010ffff", "\U0001f600", "👩\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈",
    "日本語のテキスト", "한국어", "العربية", "עברית", "हिन्दी", "ไทย",
    "Привет, мир", "Ω≈ç√∫", "a" * 500, "ab" * 300, " " * 257, "\n" * 100, "▁" * 65, "-" * 99, "." * 64, "=" * 130, "1" * 33,
    "CT Abdomen W/O Contrast", "r/o PE, s/p lap chole; eGFR<30", "History: heart failure; Diagnosis: c/f liver laceration",
    "[INST] note [/INST]", "import os\n\n\ndef f(x):\n\treturn x  # ok", "https://example.org/?q=a&b=%20",
]


def generated(pieces: list[str], count: int) -> list[str]:
    """Hard strings by seed: repeats, glued pieces, small alphabets, any code point, and both normal forms."""
    rng = random.Random(0)
    texts = []
    for number in range(count):
        kind = number % 5
        if kind == 0:
            text = rng.choice(pieces) * rng.randint(1, 30)
        elif kind == 1:
            text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 15)))
        elif kind == 2:
            alphabet = rng.choice(pieces) + rng.choice(pieces)
            text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60)))
        elif kind == 3:
            points = [rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(rng.randint(1, 20))]
            text = "".join(map(chr, points))
        else:
            form = rng.choice(("NFC", "NFD", "NFKD"))
            text = unicodedata.normalize(form, "".join(rng.choice("éàüñçÅệ ﬁ한") for _ in range(rng.randint(1, 20))))
        texts.append(text)
    return texts


@pytest.fixture(scope="module")
def model_file(shared_data: Path) -> Path:
    return shared_data / "llama2-tokenizer" / "tokenizer.model"


@pytest.fixture(scope="module")
def theirs(model_file: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file))


@pytest.fixture(scope="module")
def ours(model_file: Path) -> Tokenizer:
    return read_tokenizer(model_file)


def assert_equal(ours: Tokenizer, theirs: Any, text: str) -> None:
    expected, found = theirs.encode(text), ours.encode(text, bos=False)
    pairs = enumerate(zip(expected, found, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    assert expected == found, f"{text[:60]!r}: token {first} is {found[first:first + 3]}, expected {expected[first:first + 3]}"
    assert ours.encode(text) == [theirs.bos_id(), *expected]
    assert ours.decode(found) == theirs.decode(expected), f"{text[:60]!r} decodes differently"


def test_what_the_file_says_equals_sentencepiece(model_file: Path, ours: Tokenizer, theirs: Any) -> None:
    model = read_sentencepiece(model_file)
    assert [piece.text for piece in model.pieces] == [theirs.id_to_piece(i) for i in range(theirs.get_piece_size())]
    assert [piece.score for piece in model.pieces] == [theirs.get_score(i) for i in range(theirs.get_piece_size())]
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_id(), theirs.eos_id(), None)
    assert ours.vocab_size == theirs.get_piece_size() == 32000


@pytest.mark.parametrize("text", HAND_WRITTEN, ids=range(len(HAND_WRITTEN)))
def test_ids_equal_sentencepiece_on_hand_written_strings(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert_equal(ours, theirs, text)


def test_ids_equal_sentencepiece_on_generated_strings(ours: Tokenizer, theirs: Any) -> None:
    pieces = [theirs.id_to_piece(i) for i in range(259, 32000)]
    for text in generated(pieces, 2000):
        assert_equal(ours, theirs, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.text("ab▁ \n1.é", max_size=80))
def test_ids_equal_sentencepiece_on_any_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert_equal(ours, theirs, text)


def test_ids_equal_sentencepiece_where_pieces_overlap(model_file: Path, ours: Tokenizer, theirs: Any) -> None:
    # Ranking pairs differs from scoring pieces only where x+y and y+z spell the same piece in two ways: try all of these.
    ways: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges_of(read_sentencepiece(model_file).pieces):
        ways.setdefault(left + right, []).append((left, right))
    overlaps = [(x, y, z) for cuts in ways.values() for x, y in cuts for y2, z in cuts if y == y2 and (x, y) != (y, z)]
    assert len(overlaps) > 100
    rng = random.Random(1)
    for x, y, z in overlaps:
        for _ in range(10):
            parts = (x, y, z, x + y + z, z + y + x, " ")
            assert_equal(ours, theirs, "".join(rng.choice(parts) for _ in range(rng.randint(1, 9))))


def test_text_that_spells_control_tokens_stays_text(ours: Tokenizer) -> None:
    ids = ours.encode("<s>CT</s><unk>")
    assert ids.count(1) == 1 and 2 not in ids and 0 not in ids
    assert ours.decode(ids) == "<s>CT</s><unk>"


@pytest.mark.parametrize("source", ["added_tokens.json", "tokenizer_config.json"])
def test_meditrons_added_tokens_follow_the_pieces(tmp_path: Path, model_file: Path, theirs: Any, source: str) -> None:
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    if source == "added_tokens.json":
        content: dict[str, Any] = {text: 32000 + i for i, text in reversed(list(enumerate(MEDITRON_TOKENS)))}
        config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        content = {"pad_token": "<PAD>", "added_tokens_decoder": {
            **{str(i): {"content": t, "special": True, "normalized": False} for i, t in enumerate(("<unk>", "<s>", "</s>"))},
            **{str(32000 + i): {"content": t, "special": t.startswith("<")} for i, t in enumerate(MEDITRON_TOKENS)}}}
    (tmp_path / source).write_text(json.dumps(content))
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (32017, 1, 2, 32004)
    for i, text in enumerate(MEDITRON_TOKENS):
        assert (32000 + i in tokenizer.encode(f"see {text} there")) == (text != "<PAD>"), text
    assert tokenizer.encode("CT brain", bos=False) == theirs.encode("CT brain")
    tokenizer.save(tmp_path / "copy")
    copy = read_tokenizer(tmp_path / "copy")
    assert copy.encode("[bib] x <CLS> é") == tokenizer.encode("[bib] x <CLS> é") and copy.pad_id == 32004


@pytest.mark.parametrize(("added", "said"), [
    ({"<CLS>": 32001}, "next free id is 32000"),
    ({"<CLS>": 5}, "that id is"),
    ({"<CLS>": "x"}, "whole number"),
    ({"<CLS>": 32000, "<SEP>": 32000}, "two tokens"),
])
def test_added_tokens_that_do_not_fit_are_refused(tmp_path: Path, model_file: Path, added: dict[str, Any], said: str) -> None:
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(CheckpointError, match=said):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("options", [
    {"add_dummy_prefix": False}, {"remove_extra_whitespaces": True}, {"normalization_rule_name": "nmt_nfkc"},
    {"byte_fallback": False}, {"bos_id": -1}, {"pad_id": 3},
])
def test_models_trained_here_with_other_settings_agree(tmp_path: Path, options: dict[str, Any]) -> None:
    corpus = [f"patient {i} had a CT of the abdomen with contrast; eGFR {i}, é ü ñ" for i in range(200)]
    settings_ = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "remove_extra_whitespaces": False,
                 "normalization_rule_name": "identity", "minloglevel": 2, **options}
    prefix = str(tmp_path / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_prefix=prefix, **settings_)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = read_tokenizer(tmp_path)
    assert ours.bos_id == (theirs.bos_id() if theirs.bos_id() >= 0 else None)
    assert ours.pad_id == (theirs.pad_id() if theirs.pad_id() >= 0 else None)
    texts = ["", " ", "  CT  of the ", "patient", "ﬁ ① CT", "abdomen\n\ncontrast", "é e\u0301", "the the the", "▁CT"]
    texts += [] if options.get("byte_fallback") is False else ["日本"]
    for text in texts:
        assert ours.encode(text, bos=False) == theirs.encode(text), repr(text)


@pytest.mark.parametrize(("options", "said"), [
    ({"model_type": "unigram", "vocab_size": 11}, "only BPE"),
    ({"model_type": "bpe", "vocab_size": 14, "user_defined_symbols": ["[bib]"]}, "user-defined"),
    ({"model_type": "bpe", "vocab_size": 14, "treat_whitespace_as_suffix": True}, "spaces behind the words .*tokenizer.json"),
])
def test_a_model_that_follows_other_rules_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    prefix, corpus = str(tmp_path / "tokenizer"), ["a b c d e f"] * 9
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_prefix=prefix, minloglevel=2, **options)
    with pytest.raises(CheckpointError, match=said):
        read_tokenizer(tmp_path)
