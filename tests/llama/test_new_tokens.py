"""New tokens: the merges that counting anew would choose, the old tokens untouched, and rows that begin as a mean."""
from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from minilora import ConfigError, load_model, load_tokenizer
from minilora.llama.new_tokens import LEAST, add_rows, learn_merges, learn_tokens, pieces
from minilora.llama.tokenizer import Tokenizer, read_tokenizer
from tests.models import byte_tokenizer, write_model

FOREIGN = ["kon vasträ kon", "vasträ, kon zhubim?", "Zhubim vasträ"] * LEAST
WORDS = st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=8), st.integers(1, 5)), max_size=8)


def counted_anew(words: list[tuple[list[int], int]], limit: int, least: int, first: int) -> list[tuple[int, int]]:
    """Byte-pair encoding as its paper tells it: count all pairs, merge the most frequent, begin again."""
    sequences, merges = [(list(ids), count) for ids, count in words], list[tuple[int, int]]()
    while len(merges) < limit:
        found = Counter[tuple[int, int]]()
        for ids, count in sequences:
            for pair in pairwise(ids):
                found[pair] += count
        best = min(found, key=lambda pair: (-found[pair], pair), default=None)
        if best is None or found[best] < least:
            break
        for ids, _ in sequences:
            at = 0
            while at < len(ids) - 1:
                if (ids[at], ids[at + 1]) == best:
                    ids[at : at + 2] = [first + len(merges)]
                at += 1
        merges.append(best)
    return merges


@given(WORDS, st.integers(0, 12), st.integers(1, 6))
def test_merges_are_those_of_counting_anew(words: list[tuple[list[int], int]], limit: int, least: int) -> None:
    assert learn_merges(words, limit, least, first=4) == counted_anew(words, limit, least, 4)


def saved(backend: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return read_tokenizer(folder / "tokenizer.json")


def test_new_words_become_tokens_and_english_keeps_its_own() -> None:
    before = load_tokenizer("tiny")
    after = learn_tokens(before, FOREIGN, 100, before.vocab_size)
    assert len(before.encode(" vasträ", bos=False)) > 4 and len(after.encode(" vasträ", bos=False)) == 1
    english = "Note: r/o PE, sudden dyspnea, eGFR 24\nIn short:"
    assert after.encode(english) == before.encode(english)
    for text in (*FOREIGN[:3], english, "kon\n  vasträzhubim 12"):
        assert after.decode(after.encode(text)) == text
    assert (after.bos_id, after.eos_id, after.pad_id) == (before.bos_id, before.eos_id, before.pad_id)
    assert after.vocab_size < before.vocab_size + 100, "three words have no hundred pairs in them"
    assert all(after.token(token) is not None for token in range(after.vocab_size)), "ids have no gaps"


def test_what_stands_too_rarely_is_not_learnt() -> None:
    before = load_tokenizer("tiny")
    after = learn_tokens(before, ["vasträ zhubim"] * (LEAST - 1) + ["zhubim"], 100, before.vocab_size)
    assert len(after.encode(" zhubim", bos=False)) < len(before.encode(" zhubim", bos=False))
    assert after.encode(" vasträ", bos=False) == before.encode(" vasträ", bos=False)


def test_no_more_tokens_are_learnt_than_asked_for_and_none_of_nothing() -> None:
    before = load_tokenizer("tiny")
    assert learn_tokens(before, FOREIGN, 3, before.vocab_size).vocab_size == before.vocab_size + 3
    assert learn_tokens(before, [], 3, before.vocab_size).vocab_size == before.vocab_size


def test_added_tokens_behind_the_vocabulary_keep_their_ids_and_new_ones_start_at_the_table_s_end(tmp_path: Path) -> None:
    """As in Llama 3, whose control tokens the vocabulary does not hold; a table may have more rows than there are tokens."""
    before = saved(byte_tokenizer(), tmp_path)
    after = learn_tokens(before, ["pain"] * LEAST, 2, before.vocab_size + 5)
    assert [after.token(token) for token in (256, 257, 258)] == ["<s>", "</s>", "<pad>"]
    assert after.encode("pain <s>") == [before.bos_id, *after.encode("pain", bos=False), *before.encode(" <s>", bos=False)]
    assert before.vocab_size + 5 <= max(after.encode("pain", bos=False)) == after.vocab_size - 1 == before.vocab_size + 6


def test_a_token_that_can_be_made_in_two_ways_has_one_id(tmp_path: Path) -> None:
    alphabet = {letter: at for at, letter in enumerate("abc")}
    backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    after = learn_tokens(saved(backend, tmp_path), ["abc"] * 50 + ["ab"] * 40 + ["bca"] * 60, 20, 3)
    spelt = json.loads((_written(after, tmp_path / "again") / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(spelt.values()) == list(range(len(spelt)))


def _written(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(folder)
    return folder


def test_a_tokenizer_that_knows_no_words_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"▁": 0, "a": 1}, merges=[], byte_fallback=True))
    backend.normalizer, backend.decoder = normalizers.Prepend("▁"), decoders.Metaspace()
    with pytest.raises(ConfigError, match="of another kind"):
        learn_tokens(saved(backend, tmp_path), FOREIGN, 5, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_means_and_old_logits_stay(tmp_path: Path, tied: bool) -> None:
    folder = write_model(tmp_path, tie_word_embeddings=tied)
    model, before = load_model(folder, quantize=None, dtype=torch.float32), read_tokenizer(folder)
    rows = model.config.vocab_size
    after = learn_tokens(before, ["pain"] * LEAST, 3, rows)
    made_of = pieces(before, after, rows)
    assert made_of[-1] == before.encode("pain", bos=False)
    ids = torch.tensor([before.encode("fall, pain")])
    old, expected = model(ids), [table.weight[made_of[-1]].mean(0) for table in (model.model.embed_tokens, model.lm_head)]
    add_rows(model, made_of)
    assert model.config.vocab_size == model.config.to_dict()["vocab_size"] == rows + 3
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    torch.testing.assert_close(model(ids)[..., :rows], old)
    for table, mean in zip((model.model.embed_tokens, model.lm_head), expected, strict=True):
        torch.testing.assert_close(table.weight[-1], mean)
    assert model(torch.tensor([after.encode("fall, pain")])).shape[-1] == rows + 3
