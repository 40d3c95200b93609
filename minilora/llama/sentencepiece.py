"""A SentencePiece BPE model (`tokenizer.model`, as Llama 2 ships it), turned into a `tokenizers` BPE.

The file is a protocol buffer: a list of (piece, score, type), and the trainer's and normalizer's settings.  SentencePiece
starts from single characters and merges, again and again, the neighbours whose union is the piece of the highest score;
on a tie the leftmost; what is done to a text before that is in `encoders`.  `tokenizers` ranks *pairs* instead, so every
piece gives one pair per way of cutting it in two, ranked by the piece's score.  Characters without a piece become their UTF-8
bytes, `<0x0A>` and so on.

Guarantee: the same ids as the sentencepiece library on any text (tests/peers/test_sentencepiece.py).
Source: sentencepiece_model.proto and bpe_model.cc in google/sentencepiece.
"""
from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from minilora.errors import CheckpointError
from minilora.llama.charsmap import check_charsmap
from minilora.llama.strict_json import read_bytes

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6      # SentencePiece.Type
BPE = 2                                                                      # TrainerSpec.ModelType
LARGEST = 32 << 20      # bytes of a file; 256,000 pieces take four million
LONGEST = 256           # characters of a piece that merges make: each is cut everywhere, and SentencePiece's own limit is 16
SPACE = "▁"                                                                  # U+2581 stands for a space


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the list."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` says, as far as encoding needs it; an id is None where the model has no such token."""

    pieces: list[Piece]
    byte_fallback: bool
    unk_id: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 number, low groups first: (value, position behind it)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than ten bytes")


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (field number, value) pairs of one protocol buffer message; nested messages and strings come as bytes.

    Raises: ValueError or IndexError: the bytes are no message.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if number == 0 or at + size > len(data):
            raise ValueError("a field runs past the end")
        yield number, data[at:at + size]
        at += size


def _piece(data: bytes) -> Piece:
    message = dict(fields(data))
    text, score, kind = message.get(1, b""), message.get(2, b"\0\0\0\0"), message.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece of the wrong types")
    return Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], kind)


def _settings(message: dict[int, list[int | bytes]], number: int) -> dict[int, int | bytes]:
    parts = [data for data in message.get(number, []) if isinstance(data, bytes)]
    if len(parts) != len(message.get(number, [])):
        raise ValueError("settings of the wrong type")
    return dict(fields(b"".join(parts)))         # a message that stands in parts is their sum


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model`.

    Raises: CheckpointError: not a SentencePiece model, cut short, or of a kind that this reader does not know: unigram,
        user-defined or unused pieces, spaces behind the words.
    """
    data = read_bytes(path, LARGEST)
    try:
        message: dict[int, list[int | bytes]] = {}
        for number, value in fields(data):
            message.setdefault(number, []).append(value)
        pieces = [_piece(value) for value in message.get(1, []) if isinstance(value, bytes)]
        trainer, normalizer = _settings(message, 2), _settings(message, 3)
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model, or cut short ({error}); fetch it again") from error
    if not pieces:
        raise CheckpointError(f"{path}: not a SentencePiece model: it holds no pieces; fetch it again")
    kind = trainer.get(3, 1)
    if kind != BPE:
        raise CheckpointError(f"{path}: a SentencePiece model of type {kind!r}; only BPE (2), Llama's, is read: use "
                              "a folder with tokenizer.json")
    if trainer.get(24, 0):
        raise CheckpointError(f"{path}: has spaces behind the words (treat_whitespace_as_suffix), which this reader does not "
                              "know; use a folder with tokenizer.json")
    if any(not math.isfinite(piece.score) for piece in pieces):
        raise CheckpointError(f"{path}: a piece's score is no number; fetch the file again")
    if any(len(piece.text) > LONGEST for piece in pieces):
        raise CheckpointError(f"{path}: a piece has more than {LONGEST} characters; fetch the file again")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise CheckpointError(f"{path}: the same piece stands twice; fetch the file again")
    # Pieces that are always matched whole, or merged and taken apart again, follow other rules; Llama's files have none.
    if any(piece.kind in (USER_DEFINED, UNUSED) for piece in pieces):
        raise CheckpointError(f"{path}: holds user-defined or unused pieces, which this reader does not know; use a folder "
                              "with tokenizer.json")

    def id_of(field: int, default: int) -> int | None:
        value = trainer.get(field, default)
        return value if isinstance(value, int) and 0 <= value < len(pieces) else None      # -1, a huge varint, means none

    charsmap = normalizer.get(2, b"")
    try:
        check_charsmap(charsmap if isinstance(charsmap, bytes) else b"?")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; fetch the file again") from None
    return SentencePieceModel(
        pieces, bool(trainer.get(35, 0)), id_of(40, 0) or 0, id_of(41, 1), id_of(42, 2), id_of(43, -1),
        charsmap if isinstance(charsmap, bytes) else b"",
        bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)), bool(normalizer.get(5, 1)))


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every pair whose union is a piece, the best score first.

    Pairs of one piece stand in the order of their cut: "a|bc" before "ab|c".
    """
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    ranked = []
    for order, (text, score) in enumerate(scores.items()):
        for cut in range(1, len(text)):
            if text[:cut] in scores and text[cut:] in scores:
                ranked.append((-score, order, cut, text))
    return [(text[:cut], text[cut:]) for _, _, cut, text in sorted(ranked)]


def to_tokenizers(model: SentencePieceModel) -> Tokenizer:
    """The merges and the way back to text in the `tokenizers` library.

    Its normalizer is left empty: a text has to go through `encoders.SentencePieceEncoder`.
    """
    vocab = {piece.text: number for number, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges_of(model.pieces), byte_fallback=model.byte_fallback,
                                     unk_token=model.pieces[model.unk_id].text, fuse_unk=True))
    undo: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer
