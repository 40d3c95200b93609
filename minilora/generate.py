"""Greedy decoding: the most probable token, again and again, until the end token.

    t₁ = argmax p(· | prompt),   t₂ = argmax p(· | prompt, t₁),   …

The prompt is read once; each later step feeds one token a row and finds the rest in the key/value cache.  Prompts of a
batch are padded on the left, so that the last column holds the last token of every row:

    <pad> <pad>  BOS  a          positions  -  -  0  1
     BOS    a     b   c                     0  1  2  3

Padding is never attended to and positions count real tokens, so an answer depends on its own prompt alone (up to the
rounding of the machine's products, whose order may change with a batch's shape; and of 16 bits, to which 4-bit weights are
rounded where several sequences meet them, not where one does: `NF4Tensor.fused_product`).

What all prompts of a batch begin with, such as an instruction, is read once, and its keys and values stand in every row of
the cache; the padding then lies behind it.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from minilora.data.prompts import check_ids
from minilora.errors import ConfigError, DataError
from minilora.llama.cache import KVCache
from minilora.llama.config import end_ids
from minilora.llama.decoding import token_step
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.tokenizer import Tokenizer

NOT_FINITE = "the model's logits are not finite in this compute type; use --dtype float32 or bfloat16"
SHARED_TOKENS = 16      # a shorter beginning costs a call of its own what it saves


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout for as long as the block lasts; then every module has its own mode back."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Trap: under inference_mode a buffer that a layer keeps for reuse could never again take part in training.
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def check_prompts(prompts: Sequence[Sequence[int]], model: LlamaForCausalLM, new_tokens: int) -> None:
    """Refuse prompts before one of them reaches the model.

    Args:
        prompts: token ids. new_tokens: what will stand behind each, in tokens.

    Raises:
        DataError: a prompt without tokens.
        CheckpointError: a token id outside the embedding table.
        ConfigError: a prompt and what follows exceed the model's positions.
    """
    rows, positions = model.model.embed_tokens.num_embeddings, model.config.max_position_embeddings
    for index, ids in enumerate(prompts):
        if not len(ids):
            raise DataError(f"prompt {index + 1} of {len(prompts)} has no tokens; give it text, or a tokenizer with a BOS")
        check_ids(ids, rows)
        if len(ids) + new_tokens > positions:
            raise ConfigError(f"prompt {index + 1} of {len(prompts)} has {len(ids)} tokens; with {new_tokens} more it "
                              f"exceeds the model's {positions} positions: shorten the prompt or the answer")


def generate(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str] | Sequence[Sequence[int]],
             max_new_tokens: int = 32, batch_size: int = 16) -> list[str]:
    """Continue prompts greedily.

    Args:
        prompts: texts, or token ids (BOS included, where the model has one).
        max_new_tokens: longest answer, in tokens. batch_size: prompts decoded together.

    Returns: the answers' texts, in the order of the prompts; prompt and special tokens left out.
    Raises: DataError, CheckpointError, ConfigError: as `generate_ids`.
    """
    return [tokenizer.decode(ids) for ids in generate_ids(model, tokenizer, prompts, max_new_tokens, batch_size)]


def generate_ids(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str] | Sequence[Sequence[int]],
                 max_new_tokens: int = 32, batch_size: int = 16) -> list[list[int]]:
    """Continue prompts greedily; the token ids of each answer without its end token (see `end_tokens`).

    Args: as `generate`.
    Raises:
        ConfigError: sizes below 1, or a prompt and its answer exceed the model's positions.
        CheckpointError: a token id outside the embedding table.
        DataError: a prompt without tokens.
    Guarantee: a prompt's answer is the same alone and in any batch, but for near ties that such rounding decides (see above;
        test_answers_do_not_depend_on_the_batch).
    """
    if not all(isinstance(size, int) and size >= 1 for size in (max_new_tokens, batch_size)):
        raise ConfigError(f"max_new_tokens and batch_size must be at least 1, not {max_new_tokens} and {batch_size}")
    if isinstance(prompts, str):            # Trap: a text is a sequence of texts, its characters
        raise ConfigError("prompts is a list of texts; put a single one into a list: [prompt]")
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    check_prompts(ids, model, max_new_tokens)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))      # alike in length: little padding
    answers: list[list[int]] = [[] for _ in ids]
    ends = end_tokens(model, tokenizer)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            written = _decode_batch(model, [ids[index] for index in indices], ends, max_new_tokens)
            for index, answer in zip(indices, written, strict=True):
                answers[index] = answer
    return answers


def end_tokens(model: LlamaForCausalLM, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's end token, and those of config.json and generation_config.json.

    Llama 3 names several.  `LlamaConfig.from_json` has put those of the two files together.
    """
    return frozenset(token for token in (tokenizer.eos_id, *end_ids(model.config.raw)) if token is not None)


def shared_beginning(prompts: Sequence[Sequence[int]], model: LlamaForCausalLM) -> int:
    """Tokens that all prompts begin with and that are worth being read once; every prompt keeps one of its own at least."""
    if len(prompts) < 2 or any(window is not None for window in model.config.sliding_windows):
        return 0                        # a window is counted in columns, between which padding would stand
    first, last = min(map(list, prompts)), max(map(list, prompts))     # what these share, all that lie between them share
    same = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    tokens = min(same, min(map(len, prompts)) - 1)
    return tokens if tokens >= SHARED_TOKENS else 0


def cache_for(model: LlamaForCausalLM, beginning: Sequence[int], batch: int, room: int) -> KVCache:
    """A cache whose sequences all begin with these tokens, read once."""
    cache = KVCache(model.config, batch, room, model.dtype, model.device)
    if beginning:
        shared = KVCache(model.config, 1, len(beginning), model.dtype, model.device)
        model.hidden(torch.tensor([list(beginning)], device=model.device), cache=shared)
        cache.start_with(shared)
    return cache


def _decode_batch(model: LlamaForCausalLM, prompts: list[list[int]], ends: frozenset[int],
                  max_new_tokens: int) -> list[list[int]]:
    batch, longest, shared = len(prompts), max(map(len, prompts)), shared_beginning(prompts, model)
    input_ids = torch.zeros(batch, longest - shared, dtype=torch.int64, device="cpu")      # (B, P)
    real = torch.ones(batch, longest + max_new_tokens, dtype=torch.bool, device="cpu")     # (B, shared + P + new)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = input_ids.new_tensor(ids[shared:])
        real[row, shared : shared + longest - len(ids)] = False
    mask = None if real.all() else real.to(model.device)
    input_ids = input_ids.to(model.device)
    cache = cache_for(model, prompts[0][:shared], batch, longest + max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * batch
    cache.step = token_step(model, cache)
    for _ in range(max_new_tokens):
        seen = None if mask is None else mask[:, : cache.length + input_ids.shape[1]]
        logits = model(input_ids, seen, cache=cache, last_only=True)[:, -1]
        tokens = logits.float().argmax(-1)              # (B,); of 16 bits torch takes four times as long
        if not bool(logits.gather(-1, tokens[:, None]).isfinite().all()):       # a NaN counts as the largest
            raise ConfigError(NOT_FINITE)
        for row, token in enumerate(tokens.tolist()):
            running[row] = running[row] and token not in ends
            if running[row]:
                answers[row].append(token)
        if not any(running):
            break
        input_ids = tokens[:, None]                     # a row that has ended goes on unread, until all have
    return answers
