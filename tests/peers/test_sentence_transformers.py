"""The BERT encoder against transformers' BertModel and against sentence-transformers, over random folders and over MiniLM."""
from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.bert import MINILM, MINILM_PACKAGE, BertEmbedder, find_bert
from minilora.data.radiology import labels
from tests.bert_folders import write_bert

transformers = pytest.importorskip("transformers")
TEXTS = [*labels(), "", "  CT  ", "Körper 疼痛", "history of [SEP] pain", *(f"note {n}, {'long ' * n * 9}" for n in range(7))]
MINILM_IS_HERE = pytest.mark.skipif(importlib.util.find_spec(MINILM_PACKAGE) is None, reason="needs the extra [minilm]")


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"layer_norm_eps": 1e-5},
                                     {"num_hidden_layers": 4, "num_attention_heads": 1}], ids=str)
def test_hidden_states_equal_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "b", **changes)
    ours, theirs = BertEmbedder(folder), transformers.BertModel.from_pretrained(folder).eval()
    ids = torch.randint(0, 60, (5, 32), generator=torch.Generator().manual_seed(1))
    real = torch.arange(32) < torch.tensor([32, 1, 7, 20, 31])[:, None]
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=real.long()).last_hidden_state
    torch.testing.assert_close(ours.states(ids, real)[real], expected[real], atol=2e-5, rtol=0)


@MINILM_IS_HERE
def test_minilm_equals_mean_pooling_over_transformers() -> None:
    folder = find_bert(MINILM)
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([text.strip() for text in TEXTS], padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states, real = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
    torch.testing.assert_close(BertEmbedder(folder)(TEXTS), expected, atol=1e-5, rtol=0)


@MINILM_IS_HERE
def test_minilm_equals_sentence_transformers() -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = find_bert(MINILM)
    expected = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(BertEmbedder(folder)(TEXTS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("pooling", "longest"), [("mean", None), ("mean", 6), ("cls", None)])
def test_a_random_folder_equals_sentence_transformers(pooling: str, longest: int | None, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = write_bert(tmp_path / "b", pooling=pooling, longest=longest)
    expected = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(BertEmbedder(folder)(TEXTS), expected, atol=1e-5, rtol=0)


@MINILM_IS_HERE
def test_minilm_calls_opposite_protocols_nearly_the_same() -> None:
    """Why cosine stands beside exact match and never alone: the issue's own figure."""
    a, b = BertEmbedder(find_bert(MINILM))(["CT Abdomen W Contrast", "CT Abdomen WO Contrast"])
    assert float(a @ b) == pytest.approx(0.979, abs=5e-4)
