"""The model that ships: its size, its layout, its card, and what it has not read."""
from __future__ import annotations

import json

import pytest
import torch

import minilora
from minilora.data.radiology import PROTOCOLS
from minilora.hub import resolve_model

FOLDER = resolve_model("tiny")


def test_it_has_three_to_six_million_parameters_and_stays_under_twelve_megabytes() -> None:
    model = minilora.load_model("tiny", quantize=None)
    assert 3_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 6_000_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12_000_000


def test_transformers_loads_it_and_computes_the_same_logits() -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([minilora.load_tokenizer(FOLDER).encode("Note: 70 y/o F, r/o PE, eGFR 24.")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)(ids).logits
    ours = minilora.load_model("tiny", quantize=None, dtype=torch.float32)(ids)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_its_tokenizer_is_read_alike_by_transformers_and_round_trips() -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = minilora.load_tokenizer(FOLDER), transformers.AutoTokenizer.from_pretrained(FOLDER)
    for text in ("CT C-Spine(Bone)", "eGFR 24, r/o PE; s/p biopsy", "naïve café, 37.5 °C\nβ-blocker", " two  spaces "):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text


def test_digits_are_tokens_of_their_own() -> None:
    tokenizer = minilora.load_tokenizer(FOLDER)
    assert len(tokenizer.encode("1234", bos=False)) == 4


def test_the_card_and_the_curve_tell_the_figures_of_the_run() -> None:
    facts = json.loads((FOLDER / "pretraining.json").read_text())
    card = (FOLDER / "README.md").read_text()
    for key in ("parameters", "documents", "tokens", "tokens_with_loss", "held_out_loss"):
        assert f"{facts[key]:,}" in card, key
    assert facts["curve"][-1]["step"] == facts["arguments"]["steps"]
    assert facts["curve"][0]["loss"] > 2 * facts["curve"][-1]["loss"]
    assert (FOLDER / "pretraining.png").read_bytes().startswith(b"\x89PNG")


def test_four_bits_cost_it_little_on_text_of_its_own_kind() -> None:
    """Perplexity of unseen documents under NF4 with double quantization against bfloat16: within 5 %."""
    from minilora.data.radiology.corpus import documents

    tokenizer = minilora.load_tokenizer(FOLDER)
    texts = [tokenizer.encode(document.text) for document in documents(seed=77, n=40)]

    def loss(quantize: str | None) -> float:
        model = minilora.load_model("tiny", quantize=quantize)  # type: ignore[arg-type]
        with torch.no_grad():
            losses = [torch.nn.functional.cross_entropy(model(torch.tensor([ids[:-1]]))[0].float(), torch.tensor(ids[1:]))
                      for ids in texts]
        return float(torch.stack(losses).mean())

    dense, four_bit = loss(None), loss("nf4")
    assert dense < four_bit + 0.01 and four_bit - dense < 0.05, (dense, four_bit)
    assert four_bit < 2.0, "it has learnt its corpus"


def test_untuned_it_does_not_name_a_protocol_after_a_note() -> None:
    model, tokenizer = minilora.load_model("tiny"), minilora.load_tokenizer(FOLDER)
    answer, = minilora.generate(model, tokenizer, ["Note: 50 y/o M, r/o liver laceration, on apixaban.\n"], max_new_tokens=40)
    assert not any(name in answer for name in PROTOCOLS)
