"""One row as training sees it: the prompt around the note, where tokens begin and end, and which of them carry loss.

On a terminal tokens alternate between two shades, and those that carry loss are green; in plain text a token ends at `|`, and
those that carry loss stand in brackets:

    <s>|Note|:| CT| for| liver| lac|eration|⏎|In| short|:|[ CT][ Abdomen][ W][ Contrast][</s>]
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minilora.data.prompts import IGNORED, Template, encode_example, longest_label
from minilora.data.tables import label_set, training_examples
from minilora.errors import DataError
from minilora.llama.tokenizer import Tokenizer

SHADES = ("\x1b[48;5;254;38;5;16m", "\x1b[48;5;250;38;5;16m")       # background, and black on it
LOSS = ("\x1b[48;5;157;38;5;16m", "\x1b[48;5;114;38;5;16m")
PLAIN = "\x1b[0m"
CONTEXT = 8                     # tokens before one that say how it reads


@dataclass(frozen=True)
class Shown:
    """A row's tokens as text, which of them carry loss, and whether the note was shortened."""

    row: int
    tokens: list[str]
    carries_loss: list[bool]
    cut: bool
    template: str

    def __str__(self) -> str:
        prompt = len(self.tokens) - sum(self.carries_loss)
        return (f"row {self.row}: {len(self.tokens)} tokens, {prompt} of the prompt (template {self.template}), "
                f"{sum(self.carries_loss)} carry loss{'; the note was shortened' if self.cut else ''}")


def show_row(tokenizer: Tokenizer, template: Template, path: str | Path, number: int, max_length: int = 512,
             input_column: str = "input", label_column: str = "label") -> Shown:
    """A row of a table as `train` makes it.

    Args: number: as in messages, from 1. The rest as in `TrainConfig`.
    Raises: DataError, ConfigError, CheckpointError: as in training; also a row that isn't there.
    """
    rows = training_examples(path, input_column, label_column, min_labels=1)
    found = next((row for row in rows if row[2] == number), None)
    if found is None:
        raise DataError(f"{path} has no row {number}: its rows are {rows[0][2]} to {rows[-1][2]}")
    note, label, _ = found
    reserve = longest_label(tokenizer, label_set(label for _, label, _ in rows))
    example = encode_example(tokenizer, template, note, label, max_length, row=number, reserve=reserve)
    return Shown(number, token_texts(tokenizer, example.input_ids), [wanted != IGNORED for wanted in example.labels],
                 example.cut, template.name)


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; special tokens, and pieces of a character, by the tokenizer's own name for them."""
    texts = []
    for index, token in enumerate(ids):
        before = list(ids[max(0, index - CONTEXT) : index])
        without, text = tokenizer.decode(before), tokenizer.decode([*before, token])
        added = text[len(without) :] if text.startswith(without) else ""
        texts.append(added if added and "\ufffd" not in added else tokenizer.token(token) or f"<{token}>")
    return texts


def render(shown: Shown, colour: bool) -> str:
    """Tokens with their boundaries and the loss mask, then a line that counts them."""
    parts = []
    for index, (token, loss) in enumerate(zip(shown.tokens, shown.carries_loss, strict=True)):
        text = "".join(letter if letter == "\n" or letter.isprintable() else repr(letter)[1:-1] for letter in token)
        text = text.replace("\n", "⏎" if not colour else f"⏎{PLAIN}\n{(LOSS if loss else SHADES)[index % 2]}")
        if colour:
            parts.append(f"{(LOSS if loss else SHADES)[index % 2]}{text}{PLAIN}")
        else:
            parts.append(f"[{text}]" if loss else f"{text}|")
    return "".join(parts) + f"\n\n{shown}"
