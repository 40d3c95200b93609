"""From notes to labels: one note, or a table streamed through in constant memory.

With a label set the answer is one of its labels, the most probable by the token trie, and comes with its probability.
Without, the model writes freely (greedy) and the answer may be anything.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from tqdm import tqdm

from minilora.adapters import EXTRA_FILE, base_quantization, read_adapter_config, read_extra
from minilora.audit_log import Tally
from minilora.data.formats import table_format
from minilora.data.prompts import (
    DEFAULT_TEMPLATE,
    Template,
    check_ids,
    clean_note,
    encode_prompt,
    load_template,
    longest_label,
)
from minilora.data.table_writer import TableWriter, added_columns
from minilora.data.tables import iter_table, read_columns, read_labels
from minilora.errors import CheckpointError, ConfigError, DataError, OutputError
from minilora.files import check_output_file
from minilora.generate import generate_ids
from minilora.hub import resolve_model
from minilora.identity import fingerprint
from minilora.journal import Journal, check_unfinished
from minilora.layers.qlora import Quantization
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.tokenizer import Tokenizer, read_tokenizer
from minilora.loading import load_model, pick_device, pick_dtype
from minilora.malloc import keep_freed_memory
from minilora.trie import LabelTrie, score_labels

FREE_TOKENS = 48        # longest free answer
ROWS_AT_ONCE = 512      # of a table: sorted by length among themselves, then written in order
RANKED = 5              # most probable labels that are kept of each row
ADDED_COLUMNS = ("prediction", "probability", "error", "runner_up", "runner_up_probability")
ADDED_NUMBERS = ("probability", "runner_up_probability")        # of these; the others are text
ERROR = ADDED_COLUMNS.index("error")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Prediction:
    """An answer.

    Attributes:
        label: "" where there is none. error: why there is none.
        probability: over the label set; None for a free answer. runner_up, runner_up_probability: the second most probable.
        ranked: the most probable labels, at most `RANKED`, the answer first; none for a free answer.
    """

    label: str
    probability: float | None = None
    runner_up: str | None = None
    error: str | None = None
    runner_up_probability: float | None = None
    ranked: tuple[str, ...] = ()

    @property
    def cells(self) -> tuple[str | float | None, ...]:
        """What stands in `ADDED_COLUMNS`."""
        return self.label, self.probability, self.error, self.runner_up, self.runner_up_probability


@dataclass
class Predictor:
    """A model, its tokenizer, the prompt it was trained with, and the labels it may answer (None: anything).

    `name` and `adapter` say where the model came from, for the records.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    template: Template
    labels: list[str] | None
    max_length: int
    batch_size: int = 16
    name: str = ""
    adapter: Path | None = None

    def __post_init__(self) -> None:
        self.trie = LabelTrie(self.labels, self.tokenizer) if self.labels is not None else None
        reserve = longest_label(self.tokenizer, self.labels) if self.labels else FREE_TOKENS
        self.room = min(self.max_length, self.model.config.max_position_embeddings) - reserve

    @classmethod
    def load(cls, model: str, adapter: str | Path | None = None, labels: str | Path | None = None, free: bool = False,
             template: str | None = None, quantize: Literal["auto", "nf4", "none"] = "auto", device: str = "auto",
             dtype: str = "auto", max_length: int | None = None, pad_vocab: bool = False,
             cache: bool = False, quiet: bool = False) -> Predictor:
        """Load what a run folder and the flags describe; everything small is read before the weights.

        Args:
            model: name of the base; a fully tuned or merged model is one that brings its labels and its prompt along.
            adapter: run folder, or PEFT's as `read_adapter_config` takes it; None for the model alone.
            labels: file of labels; default the run folder's labels.txt. free: ignore labels and write freely.
            template, max_length: default those of the run. quantize: "auto" stores the base as in training.
            pad_vocab, cache: as in `load_model`. quiet: show no bars of a download.

        Raises: MiniloraError: anything that cannot be loaded, or no labels where they are needed.
        """
        on = pick_device(device)
        compute = pick_dtype(dtype, on)
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length must be at least 1, not {max_length}")
        folder = resolve_model(model, progress=not quiet)
        if adapter is not None:
            read_adapter_config(adapter)
        run = Path(adapter) if adapter is not None else folder
        recorded, stored = read_extra(run), base_quantization(run)
        if labels is None and not free:
            labels = run / "labels.txt"
            if not labels.is_file():
                raise ConfigError("no label set: give --labels FILE with one label a line, or --free to write freely")
        known = None if free or labels is None else read_labels(labels)
        written, length = recorded.get("template", load_template(DEFAULT_TEMPLATE).text), recorded.get("max_length", 512)
        if not isinstance(written, str) or type(length) is not int:
            raise CheckpointError(f"{run / EXTRA_FILE}: template must be a text and max_length a whole number")
        prompt = load_template(template) if template else Template(f"of {run}", written)
        tokenizer = read_tokenizer(folder)
        keep_freed_memory()
        four_bit = quantize == "nf4" or (quantize == "auto" and stored is not None)
        how = stored or Quantization()
        loaded = load_model(folder, quantize="nf4" if four_bit else None, double_quant=how.double_quant,
                            blocksize=how.blocksize, dtype=compute, device=on, adapter=adapter, pad_vocab=pad_vocab,
                            cache=cache)
        return cls(loaded, tokenizer, prompt, known, max_length or length, name=model,
                   adapter=Path(adapter) if adapter is not None else None)

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
        best = score_labels(self.model, self.trie, prompts).topk(min(RANKED, len(self.trie)), dim=-1)
        for codes, chances in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True):
            ranked = tuple(self.trie.labels[code] for code in codes)
            second = (ranked[1], chances[1]) if len(ranked) > 1 else (None, None)
            yield Prediction(ranked[0], chances[0], second[0], None, second[1], ranked)


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to `size` items, in order."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def check_tables(data: str | Path, out: str | Path, input_column: str, overwrite: bool = False,
                 resume: bool = False) -> list[str]:
    """Find what would stop `predict_table` at its first row, so that no model need be loaded for it.

    Returns: the columns of the output.
    Raises: DataError, OutputError. ConfigError: both to go on and to begin anew.
    """
    if overwrite and resume:
        raise ConfigError("--resume goes on and --overwrite begins anew; give one of the two")
    table_format(Path(out), None, OutputError)
    check_output_file(out, overwrite, reads=(data,))
    check_unfinished(out, resume, overwrite)
    columns = added_columns(data, read_columns(data), ADDED_COLUMNS)
    next(iter_table(data, input_column))
    return columns


def _identity(predictor: Predictor, input_column: str) -> str:
    """A hash of everything that decides an answer beside the note."""
    decides = [fingerprint(predictor.model), predictor.labels, predictor.template.text, predictor.max_length,
               predictor.batch_size, input_column, ROWS_AT_ONCE]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def predict_table(predictor: Predictor, data: str | Path, out: str | Path, input_column: str, overwrite: bool = False,
                  quiet: bool = False, resume: bool = False, tally: Tally | None = None) -> int:
    """Label a table row by row: the input's columns, then `ADDED_COLUMNS`; owner-only, in constant memory.

    Args:
        data: CSV, JSONL or Parquet. out: the same formats, by suffix; it appears whole or not at all.
        resume: go on where an earlier call for `out` was interrupted (`journal`), if one was.
        tally: counts the rows, also of a call that fails.

    Returns: rows written.
    Raises: DataError, OutputError, ConfigError. What was answered until then is kept for `resume`.
    Guarantee: rows keep their order; killed and resumed, the bytes are the same (tests/test_resume.py).
    """
    columns = check_tables(data, out, input_column, overwrite, resume)
    rows = 0
    with (Journal(Path(out), _identity(predictor, input_column), resume) as journal,
          TableWriter(out, columns, overwrite) as writer, tqdm(desc="predict", unit="row", disable=quiet) as progress):
        try:
            for chunk in chunks(iter_table(data, input_column), ROWS_AT_ONCE):
                notes = [row.text for row in chunk]
                answers = journal.recorded(notes)
                if answers is None:
                    answers = [list(answer.cells) for answer in predictor.predict(notes)]
                    journal.record(notes, answers)
                for row, answer in zip(chunk, answers, strict=True):
                    writer.write({**row.values, **dict(zip(ADDED_COLUMNS, answer, strict=True))})
                rows += len(chunk)
                if tally is not None:
                    tally.count(answer[ERROR] for answer in answers)
                progress.update(len(chunk))
        except DataError as error:
            if journal.rows:
                raise DataError(f"{error} (the answers to {journal.rows:,} rows are kept: mend the table and add --resume)"
                                ) from error
            raise
    return rows
