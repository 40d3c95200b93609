"""Greedy decoding: equal to the plainest loop, whatever the batch."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minilora.errors import CheckpointError, ConfigError, DataError
from minilora.generate import end_tokens, evaluation_mode, generate, generate_ids
from minilora.llama.checkpoint import load_checkpoint, save_checkpoint
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.tokenizer import Tokenizer, read_tokenizer
from tests.models import write_model

PROMPTS = ["a", "History: fall", "CT of the abdomen, please", "x" * 40, "b", "fever, r/o abscess"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Tokenizer]:
    folder = write_model(tmp_path_factory.mktemp("model"), std=0.3)
    return load_checkpoint(folder, quantize=None, dtype=torch.float32), read_tokenizer(folder)


def test_one_text_without_a_list_is_refused_and_tensors_are_prompts(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small
    with pytest.raises(ConfigError, match="list of texts"):
        generate(model, tokenizer, "History: fall")
    ids = torch.tensor([[256, 70, 71], [256, 72, 73]])
    assert generate(model, tokenizer, ids, max_new_tokens=5) == generate(model, tokenizer, ids.tolist(), max_new_tokens=5)
    assert generate(model, tokenizer, []) == []


@torch.no_grad()
def plain_greedy(model: LlamaForCausalLM, ids: list[int], eos: int | None, tokens: int) -> list[int]:
    """No cache, no batch: the definition."""
    answer: list[int] = []
    while len(answer) < tokens:
        token = int(model(torch.tensor([ids + answer]))[0, -1].argmax())
        if token == eos:
            break
        answer.append(token)
    return answer


def test_answers_equal_decoding_without_cache(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small
    expected = [plain_greedy(model, tokenizer.encode(prompt), tokenizer.eos_id, 12) for prompt in PROMPTS]
    assert generate_ids(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4) == expected


def test_answers_do_not_depend_on_the_batch(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small
    alone = [generate_ids(model, tokenizer, [prompt], 16)[0] for prompt in PROMPTS]
    assert generate_ids(model, tokenizer, PROMPTS, 16, batch_size=6) == alone
    assert generate_ids(model, tokenizer, PROMPTS[::-1], 16, batch_size=2) == alone[::-1]


def test_a_shared_beginning_is_read_once_and_changes_no_answer(small: tuple[LlamaForCausalLM, Tokenizer],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = small
    instruction = "Answer with a protocol. "
    prompts = [instruction + prompt for prompt in PROMPTS]
    alone = [plain_greedy(model, tokenizer.encode(prompt), tokenizer.eos_id, 8) for prompt in prompts]
    read: list[int] = []
    hidden = model.hidden

    def counted(input_ids: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        read.append(input_ids.numel())
        return hidden(input_ids, *rest, **named)        # type: ignore[arg-type]

    monkeypatch.setattr(model, "hidden", counted)
    assert generate_ids(model, tokenizer, prompts, 8, batch_size=6) == alone
    lengths = [len(tokenizer.encode(prompt)) for prompt in PROMPTS]
    assert read[:2] == [1 + len(instruction), 6 * (max(lengths) - 1)], "BOS and instruction of one, then the rest of each"
    read.clear()
    assert generate_ids(model, tokenizer, [instruction + "a"] * 2, 8) == [alone[0]] * 2
    assert read[0] == 1 + len(instruction), "the last token of a prompt is its own: its state makes the first answer"


def test_each_row_stops_at_its_own_end_token(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small
    free = [plain_greedy(model, tokenizer.encode(prompt), None, 10) for prompt in PROMPTS]

    class Ends:                                     # an end token that these answers do contain, at various places
        eos_id, encode = free[0][3], staticmethod(tokenizer.encode)

    expected = [ids[: ids.index(Ends.eos_id)] if Ends.eos_id in ids else ids for ids in free]
    assert len(expected[0]) <= 3
    assert generate_ids(model, Ends, PROMPTS, 10, batch_size=6) == expected      # type: ignore[arg-type]


def test_every_end_token_of_the_config_ends_an_answer(small: tuple[LlamaForCausalLM, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = small
    free = plain_greedy(model, tokenizer.encode("b"), None, 10)
    for listed in ([257, free[4]], free[4], [free[4], "x", None, True]):
        folder = write_model(tmp_path / str(listed)[:8], std=0.3, eos_token_id=listed)
        other = load_checkpoint(folder, quantize=None, dtype=torch.float32)
        assert generate_ids(other, tokenizer, ["b"], 10) == [free[: free.index(free[4])]], listed
    assert free[: free.index(free[4])] != free


def test_end_tokens_that_only_generation_config_names_end_an_answer(small: tuple[LlamaForCausalLM, Tokenizer], tmp_path: Path
                                                                    ) -> None:
    model, tokenizer = small
    free = plain_greedy(model, tokenizer.encode("b"), None, 10)
    for number, (listed, beside) in enumerate([(257, [257, free[4]]), ([257], free[4]), (None, [free[4], "x", None, True])]):
        folder = write_model(tmp_path / str(number), std=0.3, eos_token_id=listed)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": beside, "temperature": 0.6}))
        other = load_checkpoint(folder, quantize=None, dtype=torch.float32)
        assert end_tokens(other, tokenizer) >= {free[4]}
        assert all(type(token) is int for token in end_tokens(other, tokenizer))
        assert generate_ids(other, tokenizer, ["b"], 10) == [free[: free.index(free[4])]], (listed, beside)
        save_checkpoint(other, tmp_path / f"{number} saved")
        saved = load_checkpoint(tmp_path / f"{number} saved", quantize=None, dtype=torch.float32)
        assert end_tokens(saved, tokenizer) == end_tokens(other, tokenizer), "a saved model ends where the first one did"


def test_text_and_its_ids_give_the_same_answer(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = generate(model, tokenizer, PROMPTS, 8)
    assert texts == generate(model, tokenizer, ids, 8)
    assert texts == [tokenizer.decode(answer) for answer in generate_ids(model, tokenizer, ids, 8)]
    assert generate(model, tokenizer, [], 8) == []


def test_modes_of_all_modules_are_put_back(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small
    model.train()
    model.model.layers[0].eval()                    # a mixed state, as after freezing a part
    before = [module.training for module in model.modules()]
    generate(model, tokenizer, ["a"], 2)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), evaluation_mode(model):
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before
    model.eval()


def test_bad_prompts_are_refused_before_the_model_runs(small: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = small
    with pytest.raises(CheckpointError, match="token id 259 is outside the embedding table of 259 rows"):
        generate_ids(model, tokenizer, [[256, 259]])
    with pytest.raises(ConfigError, match="prompt 2 of 2 has 250 tokens; with 7 more it exceeds the model's 256 positions"):
        generate_ids(model, tokenizer, [[1], [1] * 250], max_new_tokens=7)
    assert len(generate_ids(model, tokenizer, [[1] * 250], max_new_tokens=6)[0]) <= 6
    with pytest.raises(DataError, match="prompt 1 of 1 has no tokens"):
        generate_ids(model, tokenizer, [[]])
    for sizes in ({"max_new_tokens": 0}, {"batch_size": 0}, {"max_new_tokens": 2.5}, {"batch_size": "8"}):
        with pytest.raises(ConfigError, match="at least 1"):
            generate_ids(model, tokenizer, ["a"], **sizes)


def test_a_sliding_window_counts_tokens_and_not_padding(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", std=0.3, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=6)
    model, tokenizer = load_checkpoint(folder, quantize=None, dtype=torch.float32), read_tokenizer(folder)
    expected = [plain_greedy(model, tokenizer.encode(prompt), tokenizer.eos_id, 8) for prompt in PROMPTS]
    assert generate_ids(model, tokenizer, PROMPTS, 8, batch_size=6) == expected


@pytest.mark.parametrize("beginning", [0, 20])
def test_logits_that_are_not_finite_are_refused_and_no_answer_is_given(tmp_path: Path, beginning: int) -> None:
    model = load_checkpoint(write_model(tmp_path / "model"), quantize=None, dtype=torch.float32)
    tokenizer = read_tokenizer(tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ConfigError, match="logits are not finite in this compute type"):
        generate(model, tokenizer, ["a" * beginning + "b", "a" * beginning + "cd"], max_new_tokens=3)
