"""New tokens for words that a tokenizer knows only in pieces: its merging goes on where its training stopped.

A tokenizer cuts a language that it was not trained on into scraps, and a small model has to learn to put them together again
before it can learn what they mean.  Byte-pair encoding (Sennrich et al., arXiv 1508.07909) goes on here over other text: the
most frequent pair of neighbouring tokens becomes a token, again and again, until there are enough or none is frequent.

    (a, b) = argmax Σ_words count(word) · pairs a b in it,        a b → new token

Merges of before come first, so a text without the new words keeps its tokens.  A new token's row in embedding and head starts
as the mean of the rows of the tokens that spelled it, and has to be trained.
"""
from __future__ import annotations

import dataclasses
import heapq
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import nn

from minilora.errors import ConfigError
from minilora.files import write_json
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.strict_json import read_object
from minilora.llama.tokenizer import Tokenizer, read_tokenizer

FOREIGN = 2.5   # tokens a word from which a tokenizer does not know a language: 1.2 to 1.4 is English to one of English
LEAST = 5       # times that a pair stands in the text; a rarer one says little, and may be somebody's name


def tokens_a_word(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Tokens into which a word of letters is cut, on average; 0 where there is none."""
    words = Counter(word for text in texts for word in re.findall(r"[^\W\d_]+", text))
    return sum(len(tokenizer.encode(f" {word}", bos=False)) * n for word, n in words.items()) / max(1, words.total())


def of_language(scraps: float) -> str:
    """What to tell of notes whose words are cut into so many tokens; nothing where the tokenizer knows their language."""
    if scraps <= FOREIGN:
        return ""
    return (f"a word is cut into {scraps:.1f} tokens: the tokenizer does not know this language; a small model whose tokenizer "
            "is like that of tiny, Llama 3 or Qwen2 learns it better with --tune full --quantize none --new-tokens 4000")


def learn_merges(words: Sequence[tuple[list[int], int]], limit: int, least: int = LEAST, first: int = 0
                 ) -> list[tuple[int, int]]:
    """Pairs of tokens to merge, in order; merge i makes token ``first + i``.

    Args: words: token ids of each different word, and how often it stands in the text. limit: merges at most.
    Guarantee: the same as counting all pairs anew for each merge, the smaller pair first where two are as frequent
        (tests/llama/test_new_tokens.py).
    """
    sequences, counts = [ids for ids, _ in words], [count for _, count in words]
    found, places = Counter[tuple[int, int]](), defaultdict[tuple[int, int], set[int]](set)
    for at, ids in enumerate(sequences):
        for pair in pairwise(ids):
            found[pair] += counts[at]
            places[pair].add(at)
    heap = [(-count, pair) for pair, count in found.items()]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and len(merges) < limit:
        count, pair = heapq.heappop(heap)
        if -count != found[pair]:               # an entry that later merges made old
            continue
        if -count < least:
            break
        changed = set[tuple[int, int]]()
        for at in places.pop(pair):
            for old in pairwise(sequences[at]):
                found[old] -= counts[at]
                changed.add(old)
            sequences[at] = _merged(sequences[at], pair, first + len(merges))
            for new in pairwise(sequences[at]):
                found[new] += counts[at]
                places[new].add(at)
                changed.add(new)
        merges.append(pair)
        for other in changed:
            if found[other] > 0:
                heapq.heappush(heap, (-found[other], other))
    return merges


def _merged(ids: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """The word with each `pair` in it, from the left, made `token`."""
    kept: list[int] = []
    for at in ids:
        if kept and (kept[-1], at) == pair:
            kept[-1] = token
        else:
            kept.append(at)
    return kept


def learn_tokens(tokenizer: Tokenizer, texts: Iterable[str], limit: int, first: int) -> Tokenizer:
    """A tokenizer that has at most `limit` tokens more, learnt of what stands `LEAST` times in the texts.

    Args: first: rows of the model's embedding; the new tokens' ids start there, or behind the tokenizer's own.
    Raises: ConfigError: its file is no byte-pair encoding that cuts a text into words first (tokenizer.json of Llama 3, Qwen2,
        the small model).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(folder)
        content = read_object(path) if path.is_file() else {}
        model = content.get("model") or {}
        if model.get("type", "BPE") != "BPE" or not content.get("pre_tokenizer") or "vocab" not in model:
            raise ConfigError("new_tokens needs a tokenizer.json that cuts text into words and merges bytes (Llama 3, Qwen2, "
                              "tiny); this model's is of another kind")
        backend = tokenizers.Tokenizer.from_file(str(path))
        counts = Counter[str]()
        for text in texts:
            text = backend.normalizer.normalize_str(text) if backend.normalizer else text
            counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
        words = [([token.id for token in backend.model.tokenize(word)], count) for word, count in counts.items()]
        first = max(first, tokenizer.vocab_size)
        _add(content, learn_merges(words, limit, first=first), first)
        write_json(path, content)
        (Path(folder) / "tokenizer.model").unlink(missing_ok=True)      # it would tell other tools of another vocabulary
        return read_tokenizer(folder)


def _add(content: dict[str, Any], merges: list[tuple[int, int]], first: int) -> None:
    """Put merges into the content of a tokenizer.json."""
    vocab: dict[str, int] = content["model"]["vocab"]
    # Trap: the library numbers added tokens behind the vocabulary, wherever they were, unless the vocabulary has them.
    for token in content.get("added_tokens") or []:
        vocab.setdefault(token["content"], token["id"])
    spelling = {token_id: text for text, token_id in vocab.items()}
    written = content["model"].setdefault("merges", [])
    as_text = bool(written) and isinstance(written[0], str)
    free = first
    for number, (left, right) in enumerate(merges):
        a, b = spelling[left], spelling[right]
        spelling[first + number] = a + b
        if a + b not in vocab:                  # else it is made in two ways
            vocab[a + b], free = free, free + 1
        written.append(f"{a} {b}" if as_text else [a, b])


def pieces(before: Tokenizer, after: Tokenizer, first: int) -> list[list[int]]:
    """What each token of `after` from id `first` on was to `before`: its token ids."""
    return [before.spell(after.token(token_id) or "") for token_id in range(first, after.vocab_size)]


@torch.no_grad()
def add_rows(model: LlamaForCausalLM, of: list[list[int]]) -> None:
    """Give embedding and head a row for each new token, the mean of the rows of the tokens that it is made of."""
    def grown(table: torch.Tensor) -> nn.Parameter:
        rows = [table[ids].float().mean(0) if ids else table.float().mean(0) for ids in of]
        return nn.Parameter(torch.cat([table, torch.stack(rows).to(table.dtype)]) if rows else table.detach().clone())

    embedding, head = model.model.embed_tokens, model.lm_head
    tied = head.weight is embedding.weight
    embedding.weight = grown(embedding.weight)
    head.weight = embedding.weight if tied else grown(head.weight)
    embedding.num_embeddings = head.out_features = len(embedding.weight)
    raw = {**model.config.raw, "vocab_size": len(embedding.weight)}
    model.config = dataclasses.replace(model.config, vocab_size=len(embedding.weight), raw=raw)
