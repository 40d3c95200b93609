"""Control tokens that a chat template names, read out of the template and not out of the note in it.

    <|im_start|>question      the template's: one token each
    …<|im_end|>…              the note's: letters
    <|im_end|>                the template's: the model's end token

Template and note are one text to the tokenizer, as they are to a serving stack: a BPE may merge where they meet, and some
tokenizers treat a text's beginning apart.  So the text is read whole, and each control token of the template stands in it as a
code point that no text may hold: Unicode keeps U+FDD0 to U+FDEF free for a program's own use.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

import tokenizers
from tokenizers import AddedToken

from minilora.errors import ConfigError
from minilora.llama.encoders import JsonEncoder, SentencePieceEncoder

MARK = 0xFDD0
_MARKS = re.compile("[\ufdd0-\ufdef]")


class ChatTemplates:
    """What a tokenizer has to know to read templates.

    Args: encoder: of plain text. control: ids that plain text cannot spell, fewer than 32; `bos_id` may be one.
    """

    def __init__(self, backend: tokenizers.Tokenizer, encoder: JsonEncoder | SentencePieceEncoder, control: Iterable[int],
                 bos_id: int | None) -> None:
        self._plain = encoder
        self._marked: JsonEncoder | SentencePieceEncoder | None = None
        self._added = backend.get_added_tokens_decoder()
        self._control = {backend.id_to_token(token_id) or "": token_id for token_id in sorted(control)}
        self._bos = None if bos_id is None else backend.id_to_token(bos_id)

    @cached_property
    def _names(self) -> re.Pattern[str]:
        # Every added token takes part, so that "<s>" inside of a longer one is none: the library takes the longest, too.
        names = sorted({*self._control, *(token.content for token in self._added.values())} - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def names_one(self, *texts: str) -> bool:
        """Whether one of a template's texts spells a control token."""
        return any(found[0] in self._control for text in texts for found in self._names.finditer(text))

    def marked(self, before: str, note: str, after: str) -> str:
        """The whole text with a mark in place of each control token of `before` and `after`.

        Raises: ConfigError: one of them is BOS.
        """
        marks = {name: chr(MARK + at) for at, name in enumerate(self._control)}

        def mark(found: re.Match[str]) -> str:
            if found[0] == self._bos:
                raise ConfigError(f"the template contains {found[0]!r}, this model's begin token; remove it: the tokenizer "
                                  "adds BOS, so with that text the model would see two")
            return marks.get(found[0], found[0])

        before, note, after = (_MARKS.sub("\ufffd", text) for text in (before, note, after))
        return self._names.sub(mark, before) + note + self._names.sub(mark, after)

    def encoder(self) -> JsonEncoder | SentencePieceEncoder:
        """Reads marks as the control tokens they stand for; made once."""
        if self._marked is None:
            marks = []
            for at, token_id in enumerate(self._control.values()):
                like = self._added.get(token_id, AddedToken("", normalized=False))
                marks.append((AddedToken(chr(MARK + at), normalized=like.normalized, lstrip=like.lstrip, rstrip=like.rstrip,
                                         single_word=like.single_word), token_id))
            self._marked = self._plain.with_marks(marks)
        return self._marked
