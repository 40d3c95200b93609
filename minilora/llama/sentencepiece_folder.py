"""A tokenizer.model and the files beside it: tokens behind the pieces, and how transformers would cut a text around them."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minilora.errors import CheckpointError
from minilora.llama.encoders import SentencePieceEncoder
from minilora.llama.sentencepiece import CONTROL, UNKNOWN, SentencePieceModel, read_sentencepiece, to_tokenizers
from minilora.llama.strict_json import parse_object


def _added_tokens(folder: Path, files: dict[str, bytes]) -> dict[int, AddedToken]:
    """Tokens behind the SentencePiece pieces, from tokenizer_config.json or added_tokens.json, by id."""
    added: dict[int, AddedToken] = {}
    if "added_tokens.json" in files:
        source = str(folder / "added_tokens.json")
        for text, token_id in parse_object(files["added_tokens.json"], source).items():
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise CheckpointError(f"{source}: {text!r} must have a whole number as its id, found {token_id!r}")
            if token_id in added:
                raise CheckpointError(f"{source}: two tokens have the id {token_id}; fetch it again")
            added[token_id] = AddedToken(text, normalized=False)
    if "tokenizer_config.json" in files:
        source = str(folder / "tokenizer_config.json")
        decoder = parse_object(files["tokenizer_config.json"], source).get("added_tokens_decoder") or {}
        for number, entry in decoder.items() if isinstance(decoder, dict) else ():
            if not number.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                raise CheckpointError(f"{source}: added_tokens_decoder has a malformed entry {number!r}; fetch it again")
            flags = {flag: bool(entry.get(flag, False)) for flag in ("lstrip", "rstrip", "single_word", "special")}
            added[int(number)] = AddedToken(entry["content"], normalized=False, **flags)
    return added


@dataclass(frozen=True)
class SentencePieceFolder:
    """A tokenizer.model with what the files beside it add.

    Attributes:
        backend: merges and vocabulary, added tokens included. special: ids that are left out of decoded text.
        legacy: which chunks of a text get the prefix, see `encoders`.
    """

    model: SentencePieceModel
    backend: tokenizers.Tokenizer
    special: set[int]
    legacy: bool | None

    def encoder(self, control: set[int]) -> SentencePieceEncoder:
        """Its encoder, which reads every added token but `control` out of text."""
        added = sorted(self.backend.get_added_tokens_decoder().items())
        return SentencePieceEncoder(self.model, self.backend, [(token, token_id) for token_id, token in added
                                                               if token_id not in control], self.legacy)


def read_sentencepiece_folder(folder: Path, name: str, files: dict[str, bytes]) -> SentencePieceFolder:
    """Read a folder's tokenizer.model.

    Args: name: of that file. files: contents of tokenizer_config.json and added_tokens.json, where there are any.
    Raises: CheckpointError: one of the files is broken, or they do not fit each other; names it.
    """
    source = str(folder / "tokenizer_config.json")
    config = parse_object(files.get("tokenizer_config.json", b"{}"), source)
    legacy, prefix = _flag(config, "legacy", source), _flag(config, "add_prefix_space", source)
    model = read_sentencepiece(folder / name)
    if prefix is False:
        model = replace(model, add_dummy_prefix=False)
    backend = to_tokenizers(model)
    special = {number for number, piece in enumerate(model.pieces) if piece.kind in (CONTROL, UNKNOWN)}
    for token_id, token in sorted(_added_tokens(folder, files).items()):
        size = backend.get_vocab_size(with_added_tokens=True)
        known = backend.id_to_token(token_id)
        if known is None and token_id == size and backend.token_to_id(token.content) is None:
            plain = AddedToken(token.content, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip,
                               single_word=token.single_word)
            backend.add_tokens([plain])
        elif known != token.content:
            raise CheckpointError(f"{folder}: added token {token.content!r} has id {token_id}, but " +
                                  (f"that id is {known!r}" if known is not None else f"the next free id is {size}") +
                                  "; fetch the tokenizer's files of one upload")
        if token.special:
            special.add(token_id)
    return SentencePieceFolder(model, backend, special, legacy)


def _flag(config: dict[str, Any], key: str, source: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{source}: {key} must be true or false, not {value!r:.60}; fetch the file again")
    return value
