r"""Template, tokens, loss mask: how a note and its label become one training example.

    text       = template with "{input}" replaced by the note
    input_ids  = [BOS] tokens(text)      tokens(label) [EOS]
    labels     = -100 ... -100           tokens(label) [EOS]

The loss is taken where labels is not -100: on the label and on the end token, never on the prompt.

Trap: text and label are tokenized apart.  A BPE may merge across the joint (the tokens of "Label:" and of " CT" need
not be those of "Label: CT"), and at inference the label isn't there to merge with.  Apart, the ids that training saw
after the prompt are exactly those that greedy decoding, the label trie and a serving stack meet there: the joint at
training is the joint at inference.

Trap: BOS comes from the tokenizer alone.  "<s>" written into a template is one more, and a model never saw two.

Trap: a chat model's end token may stand in its template.  Spelled out as letters it is a prompt that the model never saw.

Lesson 10 explains it.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minilora.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from minilora.llama.tokenizer import Tokenizer

PLACEHOLDER = "{input}"
IGNORED = -100                                    # the label of a position without loss (torch's ignore_index)
JOINER = " ... "                                  # stands for what was cut out of a long note
_SPECIAL_TEXT = ("<s>", "</s>", "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPECIAL_IN_NOTE = re.compile(r"<(?=/?(?:s|unk|bos|eos|pad|cls|sep|eod|mask)>|\|\w+\|>)", re.IGNORECASE)


@dataclass(frozen=True)
class Template:
    """The text around a note; `text` holds exactly one "{input}" and none of the usual BOS and EOS texts.

    What else a model uses as its end token, such as "<|im_end|>" in a chat, may stand in it (see `encode_prompt`).

    Raises:
        ConfigError: the placeholder is absent or repeated, or the text spells a usual begin or end token.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        found = self.text.count(PLACEHOLDER)
        if found != 1:
            raise ConfigError(f"template {self.name}: found {PLACEHOLDER} {found} times; write it exactly once, "
                              "where the note goes")
        for special in _SPECIAL_TEXT:
            if special in self.text:
                raise ConfigError(f"template {self.name}: contains {special!r}; remove it: the tokenizer adds BOS and "
                                  "training adds EOS, so with that text the model would see two BOS or an early EOS")

    def fill(self, note: str) -> str:
        """Return the prompt's text.  Plain replacement: braces in a note mean nothing."""
        return self.text.replace(PLACEHOLDER, note)


TEMPLATES: dict[str, Template] = {
    "note": Template("note", "Note: {input}\nLabel:"),
    "inst": Template("inst", "[INST] {input} [/INST]"),        # Llama 2's chat models; plain text to a base model
    # What Meditron's question-answering descendants were tuned with (epfLLM/meditron); to the base itself it is plain text.
    "meditron": Template("meditron", "<|im_start|>question\n{input}<|im_end|>\n<|im_start|>answer\n"),
    "tiny": Template("tiny", "Note: {input}\nIn short:"),      # how the small model's pretraining text begins a reading
}
DEFAULT_TEMPLATE = "note"


def load_template(name_or_path: str) -> Template:
    """Return a built-in template by name, or read one from a UTF-8 file (its last line break is dropped).

    Raises:
        ConfigError: neither a name nor a file, not UTF-8, or a text that `Template` refuses.
    """
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    path = Path(name_or_path)
    available = f"{', '.join(sorted(TEMPLATES))}, or a UTF-8 file with one {PLACEHOLDER}"
    if not path.is_file():
        raise ConfigError(f"no template {name_or_path!r}; available: {available}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"template {path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"template {path}: cannot be read: {error.strerror or error}") from error
    return Template(str(path), text.replace("\r\n", "\n").removesuffix("\n"))


def clean_note(note: str) -> str:
    r"""Return `note` in the one form that training, prediction and serving tokenize.

    Rules, in order: CRLF and lone CR become "\n"; every other control character but tab (NUL, form feed, C1) becomes
    one space, so that words it separated stay apart; a lone surrogate becomes U+FFFD; "<" that opens the spelling of a
    special token ("<s>", "</s>", "<|...|>") gets a space after it, because serving stacks read such text as the token
    and would end the prompt there; white space around the note goes.  All else stays: letters, signs, case, spacing.

    Guarantee: idempotent (test_clean_note_is_idempotent).
    """
    note = note.replace("\r\n", "\n").replace("\r", "\n")
    note = _CONTROL.sub(" ", note)
    note = _SURROGATE.sub("\ufffd", note)
    return _SPECIAL_IN_NOTE.sub("< ", note).strip()


@dataclass(frozen=True)
class Encoded:
    """A prompt's tokens: `input_ids` with BOS first; `cut` tells whether the note had to be shortened."""

    input_ids: list[int]
    cut: bool


def encode_prompt(tokenizer: Tokenizer, template: Template, note: str, max_tokens: int) -> Encoded:
    """Return the tokens of the filled template, BOS first, at most `max_tokens` of them.

    The ids are always those of one whole text, so a serving stack that tokenizes that text gets the same ids.  A control
    token that the template spells, such as the end token "<|im_end|>" of a chat model, is that token; one that a note
    spells is text (a stack that reads it as the token gets others there).  A note too long keeps the first 2/3 and the
    last 1/3 of the tokens there is room for, joined by " ... " (history stands first in an order and the question often
    last); the text is tokenized again, and the note shortened further by the excess, until it fits.

    Args:
        note: raw text; `clean_note` is applied here.
        max_tokens: the prompt's bound, BOS and template included.

    Raises:
        ConfigError: the template alone is longer than `max_tokens`, or it spells the tokenizer's begin token.
    """
    def filled(with_note: str) -> list[int]:
        return tokenizer.encode_prompt(before, with_note, after)

    note, (before, after) = clean_note(note), template.text.split(PLACEHOLDER)
    ids = filled(note)
    if len(ids) <= max_tokens:
        return Encoded(ids, cut=False)
    note_ids = tokenizer.encode(note, bos=False)
    empty = filled(JOINER)
    keep = min(max_tokens - len(empty), len(note_ids) - 1)
    while keep >= 0:
        head = (2 * keep + 2) // 3
        # Trap: note_ids[-0:] is the whole note.
        tail = note_ids[len(note_ids) - (keep - head):]
        # A cut may split the bytes of one character, which decode to U+FFFD: dropped on the cut's two sides.
        short = tokenizer.decode(note_ids[:head]).rstrip("\ufffd") + JOINER + tokenizer.decode(tail).lstrip("\ufffd")
        ids = filled(clean_note(short))
        if len(ids) <= max_tokens:
            return Encoded(ids, cut=True)
        keep -= max(1, len(ids) - max_tokens)
    raise ConfigError(f"max_length leaves {max_tokens} tokens for the prompt, but template {template.name} with an "
                      f"empty note takes {len(empty)}; raise --max-length or shorten the template")


def encode_label(tokenizer: Tokenizer, label: str) -> list[int]:
    """Return the tokens after a prompt: the stripped label's own, then EOS.  Training and the label trie use these.

    Raises:
        DataError: the label is empty.
        CheckpointError: the tokenizer has no end token.
    """
    label = label.strip()
    if not label:
        raise DataError("a label is empty; fill it in or remove its row")
    if tokenizer.eos_id is None:
        raise CheckpointError("the tokenizer names no end token, so an answer could not end; set eos_token in its "
                              "tokenizer_config.json")
    return [*tokenizer.encode(label, bos=False), tokenizer.eos_id]


def longest_label(tokenizer: Tokenizer, labels: Iterable[str]) -> int:
    """Return the number of tokens to reserve for a label and its end token: that of the longest one.

    Raises:
        DataError: two labels are the same tokens, so no answer could be told for the one or the other.
    """
    written: dict[tuple[int, ...], str] = {}
    for label in labels:
        twin = written.setdefault(tuple(encode_label(tokenizer, label)), label)
        if twin != label:
            raise DataError(f"labels {twin!r} and {label!r} differ only by characters that the tokenizer does not know; keep "
                            "one of them, or spell them in others")
    return max(map(len, written))


@dataclass(frozen=True)
class Example:
    """One training example: `input_ids` and `labels` of equal length, `row` in its file, `cut` as in `Encoded`."""

    input_ids: list[int]
    labels: list[int]
    row: int = 0
    cut: bool = False

    @property
    def label_tokens(self) -> int:
        """Positions that carry loss."""
        return sum(label != IGNORED for label in self.labels)


def encode_example(tokenizer: Tokenizer, template: Template, note: str, label: str, max_length: int, *, row: int = 0,
                   reserve: int | None = None) -> Example:
    """Return one training example of at most `max_length` tokens; only the note is ever shortened.

    Args:
        max_length: bound on prompt, label and end token together, in tokens.
        row: row number in the data file, for messages.
        reserve: tokens kept free for label and end token; None takes this label's own.  Trap: with None, where a long
            note is cut depends on its label, which prediction doesn't know; `longest_label` of the label set, here and
            in prediction (max_tokens = max_length - reserve), cuts both alike.

    Raises:
        ConfigError: label and end token leave no room for the prompt.
        DataError: the label is empty.

    Guarantee: `encode_prompt` with the same room is a prefix of `input_ids` (test_prompt_is_a_prefix_of_the_example).
    """
    answer = encode_label(tokenizer, label)
    room = max_length - max(len(answer), reserve or 0)
    if room < 1:
        raise ConfigError(f"max_length {max_length} leaves no room for a prompt: label and end token of row {row} take "
                          f"{max_length - room}; raise --max-length")
    prompt = encode_prompt(tokenizer, template, note, room)
    return Example(input_ids=[*prompt.input_ids, *answer], labels=[IGNORED] * len(prompt.input_ids) + answer, row=row,
                   cut=prompt.cut)


def check_ids(ids: Sequence[int], rows: int) -> None:
    """Refuse token ids outside an embedding table of `rows` rows before one of them indexes it.

    Raises:
        CheckpointError: an id is negative or past the table (Meditron's .bin upload has 32,000 rows for 32,017 tokens).
    """
    if not len(ids):
        return
    bad = next((index for index in (max(ids), min(ids)) if not 0 <= index < rows), None)
    if bad is not None:
        raise CheckpointError(f"token id {bad} is outside the embedding table of {rows} rows (ids 0 to {rows - 1}): "
                              "tokenizer and weights differ; use the tokenizer of these weights, or --pad-vocab")
