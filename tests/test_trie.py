"""Label scores by tree attention: equal to scoring each label as a sequence of its own."""
from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import minilora.trie
from minilora.errors import CheckpointError, ConfigError, DataError
from minilora.generate import SHARED_TOKENS, shared_beginning
from minilora.llama.checkpoint import load_checkpoint
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.tokenizer import Tokenizer, read_tokenizer
from minilora.trie import CHUNK_NODES, LabelTrie, Normalization, predict_labels, score_labels, tree_chunks
from tests.models import write_model

LABELS = ["CT Abdomen", "CT Abdomen W Contrast", "CT Abdomen WO Contrast", "CT Brain WO Contrast", "MRI Brain W WO Contrast",
          "XR Knee", "CT C-Spine(Bone)", "US Pelvis", "Ångström, \"q\""]
NOTES = ["fall, r/o bleed", "x", "History: heart failure, hepatic vein; Diagnosis: concern for liver laceration", "stone?"]


def load(folder: Path, **overrides: object) -> tuple[LlamaForCausalLM, Tokenizer]:
    write_model(folder, std=0.3, **overrides)
    return load_checkpoint(folder, quantize=None, dtype=torch.float32), read_tokenizer(folder)


@pytest.fixture(autouse=True, params=["padded", "forest"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All of this file in both forms of a forward call; in float32 a forest takes torch's attention with a mask."""
    monkeypatch.setattr(minilora.trie, "grows_on", lambda model: request.param == "forest" and
                        all(window is None for window in model.config.sliding_windows))
    return request.param


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Tokenizer]:
    return load(tmp_path_factory.mktemp("model"))


@torch.no_grad()
def brute_force(model: LlamaForCausalLM, tokenizer: Tokenizer, labels: list[str], prompt: list[int],
                normalize: Normalization) -> Tensor:
    """The definition: one label, one sequence, no padding, no tree; children found by comparing prefixes."""
    written = [[*tokenizer.encode(label, bos=False), tokenizer.eos_id] for label in labels]
    totals = []
    for ids in written:
        logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].double()
        total = 0.0
        for depth, token in enumerate(ids):
            if normalize == "trie":
                children = sorted({other[depth] for other in written if other[:depth] == ids[:depth] and len(other) > depth})
                total += float(logits[depth, children].log_softmax(-1)[children.index(token)])
            else:
                total += float(logits[depth].log_softmax(-1)[token])
        totals.append(total)
    scores = torch.tensor(totals, dtype=torch.float64)
    return (scores.log_softmax(-1) if normalize == "full" else scores).float()


def check(model: LlamaForCausalLM, tokenizer: Tokenizer, labels: list[str], normalize: Normalization = "trie",
          notes: list[str] = NOTES) -> None:
    prompts = [tokenizer.encode(note) for note in notes]
    scores = score_labels(model, LabelTrie(labels, tokenizer), prompts, normalize=normalize)
    expected = torch.stack([brute_force(model, tokenizer, labels, prompt, normalize) for prompt in prompts])
    torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(len(prompts)))
    assert torch.equal(scores.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("normalize", ["trie", "full"])
def test_scores_equal_each_label_as_its_own_sequence(small: tuple[LlamaForCausalLM, Tokenizer],
                                                     normalize: Normalization) -> None:
    check(*small, LABELS, normalize)


@pytest.mark.parametrize("normalize", ["trie", "full"])
def test_a_trie_in_chunks_is_exact(small: tuple[LlamaForCausalLM, Tokenizer], normalize: Normalization,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 3, 7):
        monkeypatch.setattr(minilora.trie, "CHUNK_NODES", size)
        check(*small, LABELS, normalize)


@pytest.mark.parametrize("normalize", ["trie", "full"])
def test_a_shared_beginning_is_exact(small: tuple[LlamaForCausalLM, Tokenizer], normalize: Normalization,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    notes = ["Answer with a protocol. " + note for note in NOTES]
    assert shared_beginning([small[1].encode(note) for note in notes], small[0]) > SHARED_TOKENS
    for size in (3, CHUNK_NODES):
        monkeypatch.setattr(minilora.trie, "CHUNK_NODES", size)
        check(*small, LABELS, normalize, notes)


def test_hundreds_of_labels_are_exact(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small
    words = random.Random(0)
    labels = sorted({"".join(words.choices("abc", k=words.randint(1, 9))) for _ in range(500)})
    trie = LabelTrie(labels, tokenizer)
    assert len(labels) >= 250 and len(tree_chunks(trie, "full", 512)) > 1, "the test wants more than one chunk"
    prompts = [tokenizer.encode(note) for note in NOTES[:2]]
    scores = score_labels(model, trie, prompts, normalize="full")
    trie_scores = score_labels(model, trie, prompts)
    for row, prompt in enumerate(prompts):
        full, trie_only = (brute_force(model, tokenizer, labels, prompt, normalize) for normalize in ("full", "trie"))
        torch.testing.assert_close(scores[row], full, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(trie_scores[row], trie_only, atol=2e-5, rtol=1e-5)


def test_a_hand_made_trie_gives_the_products_of_its_choices(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small
    prompt = tokenizer.encode("n")
    byte = {char: tokenizer.encode(char, bos=False)[0] for char in "abcd"}
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1, [byte["a"], byte["b"]]].softmax(-1)
        second = model(torch.tensor([[*prompt, byte["a"]]]))[0, -1, [byte["c"], byte["d"]]].softmax(-1)
    # "bxyz" is forced after "b": its three further tokens and its end cost nothing.
    expected = torch.stack((first[0] * second[0], first[0] * second[1], first[1]))
    scores = score_labels(model, LabelTrie(["ac", "ad", "bxyz"], tokenizer), [prompt])
    torch.testing.assert_close(scores[0].exp(), expected, atol=1e-6, rtol=1e-5)


def test_scores_do_not_depend_on_batch_or_label_order(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small
    prompts = [tokenizer.encode(note) for note in NOTES]
    done: list[int] = []
    together = score_labels(model, LabelTrie(LABELS, tokenizer), prompts, on_progress=done.append)
    assert sum(done) == len(prompts)
    alone = score_labels(model, LabelTrie(LABELS, tokenizer), prompts, batch_tokens=1, on_progress=done.append)
    assert done[1:] == [1] * len(prompts)
    backwards = score_labels(model, LabelTrie(LABELS[::-1], tokenizer), prompts[::-1])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backwards.flip(0, 1), together, atol=1e-5, rtol=1e-5)


def test_predictions_come_with_probability_and_runner_up(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small
    prompts = [tokenizer.encode(note) for note in NOTES]
    scores = score_labels(model, LabelTrie(LABELS, tokenizer), prompts)
    labels, probabilities, runners_up = predict_labels(model, tokenizer, prompts, LABELS)
    order = scores.argsort(1, descending=True)
    assert labels == [LABELS[int(row[0])] for row in order] and runners_up == [LABELS[int(row[1])] for row in order]
    torch.testing.assert_close(probabilities, scores.max(1).values.exp())
    only = predict_labels(model, tokenizer, prompts, ["CT"])
    assert only[0] == ["CT"] * 4 and only[2] == [None] * 4 and torch.equal(only[1], torch.ones(4))
    assert predict_labels(model, tokenizer, [], LABELS)[0] == []


def test_only_nodes_that_are_read_are_computed(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    trie = LabelTrie(["abcdef", "abxyz"], small[1])
    chunk, = tree_chunks(trie, "trie")
    assert len(chunk.tokens) == 2                   # a, b: where the paths part; what follows is forced
    chunk, = tree_chunks(trie, "full")
    assert len(chunk.tokens) == 9                   # all but the two end tokens


@pytest.mark.parametrize("window", [4, 9, 500])
def test_one_sliding_window_for_all_layers_is_exact(tmp_path: Path, window: int) -> None:
    model = load(tmp_path / "m", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)
    check(*model, LABELS)


def test_layers_with_different_windows_are_exact(tmp_path: Path) -> None:
    model, tokenizer = load(tmp_path / "m", model_type="qwen2", architectures=["Qwen2ForCausalLM"], use_sliding_window=True,
                            sliding_window=5, max_window_layers=1, layer_types=["full_attention", "sliding_attention"])
    assert len(set(model.config.sliding_windows)) == 2
    check(model, tokenizer, LABELS)
    check(model, tokenizer, LABELS, "full")


def test_an_adapter_on_the_head_counts(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small

    class Shifted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * 2

    head = model.lm_head
    try:
        model.lm_head = Shifted(head)               # type: ignore[assignment]
        check(model, tokenizer, LABELS)
    finally:
        model.lm_head = head


def test_label_sets_without_meaning_are_refused(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    tokenizer = small[1]
    for labels, message in (([], "1 to 10,000 labels, this one 0"), (["CT", " "], "empty"),
                            (["CT", "CT "], "'CT' and 'CT' are the same"),
                            (["CT Brain", "ct  brain"], "'CT Brain' and 'ct  brain' differ only by case or spacing")):
        with pytest.raises(DataError, match=message):
            LabelTrie(labels, tokenizer)
    with pytest.raises(DataError, match="1 to 10,000"):
        LabelTrie([str(number) for number in range(10_001)], tokenizer)

    class Blind:                                    # cannot tell ü from ö
        eos_id = 1

        def encode(self, text: str, bos: bool = True) -> list[int]:
            return [2 if ord(char) > 127 else ord(char) for char in text]

    with pytest.raises(DataError, match="characters that the tokenizer does not know"):
        LabelTrie(["Tür", "Tör"], Blind())          # type: ignore[arg-type]


def test_a_trie_of_ten_thousand_labels_shares_prefixes(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    labels = [f"label {number:05d}" for number in range(10_000)]
    trie = LabelTrie(labels, small[1])
    assert len(trie.tokens) == 1 + len("label ") + 1 + 10 + 100 + 1_000 + 10_000 + 10_000     # the first digit is always 0
    for label, path in itertools.islice(zip(trie.labels, trie.paths, strict=True), 0, None, 997):
        assert small[1].decode([trie.tokens[node] for node in path[:-1]]) == label
        assert [trie.parents[node] for node in path] == [0, *path[:-1]]


def test_bad_scores_and_prompts_are_refused(small: tuple[LlamaForCausalLM, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = small
    trie = LabelTrie(LABELS, tokenizer)
    with pytest.raises(CheckpointError, match="token id 300"):
        score_labels(model, trie, [[300]])
    with pytest.raises(ConfigError, match="prompt 1 of 1 has 250 tokens"):
        score_labels(model, trie, [[1] * 250])
    with pytest.raises(ConfigError, match="'trie' or 'full'"):
        score_labels(model, trie, [[1]], normalize="sum")       # type: ignore[arg-type]
    broken, _ = load(tmp_path / "m")
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        score_labels(broken, trie, [[1]])
