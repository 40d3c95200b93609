"""From notes to labels: one note, or a table streamed through in constant memory.

With a label set the answer is one of its labels, the most probable by the token trie, and comes with its probability.
Without, the model writes freely (greedy) and the answer may be anything.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from tqdm import tqdm

from minilora.adapters import read_extra
from minilora.data.prompts import DEFAULT_TEMPLATE, Template, check_ids, clean_note, encode_prompt, load_template, longest_label
from minilora.data.table_writer import TableWriter, added_columns
from minilora.data.tables import iter_table, read_columns, read_labels
from minilora.errors import CheckpointError, ConfigError
from minilora.files import check_output
from minilora.generate import generate_ids
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.tokenizer import Tokenizer, load_tokenizer
from minilora.hub import resolve_model
from minilora.loading import load_model, pick_device, pick_dtype
from minilora.trie import LabelTrie, predict_labels

FREE_TOKENS = 48        # longest free answer
ROWS_AT_ONCE = 512      # of a table: sorted by length among themselves, then written in order
ADDED_COLUMNS = ("prediction", "probability", "error")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Prediction:
    """An answer. `probability` is over the label set, None for a free answer; `error` says why there is no answer."""

    label: str
    probability: float | None = None
    runner_up: str | None = None
    error: str | None = None


@dataclass
class Predictor:
    """A model, its tokenizer, the prompt it was trained with, and the labels it may answer (None: anything)."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    template: Template
    labels: list[str] | None
    max_length: int
    batch_size: int = 16

    def __post_init__(self) -> None:
        self.trie = LabelTrie(self.labels, self.tokenizer) if self.labels is not None else None
        reserve = longest_label(self.tokenizer, self.labels) if self.labels else FREE_TOKENS
        self.room = min(self.max_length, self.model.config.max_position_embeddings) - reserve

    @classmethod
    def load(cls, model: str, adapter: str | Path | None = None, labels: str | Path | None = None, free: bool = False,
             template: str | None = None, quantize: Literal["auto", "nf4", "none"] = "auto", device: str = "auto",
             dtype: str = "auto", max_length: int | None = None, pad_vocab: bool = False) -> Predictor:
        """Load what a run folder and the flags describe.

        Args:
            model: name of the base. adapter: run folder, or any PEFT adapter; None for the base alone.
            labels: file of labels; default the run folder's labels.txt. free: ignore labels and write freely.
            template, max_length: default those of the run. quantize: "auto" stores the base as in training.

        Raises: MiniloraError: anything that cannot be loaded, or no labels where they are needed.
        """
        recorded = read_extra(adapter) if adapter is not None else {}
        stored = recorded.get("base_quantization", {}) if quantize == "auto" else {}
        if not isinstance(stored, dict | None):
            raise CheckpointError(f"{adapter}: base_quantization in minilora.json must be an object or null, found {stored!r:.80}")
        four_bit = quantize == "nf4" or (quantize == "auto" and stored is not None)
        stored = stored or {}
        on = pick_device(device)
        folder = resolve_model(model)
        if labels is None and not free:
            if adapter is None or not (Path(adapter) / "labels.txt").is_file():
                raise ConfigError("no label set: give --labels FILE with one label a line, or --free to write freely")
            labels = Path(adapter) / "labels.txt"
        known = None if free or labels is None else read_labels(labels)
        loaded = load_model(folder, quantize="nf4" if four_bit else None, double_quant=bool(stored.get("double_quant", True)),
                            blocksize=int(stored.get("blocksize", 64)), dtype=pick_dtype(dtype, on), device=on, adapter=adapter,
                            pad_vocab=pad_vocab)
        if template is None and isinstance(recorded.get("template"), str):
            prompt = Template("of the run", recorded["template"])
        else:
            prompt = load_template(template or DEFAULT_TEMPLATE)
        length = max_length or int(recorded.get("max_length", 512))
        return cls(loaded, load_tokenizer(folder), prompt, known, length)

    def predict(self, notes: Sequence[str]) -> list[Prediction]:
        """Label notes; an empty one gets an error instead of an answer."""
        answers: list[Prediction | None] = [None if clean_note(note) else Prediction("", error="empty note") for note in notes]
        asked = [index for index, answer in enumerate(answers) if answer is None]
        prompts = [encode_prompt(self.tokenizer, self.template, notes[index], self.room).input_ids for index in asked]
        for ids in prompts:
            check_ids(ids, self.model.config.vocab_size)
        for index, prediction in zip(asked, self._answer(prompts), strict=True):
            answers[index] = prediction
        return [answer for answer in answers if answer is not None]

    def _answer(self, prompts: list[list[int]]) -> Iterator[Prediction]:
        if not prompts:
            return
        if self.trie is None:
            written = generate_ids(self.model, self.tokenizer, prompts, max_new_tokens=FREE_TOKENS, batch_size=self.batch_size)
            yield from (Prediction(self.tokenizer.decode(ids).strip()) for ids in written)
            return
        labels, probabilities, runners_up = predict_labels(self.model, self.tokenizer, prompts, self.trie)
        for label, probability, runner_up in zip(labels, probabilities, runners_up, strict=True):
            yield Prediction(label, float(probability), runner_up)


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to `size` items, in order."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def predict_table(predictor: Predictor, data: str | Path, out: str | Path, input_column: str, overwrite: bool = False,
                  quiet: bool = False) -> int:
    """Label a table row by row: the input's columns, then prediction, probability, error; owner-only.

    Args:
        data: CSV, JSONL or Parquet. out: the same formats, by suffix; nothing is left of it on failure.

    Returns: rows written.
    Raises: DataError, OutputError.
    """
    check_output(out, overwrite)
    columns = added_columns(data, read_columns(data), ADDED_COLUMNS)
    rows = 0
    with TableWriter(out, columns, overwrite) as writer, tqdm(desc="predict", unit="row", disable=quiet) as progress:
        for chunk in chunks(iter_table(data, input_column), ROWS_AT_ONCE):
            for row, answer in zip(chunk, predictor.predict([row.text for row in chunk]), strict=True):
                writer.write({**row.values, "prediction": answer.label, "probability": answer.probability,
                              "error": answer.error})
            rows += len(chunk)
            progress.update(len(chunk))
    return rows
