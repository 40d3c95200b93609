"""Mean-pooled embeddings."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minilora.embed import embed_texts
from minilora.errors import ConfigError
from minilora.llama.checkpoint import load_checkpoint
from minilora.llama.tokenizer import read_tokenizer
from tests.models import write_model

TEXTS = ["CT Abdomen W Contrast", "XR Knee", "a", "MRI Brain W WO Contrast", "US Pelvis"]


def test_embedding_is_the_mean_of_hidden_states_without_bos(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    model, tokenizer = load_checkpoint(folder, quantize=None, dtype=torch.float32), read_tokenizer(folder)
    model.train()
    vectors = embed_texts(model, tokenizer, TEXTS, batch_size=3)
    assert model.training and vectors.dtype == torch.float32 and not vectors.requires_grad
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            mean = model.hidden(torch.tensor([tokenizer.encode(text)]))[0, 1:].mean(0)
        torch.testing.assert_close(vectors[row], mean / mean.norm(), atol=1e-5, rtol=0, msg=lambda m, t=text: f"{t}: {m}")
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))


def test_text_without_tokens_is_zero_and_long_text_is_cut(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    model, tokenizer = load_checkpoint(folder, quantize=None, dtype=torch.float32), read_tokenizer(folder)
    empty, cut, whole = embed_texts(model, tokenizer, ["", "b" * 900, "b" * 255])
    assert not empty.any()
    torch.testing.assert_close(cut, whole)
    assert embed_texts(model, tokenizer, []).shape == (0, 64)
    with pytest.raises(ConfigError, match="batch_size"):
        embed_texts(model, tokenizer, ["a"], batch_size=0)
