"""Chat templates that name the end token: the ids of transformers, and none that a note could smuggle in."""
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from minilora.data.prompts import TEMPLATES, Template, clean_note, encode_example, encode_label, encode_prompt
from minilora.errors import ConfigError
from minilora.llama.tokenizer import Tokenizer, read_tokenizer
from tests.llama.test_tokenizer import byte_level, write
from tests.peers.test_legacy import peer_of
from tests.peers.test_legacy import write as write_pieces

transformers = pytest.importorskip("transformers", reason="install the [peers] extra")

QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
LLAMA_TEMPLATE = Template("llama 3", "<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|><|start_header_id|>assistant"
                                     "<|end_header_id|>\n\n")
NOTES = ["CT brain, r/o bleed", "abdomen with contrast", "x", "", "▁ y", "é\n\nü", "  a  ", "question <|im_end|> </s>"]

Model = tuple[Tokenizer, tokenizers.Tokenizer, Template]        # ours, transformers' and a template for both


def qwen(folder: Path) -> Path:
    return write(folder, byte_level(QWEN), tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>"})


def llama_3(folder: Path) -> Path:
    return write(folder, byte_level(LLAMA), tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
        "pad_token": "<|pad|>"})


def metaspace(folder: Path) -> Path:
    """Like a tokenizer.json of Llama 2's kind: the text's beginning is apart, and the end token takes the space before it."""
    backend = byte_level(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Replace(Regex(" "), "▁")
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<|im_start|>", normalized=False)])
    backend.add_special_tokens([AddedToken("<|im_end|>", normalized=False, lstrip=True)])
    return write(folder, backend, tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"})


def pieces(folder: Path, shared_data: Path, **config: Any) -> Path:
    """Llama 2's tokenizer.model with ChatML's tokens."""
    folder = write_pieces(folder, shared_data, **config)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content["added_tokens_decoder"]["32005"] = {"content": "<|im_end|>", "special": True, "normalized": False}
    path.write_text(json.dumps({**content, "eos_token": "<|im_end|>"}))
    return folder


@pytest.fixture(params=["qwen", "llama 3", "metaspace", "pieces", "pieces, legacy", "pieces, not legacy"])
def model(request: pytest.FixtureRequest, tmp_path: Path, shared_data: Path) -> Model:
    kind: str = request.param
    if kind.startswith("pieces"):
        folder = pieces(tmp_path / "m", shared_data, **({"legacy": "not" not in kind} if "legacy" in kind else {}))
        return read_tokenizer(folder), peer_of(folder), TEMPLATES["meditron"]
    folder = {"qwen": qwen, "llama 3": llama_3, "metaspace": metaspace}[kind](tmp_path / "m")
    template = LLAMA_TEMPLATE if kind == "llama 3" else TEMPLATES["meditron"]
    return read_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer, template


def theirs(peer: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = peer.encode(text, add_special_tokens=False).ids
    return ids


def test_a_prompt_has_the_ids_of_transformers_and_bos_once(model: Model) -> None:
    ours, peer, template = model
    rng = random.Random(0)
    letters = "aCT \n.,é▁<|>"
    for note in [*NOTES, *("".join(rng.choice(letters) for _ in range(rng.randint(1, 30))) for _ in range(300))]:
        found, text = encode_prompt(ours, template, note, 1000), template.fill(clean_note(note))
        bos = [] if ours.bos_id is None else [ours.bos_id]
        assert found.input_ids == [*bos, *theirs(peer, text)], repr(text)
        assert found.input_ids.count(ours.eos_id) == 1      # type: ignore[arg-type]


def test_the_end_token_of_a_template_is_one_id_and_the_note_cannot_spell_it(model: Model) -> None:
    ours, _, template = model
    before, after = template.text.split("{input}")
    end = ours.token(ours.eos_id) or ""
    for note in (end, f"a {end} b", f"{end}{end}", end[:-1], "\ufdd0\ufdd1\ufdd2\ufdd3", "</s>", "<|end_of_text|>"):
        ids = ours.encode_prompt(before, note, after)       # not cleaned: a note that came as it is
        assert ids.count(ours.eos_id) == 1 and ours.pad_id not in ids, repr(note)       # type: ignore[arg-type]
        assert ours.decode(ids, skip_special=False).count(end) == 1 + note.count(end)
    half = len(end) // 2
    ids = ours.encode_prompt(before + end[:half], end[half:], after)
    assert ids.count(ours.eos_id) == 1, "half of it in the template and half in the note is no token"       # type: ignore[arg-type]
    assert ours.eos_id not in ours.encode(template.fill("x")), "plain text never names it"


def test_a_long_note_is_cut_and_the_prompt_is_a_prefix_of_the_example(model: Model) -> None:
    ours, peer, template = model
    answer = encode_label(ours, "CT brain")
    for length in (60, 61, 75):
        example = encode_example(ours, template, "abdomen with contrast, r/o bleed. " * 40, "CT brain", length)
        prompt = encode_prompt(ours, template, "abdomen with contrast, r/o bleed. " * 40, length - len(answer))
        assert example.cut and example.input_ids == prompt.input_ids + answer and len(example.input_ids) <= length
        text = ours.decode(prompt.input_ids[ours.bos_id is not None:], skip_special=False)
        assert prompt.input_ids[ours.bos_id is not None:] == theirs(peer, text)
        assert prompt.input_ids.count(ours.eos_id) == 1      # type: ignore[arg-type]


def test_a_template_that_names_no_control_token_has_the_ids_of_plain_text(model: Model) -> None:
    ours, _, _ = model
    for template in (TEMPLATES["note"], TEMPLATES["tiny"], TEMPLATES["inst"]):
        for note in NOTES:
            assert encode_prompt(ours, template, note, 1000).input_ids == ours.encode(template.fill(clean_note(note)))


def test_a_template_with_the_models_own_begin_token_is_refused(tmp_path: Path) -> None:
    names = {"bos_token": "<|bot|>", "eos_token": "<|eot|>"}
    folder = write(tmp_path, byte_level([*names.values()]), tokenizer_config=names)
    with pytest.raises(ConfigError, match=r"contains '<\|bot\|>', this model's begin token"):
        encode_prompt(read_tokenizer(folder), Template("mine", "<|bot|>{input}<|eot|>"), "CT", 100)


def test_a_longer_added_token_around_a_control_token_is_read_as_itself(tmp_path: Path) -> None:
    backend = byte_level(["<|bot|>", "<e>", "<pad>"])
    backend.add_tokens([AddedToken("x<e>y", normalized=False)])
    folder = write(tmp_path, backend, tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bot|>", "eos_token": "<e>", "pad_token": "<pad>"})
    ours, peer = read_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer
    for text in ("x<e>y{input}", "x<e>y<e>{input}<pad>", "<e>x<e>yy{input}"):
        before, after = text.split("{input}")
        assert ours.encode_prompt(before, "CT", after)[1:] == theirs(peer, before + "CT" + after)
