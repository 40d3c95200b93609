"""A model whose tokenizer learnt the notes' words, read by transformers: the same ids, the same logits."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minilora import TrainConfig, load_model, load_tokenizer, train
from tests.models import write_model
from tests.notes import notes, write_csv

transformers = pytest.importorskip("transformers", reason="extra [peers] is not installed")


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_run_folder_with_its_new_tokens(tmp_path: Path, tied: bool) -> None:
    base = write_model(tmp_path / "base", tie_word_embeddings=tied)
    data = write_csv(tmp_path / "train.csv", notes(24))
    train(TrainConfig(model=str(base), data=str(data), out=str(tmp_path / "run"), tune="full", quantize="none", new_tokens=30,
                      max_steps=3, batch_size=4, max_length=128, lr=1e-3, device="cpu", quiet=True))
    ours, theirs = load_tokenizer(tmp_path / "run"), transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    for note, _ in (*notes(8), ("pain, fracture, vasträ", "")):
        ids = ours.encode(note, bos=False)
        assert theirs(note, add_special_tokens=False)["input_ids"] == ids and theirs.decode(ids) == ours.decode(ids) == note
    tokens = torch.tensor([ours.encode(notes(1)[0][0])])
    assert int(tokens.max()) >= load_tokenizer(base).vocab_size
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "run", quantize=None, dtype=torch.float32)(tokens),
                                   model(tokens).logits, rtol=0, atol=1e-5)
