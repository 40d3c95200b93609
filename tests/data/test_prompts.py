"""Prompts: BOS once, the end token last, loss on the answer alone, the same joint at training and at inference."""
from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.prompts import (
    IGNORED,
    JOINER,
    TEMPLATES,
    Template,
    check_ids,
    clean_note,
    encode_example,
    encode_label,
    encode_prompt,
    load_template,
    longest_label,
)
from minilora.errors import CheckpointError, ConfigError, DataError
from minilora.llama.tokenizer import read_tokenizer

MERGES = {": ": 259, "el:": 260}


class ToyTokenizer:
    """Bytes, and the merges ": " and "el:", which would cross the joint of prompt and label; BOS 1, EOS 2."""

    bos_id, eos_id, pad_id, vocab_size = 1, 2, None, 261

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids = [self.bos_id] if bos else []
        while text:
            for piece, index in MERGES.items():
                if text.startswith(piece):
                    ids.append(index)
                    text = text[len(piece):]
                    break
            else:
                ids += [byte + 3 for byte in text[0].encode()]
                text = text[1:]
        return ids

    def encode_prompt(self, before: str, note: str, after: str) -> list[int]:
        return self.encode(before + note + after)

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        back = {index: piece.encode() for piece, index in MERGES.items()}
        return b"".join(back.get(i) or bytes([i - 3]) for i in ids if i > 2).decode(errors="replace")


TOY = ToyTokenizer()
NOTE = TEMPLATES["note"]
notes = st.text(max_size=200)
labels = st.text(min_size=1, max_size=20).filter(lambda text: text.strip())


@given(notes, labels, st.sampled_from(sorted(TEMPLATES)), st.integers(100, 300))
def test_prompt_is_a_prefix_of_the_example(note, label, name, max_length):
    answer = encode_label(TOY, label)
    example = encode_example(TOY, TEMPLATES[name], note, label, max_length, row=7)
    prompt = encode_prompt(TOY, TEMPLATES[name], note, max_length - len(answer))
    assert example.input_ids == prompt.input_ids + answer
    assert (example.row, example.cut) == (7, prompt.cut)
    assert len(example.input_ids) <= max_length


@given(notes, labels, st.integers(100, 300))
def test_bos_comes_once_and_eos_last(note, label, max_length):
    ids = encode_example(TOY, NOTE, note, label, max_length).input_ids
    assert ids[0] == TOY.bos_id and ids.count(TOY.bos_id) == 1
    assert ids[-1] == TOY.eos_id and ids.count(TOY.eos_id) == 1


@given(notes, labels)
def test_prompt_has_no_loss_and_label_and_end_token_have(note, label):
    example = encode_example(TOY, NOTE, note, label, 1000)
    answer = encode_label(TOY, label)
    assert len(example.labels) == len(example.input_ids)
    assert set(example.labels[:-len(answer)]) == {IGNORED}
    assert example.labels[-len(answer):] == answer
    assert answer[-1] == TOY.eos_id


def test_label_is_tokenized_apart_from_the_prompt():
    template = Template("joint", "{input}:")
    example = encode_example(TOY, template, "lab", " CT ", 100)
    assert example.input_ids == [1, *TOY.encode("lab:", bos=False), *TOY.encode("CT", bos=False), 2]
    assert 259 in TOY.encode("lab: CT"), "the toy tokenizer should merge across the joint, or this test shows nothing"


@given(st.text(min_size=1, max_size=400), st.integers(30, 80))
def test_long_notes_are_cut_to_fit_and_short_ones_kept(note, max_tokens):
    prompt = encode_prompt(TOY, NOTE, note, max_tokens)
    whole = TOY.encode(NOTE.fill(clean_note(note)))
    assert len(prompt.input_ids) <= max_tokens
    assert prompt.cut == (len(whole) > max_tokens)
    if not prompt.cut:
        assert prompt.input_ids == whole


def test_cut_keeps_two_thirds_of_the_head_and_one_third_of_the_tail():
    note = "h" * 500 + "t" * 500
    prompt = encode_prompt(TOY, NOTE, note, 100)
    text = TOY.decode(prompt.input_ids)
    room = 100 - len(TOY.encode(NOTE.fill(JOINER)))
    assert text == NOTE.fill("h" * -(-2 * room // 3) + JOINER + "t" * (room // 3))
    assert len(prompt.input_ids) == 100
    assert prompt.input_ids == TOY.encode(text), "a prompt must be the tokens of one whole text"


def test_cut_never_shows_half_a_character():
    text = TOY.decode(encode_prompt(TOY, NOTE, "äöü€" * 200, 97).input_ids)
    assert "\ufffd" not in text and JOINER in text


def test_labels_of_the_same_tokens_are_refused_where_the_reserve_is_counted():
    class Blind(ToyTokenizer):
        def encode(self, text: str, bos: bool = True) -> list[int]:
            return super().encode(unicodedata.normalize("NFKC", text), bos)

    assert longest_label(Blind(), ["Grade 1", "Grade 2", "Grade 1"]) == len("Grade 1") + 1
    with pytest.raises(DataError, match="'Grade 1' and 'Grade ①' differ only by characters that the tokenizer does not know"):
        longest_label(Blind(), ["Grade 1", "Grade ①"])


def test_reserve_cuts_training_and_prediction_alike():
    reserve = longest_label(TOY, ["CT", "CT Abdomen W Contrast"])
    short, long = (encode_example(TOY, NOTE, "x" * 300, label, 100, reserve=reserve)
                   for label in ("CT", "CT Abdomen W Contrast"))
    prompt = encode_prompt(TOY, NOTE, "x" * 300, 100 - reserve).input_ids
    assert short.input_ids[:len(prompt)] == long.input_ids[:len(prompt)] == prompt


@given(notes)
def test_clean_note_is_idempotent(note):
    assert clean_note(clean_note(note)) == clean_note(note)


@pytest.mark.parametrize(("raw", "clean"), [
    ("a\r\nb\rc\n", "a\nb\nc"),
    ("a\0b\x0cc\x85d", "a b c d"),
    ("  tab\tstays  ", "tab\tstays"),
    ("half \ud83d pair", "half \ufffd pair"),
    ("end</s> <S> <|im_end|>", "end< /s> < S> < |im_end|>"),
    ("WBC <3, BP >180, {x} <sup> Müller 5\u00a0mg", "WBC <3, BP >180, {x} <sup> Müller 5\u00a0mg"),
])
def test_clean_note_follows_its_rules(raw, clean):
    assert clean_note(raw) == clean


def test_braces_in_a_note_are_harmless():
    assert NOTE.fill("{input} {0} %s") == "Note: {input} {0} %s\nLabel:"


def test_label_and_end_token_are_never_cut():
    with pytest.raises(ConfigError, match=r"max_length 22 leaves no room.*row 3 take 22"):
        encode_example(TOY, NOTE, "note", "CT Abdomen W Contrast", 22, row=3)


def test_a_template_too_long_names_max_length():
    with pytest.raises(ConfigError, match=r"max_length.*template note") as caught:
        encode_prompt(TOY, NOTE, "secret patient", 10)
    assert "secret" not in str(caught.value)


def test_a_tokenizer_without_end_token_is_refused():
    endless = ToyTokenizer()
    endless.eos_id = None
    with pytest.raises(CheckpointError, match="no end token"):
        encode_label(endless, "CT")


@pytest.mark.parametrize("words", ["liver laceration, on apixaban; ", "Größe 5µm – naïve\r\n", "x", "( W/O )  "])
def test_the_llama_2_tokenizer_cuts_to_fit_and_keeps_the_joint(shared_data: Path, words: str):
    tokenizer = read_tokenizer(shared_data / "llama2-tokenizer")
    for max_length in (40, 64, 65):
        example = encode_example(tokenizer, NOTE, words * 300, "CT Abdomen W Contrast", max_length)
        answer = encode_label(tokenizer, "CT Abdomen W Contrast")
        prompt = encode_prompt(tokenizer, NOTE, words * 300, max_length - len(answer))
        text = tokenizer.decode(prompt.input_ids)
        assert example.cut and example.input_ids == prompt.input_ids + answer
        assert tokenizer.encode(text) == prompt.input_ids, "a prompt must be the tokens of one whole text"
        assert max_length - 6 <= len(example.input_ids) <= max_length


def test_an_empty_label_is_refused():
    with pytest.raises(DataError, match="label is empty"):
        encode_label(TOY, "  ")


def test_templates_load_by_name_and_from_a_file(tmp_path: Path):
    assert load_template("note").text == "Note: {input}\nLabel:"
    assert load_template("inst").text == "[INST] {input} [/INST]"
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffAuftrag: {input}\r\nProtokoll für CT:\r\n".encode())
    assert load_template(str(path)).text == "Auftrag: {input}\nProtokoll für CT:"


@pytest.mark.parametrize(("content", "words"), [
    (b"no place", "{input} 0 times"),
    (b"{input} {input}", "{input} 2 times"),
    (b"<s>[INST] {input} [/INST]", "two BOS"),
    (b"{input}</s>", "early EOS"),
    (b"<|begin_of_text|>{input}", "two BOS"),
    (b"{input} \xff", "not UTF-8 (byte 8)"),
])
def test_bad_template_files_end_with_one_line(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_template(str(path))
    assert words in str(caught.value) and "bad.txt" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_template_names_what_there_is():
    with pytest.raises(ConfigError, match=r"no template 'nope'; available: inst, meditron, note, tiny, or a UTF-8 file"):
        load_template("nope")


@pytest.mark.parametrize(("ids", "bad"), [([0, 32_000, 5], 32_000), ([3, -1], -1)])
def test_an_id_outside_the_embedding_table_is_refused(ids, bad):
    with pytest.raises(CheckpointError, match=f"token id {bad} is outside .* 32000 rows"):
        check_ids(ids, 32_000)


def test_ids_inside_the_embedding_table_pass():
    check_ids([0, 31_999], 32_000)
    check_ids([], 32_000)
