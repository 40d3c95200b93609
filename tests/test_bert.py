"""The BERT encoder: a layer by hand, what padding and batches must not change, and folders that are refused."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minilora.bert import MINILM, BertEmbedder, find_bert
from minilora.errors import CheckpointError, ConfigError
from tests.bert_folders import CONFIG, random_state, write_bert

TEXTS = ["CT Abdomen W Contrast", "ct abdomen wo contrast", "", "knees left brain mri ct w wo", "something unknown", "  CT  "]


def norm_by_loops(x: list[float], weight: Tensor, bias: Tensor) -> list[float]:
    mean = sum(x) / len(x)
    spread = math.sqrt(sum((value - mean) ** 2 for value in x) / len(x) + 1e-12)
    return [(value - mean) / spread * w + b for value, w, b in zip(x, weight.tolist(), bias.tolist(), strict=True)]


def test_one_layer_equals_loops_over_python_floats(tmp_path: Path) -> None:
    """Attention, residuals, norms and gelu of a single layer, written out; in float64."""
    embedder = BertEmbedder(write_bert(tmp_path / "b", num_hidden_layers=1))
    state, d, heads = {name: tensor.double() for name, tensor in embedder.weights.items()}, 24, 3

    def product(x: list[float], name: str) -> list[float]:
        return [sum(a * b for a, b in zip(x, row, strict=True)) + bias for row, bias in
                zip(state[f"{name}.weight"].tolist(), state[f"{name}.bias"].tolist(), strict=True)]

    def norm(x: list[float], name: str) -> list[float]:
        return norm_by_loops(x, state[f"{name}.weight"], state[f"{name}.bias"])

    ids = [2, 4, 8, 3]
    rows = [norm([w + p + s for w, p, s in zip(state["embeddings.word_embeddings.weight"][token].tolist(),
                                               state["embeddings.position_embeddings.weight"][t].tolist(),
                                               state["embeddings.token_type_embeddings.weight"][0].tolist(), strict=True)],
                 "embeddings.LayerNorm") for t, token in enumerate(ids)]
    first = "encoder.layer.0."
    q, k, v = ([product(row, f"{first}attention.self.{name}") for row in rows] for name in ("query", "key", "value"))
    out = []
    for t, row in enumerate(rows):
        seen: list[float] = []
        for head in (slice(h * d // heads, (h + 1) * d // heads) for h in range(heads)):
            products = [sum(a * b for a, b in zip(q[t][head], key[head], strict=True)) for key in k]
            scores = [math.exp(value / math.sqrt(d // heads)) for value in products]
            seen += [sum(s * value[head][i] for s, value in zip(scores, v, strict=True)) / sum(scores)
                     for i in range(d // heads)]
        x = norm([a + b for a, b in zip(row, product(seen, f"{first}attention.output.dense"), strict=True)],
                 f"{first}attention.output.LayerNorm")
        inner = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in product(x, f"{first}intermediate.dense")]
        out.append(norm([a + b for a, b in zip(x, product(inner, f"{first}output.dense"), strict=True)],
                        f"{first}output.LayerNorm"))
    found = embedder.states(torch.tensor([ids]), torch.ones(1, 4, dtype=torch.bool))[0]
    torch.testing.assert_close(found.double(), torch.tensor(out, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_vector_is_of_length_one_and_no_neighbour_changes_it(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "b")
    together, alone = BertEmbedder(folder)(TEXTS), BertEmbedder(folder, batch_size=1)(TEXTS)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(TEXTS)))
    torch.testing.assert_close(together.flip(0), BertEmbedder(folder)(TEXTS[::-1]), atol=1e-6, rtol=0)
    assert BertEmbedder(folder)([]).shape == (0, 24)


def test_the_files_of_every_age_give_the_same_vectors(tmp_path: Path) -> None:
    state = random_state(CONFIG)
    expected = BertEmbedder(write_bert(tmp_path / "plain", state))(TEXTS)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in state.items()}
    prefixed = {f"bert.{name}": tensor for name, tensor in old.items()} | {"cls.predictions.bias": torch.zeros(60)}
    kept = state | {"embeddings.position_ids": torch.arange(32)[None]}
    for number, (tensors, bin) in enumerate([(state, True), (old, True), (prefixed, False), (kept, False)]):
        found = BertEmbedder(write_bert(tmp_path / str(number), tensors, bin=bin))(TEXTS)
        assert torch.equal(found, expected), f"{number}: differs by {(found - expected).abs().max():.1e}"


def test_pooling_is_read_from_the_folder(tmp_path: Path) -> None:
    mean, cls = (BertEmbedder(write_bert(tmp_path / name, pooling=name)) for name in ("mean", "cls"))
    ids, real = torch.tensor([[2, 4, 3]]), torch.ones(1, 3, dtype=torch.bool)
    states = mean.states(ids, real)[0]
    torch.testing.assert_close(mean(["ct"])[0], torch.nn.functional.normalize(states.mean(0), dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(cls(["ct"])[0], torch.nn.functional.normalize(states[0], dim=0), atol=1e-6, rtol=0)
    assert torch.equal(BertEmbedder(write_bert(tmp_path / "none", pooling=None))(["ct"]), mean(["ct"]))
    written = tmp_path / "cls" / "1_Pooling" / "config.json"
    written.write_text(json.dumps({"pooling_mode": "cls"}))             # as newer versions write it
    assert torch.equal(BertEmbedder(tmp_path / "cls")(["ct"]), cls(["ct"]))


def test_a_long_text_is_cut_where_the_folder_says_and_not_where_its_tokenizer_was_trained(tmp_path: Path) -> None:
    short, whole = BertEmbedder(write_bert(tmp_path / "s", longest=6)), BertEmbedder(write_bert(tmp_path / "w"))
    assert torch.equal(short(["ct mri knee brain"]), short(["ct mri knee brain left w"]))
    assert not torch.equal(whole(["ct " * 8]), whole(["ct " * 9])), "the tokenizer's own limit is 8 tokens"
    assert torch.equal(whole(["ct " * 30]), whole(["ct " * 99])), "32 positions, two of them [CLS] and [SEP]"


def test_lower_case_is_a_setting_of_the_folder(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "b", lower=True)
    assert torch.equal(BertEmbedder(folder)(["CT Knee"]), BertEmbedder(folder)(["ct knee"]))
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": false}')
    assert not torch.equal(BertEmbedder(folder)(["CT Knee"]), BertEmbedder(folder)(["ct knee"]))


@pytest.mark.parametrize(("changes", "words"), [
    ({"model_type": "mpnet"}, "'mpnet'"), ({"position_embedding_type": "relative_key"}, "relative_key positions"),
    ({"num_attention_heads": 5}, "a multiple of the third"), ({"hidden_size": "24"}, "whole numbers"),
    ({"hidden_act": "swish"}, "'swish' is not one of gelu"), ({"num_hidden_layers": 3}, "encoder.layer.2"),
    ({"num_hidden_layers": 1}, "has no place"), ({"vocab_size": 59}, "has no place"), ({"pooling": "max"}, "pooling by max"),
])
def test_what_is_no_bert_of_ours_is_refused_in_one_line(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    state = random_state(CONFIG)
    with pytest.raises(CheckpointError) as caught:
        BertEmbedder(write_bert(tmp_path / "b", state, **changes))        # type: ignore[arg-type]
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_module_that_is_not_written_here_is_refused(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "b")
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]')
    with pytest.raises(CheckpointError, match="the module 'Dense' is not written here"):
        BertEmbedder(folder)


def test_broken_tokenizers_are_refused(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "b", vocab_size=14)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        BertEmbedder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        BertEmbedder(folder)
    small = write_bert(tmp_path / "small", vocab_size=8)
    with pytest.raises(CheckpointError, match=r"more tokens than config\.json's vocab_size 8"):
        BertEmbedder(small)(["contrast"])


def test_an_embedder_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_bert(str(write_bert(tmp_path / "b"))) == tmp_path / "b"
    with pytest.raises(ConfigError, match=r"no folder with a config\.json"):
        find_bert(str(tmp_path / "none"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"minilora\[minilm\]"):
        find_bert(MINILM)
