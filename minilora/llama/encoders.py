"""Text to token ids, by a tokenizer.json or by a SentencePiece model; BOS and control tokens are the business of `tokenizer`.

A tokenizer.json is followed by the `tokenizers` library.  For a SentencePiece model the library only merges; what
SentencePiece does before that is done here, chunk by chunk between added tokens:

    replace     the table of replacements (`charsmap`)
    squeeze     spaces at the ends go and several become one, if the model says so
    prefix      one space in front, if the model says so
    escape      a space becomes "▁"

**Which chunks get the prefix** SentencePiece does not say, as it knows no added tokens.  transformers does, by "legacy" in
tokenizer_config.json, and it is followed (5.24, LlamaTokenizer):

    true        every chunk that does not begin with a space
    false       the text's first one, if it does not begin with a space
    absent      the text's first one, as under false, but whatever it begins with, as in SentencePiece

Pieces are merged by their scores always; transformers 5 takes their order in the vocabulary, which differs where spaces run
together.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import AddedToken, models

from minilora.llama.charsmap import Charsmap
from minilora.llama.sentencepiece import SPACE, SentencePieceModel


class JsonEncoder:
    """A tokenizer.json's."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def ids(self, text: str) -> list[int]:
        """Token ids of a text; no BOS is added, and special tokens are not read out of it."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def with_marks(self, marks: Sequence[tuple[AddedToken, int]]) -> JsonEncoder:
        """The same encoder, which also reads these added tokens out of text and gives each the id beside it."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True            # the library does not write it
        backend.add_tokens([mark for mark, _ in marks])
        return _Renamed(backend, _names(backend, marks))


class _Renamed(JsonEncoder):
    def __init__(self, backend: tokenizers.Tokenizer, names: dict[int, int]) -> None:
        super().__init__(backend)
        self._names = names

    def ids(self, text: str) -> list[int]:
        return [self._names.get(token, token) for token in super().ids(text)]


class SentencePieceEncoder:
    """A SentencePiece model's.

    Args: backend: its merges (`to_tokenizers`). added: the tokens that are read out of text, and their ids. legacy: as above.
    Guarantee: without added tokens and `legacy` the ids of the sentencepiece library (tests/peers/test_normalization.py), and
        with either those of transformers, its merges put right (tests/peers/test_legacy.py).
    """

    def __init__(self, model: SentencePieceModel, backend: tokenizers.Tokenizer, added: Sequence[tuple[AddedToken, int]],
                 legacy: bool | None = None) -> None:
        self._model, self._backend, self._added, self._legacy = model, backend, tuple(added), legacy
        self._merges, self._charsmap = backend.model, Charsmap(model.charsmap)
        self._cut = tokenizers.Tokenizer(models.BPE())      # a vocabulary of nothing but added tokens: all else gives no token
        self._cut.add_tokens([token for token, _ in added])
        self._names = _names(self._cut, added)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text; no BOS is added, and control pieces never come out of it."""
        found = self._cut.encode(text, add_special_tokens=False)
        ids, at = list[int](), 0
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            ids += [*self._chunk(text[at:start], at == 0), self._names[token]]
            at = end
        return ids + self._chunk(text[at:], at == 0)

    def with_marks(self, marks: Sequence[tuple[AddedToken, int]]) -> SentencePieceEncoder:
        """The same encoder, which also reads these added tokens out of text and gives each the id beside it."""
        return SentencePieceEncoder(self._model, self._backend, (*self._added, *marks), self._legacy)

    def _chunk(self, text: str, first: bool) -> list[int]:
        return [token.id for token in self._merges.tokenize(self.normalized(text, first))] if text else []

    def normalized(self, text: str, first: bool = True) -> str:
        """The form of a chunk that is merged: of the text's `first`, or of one behind an added token."""
        model = self._model
        if not text:
            return ""
        if not model.charsmap and not model.remove_extra_whitespaces:
            body = text
        elif not model.remove_extra_whitespaces:
            body = "".join(self._charsmap.parts(text))
        else:
            body = _squeezed(self._charsmap.parts(text) if model.charsmap else re.split("( )", text))
        space = SPACE if model.escape_whitespaces else " "
        if model.escape_whitespaces:
            body = body.replace(" ", SPACE)
        if model.add_dummy_prefix and (first or self._legacy) and not (self._legacy is not None and body.startswith(space)):
            body = space + body
        # Trap: behind the escape a "▁" of the text cannot be told from a space, and the prefix of nothing is one, too.
        return body.rstrip(space) if model.remove_extra_whitespaces else body


def _names(backend: tokenizers.Tokenizer, tokens: Sequence[tuple[AddedToken, int]]) -> dict[int, int]:
    """By the backend's ids of the tokens, the ids they shall have."""
    found = {backend.token_to_id(token.content): token_id for token, token_id in tokens}
    return {token: token_id for token, token_id in found.items() if token is not None}


def _squeezed(parts: Iterable[str]) -> str:
    """The parts without spaces at the front of the text or behind a part that ends with one."""
    kept, after_space = list[str](), True
    for part in parts:
        part = part.lstrip(" ") if after_space else part
        if part:
            kept.append(part)
            after_space = part.endswith(" ")
    return "".join(kept)
