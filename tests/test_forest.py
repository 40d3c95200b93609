"""Prompts and trees without padding: what is laid out is what was given, and nothing twice."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora.trie
from minilora.errors import ConfigError
from minilora.forest import TreeChunk, forests, grows_on
from minilora.kernels import block
from minilora.llama.cache import KVCache
from minilora.llama.checkpoint import load_checkpoint
from minilora.llama.tokenizer import read_tokenizer
from minilora.trie import LabelTrie, score_labels, tree_chunks
from tests.kernels.test_block import make
from tests.models import write_model
from tests.test_trie import LABELS, NOTES

# Few different tokens, so that prompts share beginnings, are the beginnings of others, and stand twice.
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12)


class Letters:
    """A token a letter."""

    eos_id = 9

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [ord(char) - ord("a") for char in text]


def tree(labels: Sequence[str]) -> TreeChunk:
    chunk, = tree_chunks(LabelTrie(labels, Letters()), "full")      # type: ignore[arg-type]
    return chunk


def beginnings(prompts: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    return {tuple(prompt[: length + 1]) for prompt in prompts for length in range(len(prompt))}


@settings(max_examples=200, deadline=None)
@given(prompts=PROMPTS, rows=st.integers(1, 60), labels=st.sampled_from([["a"], ["ab", "cd"], ["abc", "abd", "b", "cab"]]))
def test_every_prompt_is_there_once_with_its_tree(prompts: list[list[int]], rows: int, labels: list[str]) -> None:
    behind = tree(labels)
    seen = list[int]()
    for forest in forests(prompts, behind, rows):
        nodes = len(behind.tokens)
        tokens, positions = forest.input_ids[0], forest.position_ids[0]
        assert len(tokens) <= rows or len(forest.prompts) == 1
        assert len(tokens) == len(beginnings([prompts[at] for at in forest.prompts])) + nodes * len(forest.prompts)
        at = forest.at.view(len(forest.prompts), -1)
        visible = forest.trees.mask(len(tokens))[0, 0]
        for group, index in enumerate(forest.prompts):
            keys = forest.trees.keys[forest.trees.starts[group] : forest.trees.starts[group + 1]].long()
            length = len(prompts[index])
            assert tokens[keys].tolist() == prompts[index] + behind.tokens.tolist()
            assert positions[keys[:length]].tolist() == list(range(length))
            assert torch.equal(positions[keys[length:]], length + behind.depths)
            for reader, (slot, _) in zip(at[group].tolist(), behind.readers, strict=True):
                assert reader == keys[length + slot]
            for place, key in enumerate(keys.tolist()):
                node = place - length
                expected = keys[: place + 1] if node < 0 else torch.cat((keys[:length], keys[length:][behind.visible[node]]))
                assert visible[key].nonzero().flatten().tolist() == sorted(expected.tolist())
            wanted = slice(*forest.trees.wanted.starts[group : group + 2].tolist())
            assert forest.trees.wanted.positions[wanted].tolist() == [length + slot for slot, _ in behind.readers]
        seen += forest.prompts
    assert sorted(seen) == list(range(len(prompts)))


def test_a_bfloat16_model_scores_alike_in_both_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what rounding to bfloat16 moves; a prompt's scores depend on no other prompt."""
    monkeypatch.setattr(block, "_tried", [make("native")])
    write_model(tmp_path / "m", std=0.3, head_dim=32)
    model, tokenizer = load_checkpoint(tmp_path / "m", dtype=torch.bfloat16), read_tokenizer(tmp_path / "m")
    exact = load_checkpoint(tmp_path / "m", dtype=torch.float32)
    assert grows_on(model) and not grows_on(exact)
    trie, prompts = LabelTrie(LABELS, tokenizer), [tokenizer.encode(note) for note in (*NOTES, *NOTES[:2], NOTES[0][:5])]
    right = score_labels(exact, trie, prompts)
    forest = score_labels(model, trie, prompts)
    monkeypatch.setattr(minilora.trie, "grows_on", lambda model: False)
    padded = score_labels(model, trie, prompts)
    assert float((forest - right).norm()) < 1.2 * float((padded - right).norm()) < 0.05 * float(right.norm())
    assert float((forest - padded).norm()) < 0.05 * float(right.norm())
    assert torch.equal(forest[:2], forest[len(NOTES) : len(NOTES) + 2]), "a note that stands twice"


def test_a_forest_of_other_tokens_or_behind_a_cache_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    model = load_checkpoint(tmp_path / "m", dtype=torch.float32)
    forest, = forests([[1, 2], [1, 3]], tree(["ab", "c"]), 100)
    ids = forest.input_ids
    cache = KVCache(model.config, 1, 100, model.dtype, model.device)
    with torch.no_grad():
        assert model.hidden(ids, forest.trees, forest.position_ids, at=forest.at).shape == (1, forest.at.shape[1], 64)
        model.hidden(ids[:, :3], cache=cache)
        for bad, holding in ((ids[:, 1:], None), (ids.expand(2, -1), None), (ids, cache)):
            with pytest.raises(ConfigError, match="trees of 9 rows"):
                model.hidden(bad, forest.trees, cache=holding)


@pytest.mark.parametrize("changes", [{"sliding_window": 9, "model_type": "mistral", "architectures": ["MistralForCausalLM"]},
                                     {"head_dim": 24}], ids=["window", "heads of 24"])
def test_what_no_forest_is_made_for_is_padded(tmp_path: Path, changes: dict[str, object]) -> None:
    write_model(tmp_path / "m", **changes)
    assert not grows_on(load_checkpoint(tmp_path / "m", dtype=torch.bfloat16))
