"""Scoring a predictor on a labelled table: predictions, what is held against them, then `evaluate`, then the files."""
from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from minilora.adapters import WEIGHTS_FILE
from minilora.audit_log import FILE as AUDIT_FILE
from minilora.audit_log import digest_of, labelled_by, model_digest
from minilora.baseline import NAME, bag_of_words, require_baseline
from minilora.bert import BertEmbedder, find_bert
from minilora.card import own_version
from minilora.compare import aligned_predictions, predictions_file, read_rows
from minilora.config import read_toml
from minilora.data.tables import Row, Table, added_columns, iter_table, read_table
from minilora.duplicates import Twins, find_twins
from minilora.embed import Embedder, embed_texts
from minilora.errors import ConfigError, DataError, MiniloraError
from minilora.evaluate import RUNNER_UP, Evaluation, evaluate, save_evaluation
from minilora.evaluation import Scored
from minilora.files import Kind, check_output, file_sha256, new_folder
from minilora.identity import fingerprint
from minilora.layers.qlora import base_only
from minilora.metrics import normalize_label
from minilora.predict import ROWS_AT_ONCE, Prediction, Predictor, chunks

KIND = Kind("metrics.json", ("metrics.json", "predictions.csv"))
BASE = "base"           # what --embedder calls the model that is scored, its adapter off


@dataclass(frozen=True)
class Beside:
    """What a model's answers are held against; read before a model is loaded, so that nothing is missed after an hour.

    Attributes:
        embedder: for cosine similarity, None for the base model itself; embedder_name: as it was asked for.
        train: rows of the table that the model was trained on, labelled if a baseline is trained on them.
        others: answers of other methods to the same rows, by name.
        answers: the model's own, given already, and the file they are from; without them it is asked.
    """

    embedder: Embedder | None = None
    embedder_name: str = BASE
    train_file: Path | None = None
    train: list[Row] = field(default_factory=list)
    baseline: bool = False
    others: Mapping[str, list[str]] = field(default_factory=dict)
    answers_file: Path | None = None
    answers: list[Prediction] = field(default_factory=list)


def predict_all(predictor: Predictor, notes: Sequence[str], quiet: bool = False) -> list[Prediction]:
    """Label notes with a progress bar."""
    answers: list[Prediction] = []
    with tqdm(total=len(notes), desc="predict", unit="note", disable=quiet) as progress:
        for chunk in chunks(notes, ROWS_AT_ONCE // 4):
            answers += predictor.predict(chunk)
            progress.update(len(chunk))
    return answers


def score_predictions(predictor: Predictor, answers: Sequence[Prediction], references: Sequence[str], seed: int = 0,
                      embedder: Embedder | None = None, others: Mapping[str, Sequence[str]] | None = None,
                      twins: Twins | None = None) -> Evaluation:
    """Evaluate answers; cosine similarity by `embedder`, default the base model's own embeddings (adapters off)."""
    def embed(texts: Sequence[str]) -> Tensor:
        with base_only(predictor.model):
            return embed_texts(predictor.model, predictor.tokenizer, texts)
    probabilities = [answer.probability for answer in answers]
    known = [p for p in probabilities if p is not None]
    ranked = [answer.ranked for answer in answers]
    return evaluate([answer.label for answer in answers], references, embedder or embed,
                    probabilities=known if len(known) == len(answers) else None, seed=seed, labels=predictor.labels or (),
                    ranked=ranked if any(ranked) else None, others=others, twins=twins)


def read_scored_table(data: str | Path, input_column: str, label_column: str, out: str | Path,
                      overwrite: bool = False, reads: Iterable[str | Path | None] = ()) -> Table:
    """Read the table that `score_table` scores, and find what would stop that before a model is loaded.

    Args: reads: what else is read, which must not be overwritten (`check_output`).

    Raises: DataError, OutputError.
    """
    check_output(out, overwrite, KIND, reads=(data, *reads))
    table = read_table(data, input_column, label_column)
    added_columns(data, table.columns, ("prediction", "probability", *RUNNER_UP))
    return table


def training_table(run: str | Path) -> tuple[Path, str, str] | None:
    """The table that a run was trained on, and its columns of notes and labels; None where it is gone or was changed."""
    folder = Path(run)
    try:
        config, card = read_toml(folder / "config.toml"), (folder / "README.md").read_text(encoding="utf-8")
        data = Path(str(config["data"]))
        same = data.is_file() and file_sha256(data) in card
    except (MiniloraError, OSError, KeyError, ValueError):      # another tool's adapter, or a card that somebody rewrote
        return None
    return (data, str(config.get("input_column", "input")), str(config.get("label_column", "label"))) if same else None


def read_beside(table: Table, embedder: str = BASE, train: tuple[Path, str, str] | None = None, baseline: bool = False,
                against: Sequence[str | Path] = ()) -> Beside:
    """Read everything that answers are held against.

    Args:
        table: that is scored. embedder: `BASE`, "minilm", or a folder. train: the training table with its columns of notes and
        labels. baseline: train a bag of words on it. against: other evaluations of the table (`compare.predictions_file`).

    Raises: DataError, CheckpointError, ConfigError: something is missing, broken, or of other rows.
    """
    others: dict[str, list[str]] = {}
    for path in against:
        file = predictions_file(path)
        folder = file.absolute().parent
        name = file.stem if file == Path(path) else folder.parent.name if folder.name == "evaluation" else folder.name
        if name in others or name in ("shuffled", "majority", NAME):
            raise DataError(f"--against {path}: there is another called {name!r}; rename the folder")
        others[name] = aligned_predictions(path, [row.values for row in table.rows], table.columns)
    if baseline:
        require_baseline()
        if train is None:
            raise ConfigError("--baseline needs the table that the model was trained on; name it with --train")
    rows = list(iter_table(train[0], train[1], train[2] if baseline else None)) if train is not None else []
    return Beside(None if embedder == BASE else BertEmbedder(find_bert(embedder)), embedder, train[0] if train else None, rows,
                  baseline, others)


def read_answers(path: str | Path, table: Table, adapter: str | Path | None) -> list[Prediction]:
    """The answers of a table that `predict` wrote, a file or Spark's folder, to the rows of the table that is scored.

    Raises: DataError: it cannot be read, or has other rows. ConfigError: the audit log beside it says that another model
        than this adapter gave them.
    """
    labels = aligned_predictions(path, [row.values for row in table.rows], table.columns)
    line = labelled_by(predictions_file(path))
    if line is not None and line.get("adapter_sha256") != (model_digest(Path(adapter)) if adapter is not None else None):
        raise ConfigError(f"{path} was labelled by another model, says {AUDIT_FILE} beside it (that one: "
                          f"{line.get('registered') or line.get('adapter') or line.get('model')}); name it with --model and "
                          "--adapter")

    def number(text: str) -> float | None:
        try:
            found = float(text) if text else None
        except ValueError:
            found = math.nan
        if found is not None and not 0 <= found <= 1:
            raise DataError(f"{path}: a probability is no number from 0 to 1; name what minilora predict wrote")
        return found

    return [Prediction(label, number(row.get("probability", "")), row.get("runner_up") or None, row.get("error") or None,
                       number(row.get("runner_up_probability", "")))
            for label, row in zip(labels, read_rows(path), strict=True)]


def identify(predictor: Predictor, data: str | Path, beside: Beside) -> Scored:
    """What is scored, for metrics.json."""
    adapter = predictor.adapter / WEIGHTS_FILE if predictor.adapter is not None else None
    named = predictor.name
    return Scored(
        model=Path(named).name if named.startswith((".", "/", "~")) else named,
        adapter=file_sha256(adapter) if adapter is not None and adapter.is_file() else None,
        weights=fingerprint(predictor.model), data=file_sha256(data), embedder=Path(beside.embedder_name).name,
        labels=None if predictor.labels is None else len(predictor.labels), version=own_version(),
        train=file_sha256(beside.train_file) if beside.train_file is not None else None,
        answers=digest_of(beside.answers_file) if beside.answers_file is not None else None)


def _never_right(references: Sequence[str], labels: Sequence[str] | None) -> int:
    """Rows whose label is no possible answer."""
    known = {normalize_label(label) for label in labels or ()}
    return sum(normalize_label(reference) not in known for reference in references) if labels is not None else 0


def score_table(predictor: Predictor, data: str | Path, input_column: str, label_column: str, out: str | Path, seed: int = 0,
                overwrite: bool = False, quiet: bool = False, beside: Beside | None = None) -> Evaluation:
    """Predict a labelled table, or take the answers that `beside` has, and write metrics.json and predictions.csv
    (owner-only) into a folder.

    Raises: DataError, OutputError.
    Warns: UserWarning: rows that no answer among the predictor's labels is right for.
    """
    table, beside = read_scored_table(data, input_column, label_column, out, overwrite), beside or Beside()
    notes, references = [row.text for row in table.rows], [row.label or "" for row in table.rows]
    never = _never_right(references, predictor.labels)
    if never:
        warnings.warn(f"{data}: {never:,} of {len(references):,} rows have a label that is none of the "
                      f"{len(predictor.labels or ()):,} labels that can be answered, and can never be right", stacklevel=2)
    answers, others = beside.answers or predict_all(predictor, notes, quiet), dict(beside.others)
    if beside.baseline:
        others[NAME] = bag_of_words([(row.text, row.label or "") for row in beside.train], notes, seed=seed)[0]
    twins = find_twins(notes, [row.text for row in beside.train]) if beside.train else None
    evaluation = score_predictions(predictor, answers, references, seed, beside.embedder, others, twins)
    evaluation = dataclasses.replace(evaluation, scored=identify(predictor, data, beside))
    with new_folder(out, overwrite, KIND) as temporary:
        save_evaluation(evaluation, temporary, [row.values for row in table.rows], [answer.label for answer in answers],
                        [answer.probability for answer in answers],
                        None if predictor.labels is None else [(answer.runner_up, answer.runner_up_probability)
                                                               for answer in answers])
    return evaluation
