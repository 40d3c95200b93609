"""Scoring a predictor on a labelled table: predictions, then `evaluate`, then the files."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from minilora.data.tables import Table, added_columns, read_table
from minilora.embed import embed_texts
from minilora.evaluate import Evaluation, evaluate, save_evaluation
from minilora.files import check_output, new_folder
from minilora.layers.qlora import base_only
from minilora.predict import ROWS_AT_ONCE, Prediction, Predictor, chunks


def predict_all(predictor: Predictor, notes: Sequence[str], quiet: bool = False) -> list[Prediction]:
    """Label notes with a progress bar."""
    answers: list[Prediction] = []
    with tqdm(total=len(notes), desc="predict", unit="note", disable=quiet) as progress:
        for chunk in chunks(notes, ROWS_AT_ONCE // 4):
            answers += predictor.predict(chunk)
            progress.update(len(chunk))
    return answers


def score_predictions(predictor: Predictor, answers: Sequence[Prediction], references: Sequence[str],
                      seed: int = 0) -> Evaluation:
    """Evaluate answers, with the base model's own embeddings (adapters off) for cosine similarity."""
    def embed(texts: Sequence[str]) -> Tensor:
        with base_only(predictor.model):
            return embed_texts(predictor.model, predictor.tokenizer, texts)
    probabilities = [answer.probability for answer in answers]
    known = [p for p in probabilities if p is not None]
    return evaluate([answer.label for answer in answers], references, embed,
                    probabilities=known if len(known) == len(answers) else None, seed=seed, labels=predictor.labels or ())


def read_scored_table(data: str | Path, input_column: str, label_column: str, out: str | Path,
                      overwrite: bool = False) -> Table:
    """Read the table that `score_table` scores, and find what would stop that before a model is loaded.

    Raises: DataError, OutputError.
    """
    check_output(out, overwrite, marker="metrics.json")
    table = read_table(data, input_column, label_column)
    added_columns(data, table.columns, ("prediction", "probability"))
    return table


def score_table(predictor: Predictor, data: str | Path, input_column: str, label_column: str, out: str | Path, seed: int = 0,
                overwrite: bool = False, quiet: bool = False) -> Evaluation:
    """Predict a labelled table and write metrics.json and predictions.csv (owner-only) into a folder.

    Raises: DataError, OutputError.
    """
    table = read_scored_table(data, input_column, label_column, out, overwrite)
    answers = predict_all(predictor, [row.text for row in table.rows], quiet)
    evaluation = score_predictions(predictor, answers, [row.label or "" for row in table.rows], seed)
    with new_folder(out, overwrite, marker="metrics.json") as temporary:
        save_evaluation(evaluation, temporary, [row.values for row in table.rows], [answer.label for answer in answers],
                        [answer.probability for answer in answers])
    return evaluation
