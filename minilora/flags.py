"""Flags that commands share, and how they are parsed and shown."""
from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Literal, NoReturn

from minilora.config import TrainConfig
from minilora.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Bad flags end like any other bad input: with one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the message; the caller prints it."""
        raise ConfigError(f"{message}; see {self.prog} --help")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, "", argparse.SUPPRESS) and action.default is not False
        return (super()._get_help_string(action) if shown else action.help) or ""


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of a flag: a whole number of a range, which the message tells."""
    def read(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must lie between {low:,} and {high:,}, not {text.strip()[:40]}")
        return value

    read.__name__ = "int"       # as argparse names it where the text is no number
    return read


SEED = whole(0, 2 ** 63 - 1)
BLOCKSIZE = whole(1, 1 << 30)           # what the reader of 4-bit checkpoints takes


def train_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of TrainConfig; absent ones stay absent, so that --config can fill them."""
    hints = typing.get_type_hints(TrainConfig)
    for setting in dataclasses.fields(TrainConfig):
        hint, default = hints[setting.name], setting.default
        flag, help = "--" + setting.name.replace("_", "-"), setting.metadata["help"]
        if default != "" and default is not False:      # 0 is a default worth showing, and equal to False
            help += f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
        options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": help}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is Literal:
            options["choices"] = typing.get_args(hint)
        elif typing.get_origin(hint) is tuple:
            options |= {"nargs": "+", "metavar": "NAME"}
        else:
            options |= {"type": hint, "metavar": {int: "N", float: "X", str: "TEXT"}[hint]}
        parser.add_argument(flag, **options)


def quantize_flags(parser: argparse.ArgumentParser) -> None:
    """What is quantized, and how."""
    parser.add_argument("model", help="tiny, a folder in Hugging Face's layout, or a hub id")
    parser.add_argument("out", help="folder to create")
    parser.add_argument("--blocksize", type=BLOCKSIZE, default=64, help="weights per block")
    parser.add_argument("--double-quant", action=argparse.BooleanOptionalAction, default=True,
                        help="quantize the block constants too")
    parser.add_argument("--dtype", default="bfloat16", help="of embeddings, norms and head: float32, bfloat16 or float16")
    parser.add_argument("--pad-vocab", action="store_true", help="fill missing embedding rows with their mean")


def model_flags(parser: argparse.ArgumentParser, adapter_required: bool = False, registry: bool = False) -> None:
    """Which model, with which adapter, where."""
    parser.add_argument("--model", required=True, help="tiny, a folder in Hugging Face's layout, or a hub id (or ID@REVISION)"
                                                       + (", or one from a registry (models:/NAME@ALIAS)" if registry else ""))
    parser.add_argument("--adapter", required=adapter_required, help="run folder, or a LoRA, rsLoRA or DoRA of PEFT's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--pad-vocab", action="store_true", help="fill missing embedding rows with their mean")


def answer_flags(parser: argparse.ArgumentParser) -> None:
    """How notes are read and answered."""
    among = parser.add_mutually_exclusive_group()
    among.add_argument("--labels", help="file with one label a line (default: the run's labels.txt)")
    among.add_argument("--free", action="store_true", help="write freely instead of choosing a label")
    parser.add_argument("--template",
                        help="prompt: note, inst, meditron, tiny, or a text file with one {input} (default: the run's)")
    parser.add_argument("--quantize", choices=("auto", "nf4", "none"), default="auto",
                        help="how to store the base; auto is as in training, or nf4 without an adapter")
    parser.add_argument("--dtype", default="auto", help="compute type: auto, float32, bfloat16 or float16")
    parser.add_argument("--cache", action="store_true", help="keep a 4-bit copy of the base beside it, or read that one")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and label together (default: the run's)")
    parser.add_argument("--input-column", default="input", help="column of notes")


def score_flags(parser: argparse.ArgumentParser) -> None:
    """What is scored, what measures the answers, and what they are held against."""
    parser.add_argument("--data", required=True, help="labelled table: CSV, JSONL or Parquet")
    parser.add_argument("--label-column", default="label", help="column of labels")
    parser.add_argument("--out", required=True, help="folder for metrics.json and predictions.csv")
    parser.add_argument("--seed", type=SEED, default=0, help="of the bootstrap")
    parser.add_argument("--embedder", default="base",
                        help="what measures cosine similarity: base (the base model itself), minilm (extra [minilm]), or the "
                             "folder of a sentence-transformers BERT")
    parser.add_argument("--train", metavar="FILE",
                        help="table that the model was trained on: notes that nearly stand there are counted (default: the "
                             "run's own, where it still lies)")
    parser.add_argument("--baseline", action="store_true",
                        help="train a bag of words on that table and score it beside the model (extra [baseline])")
    parser.add_argument("--answers", metavar="TABLE",
                        help="score the answers in this table, which predict wrote (a file, or Spark's folder), instead of "
                             "asking the model again")
    parser.add_argument("--against", nargs="+", default=[], metavar="SCORES",
                        help="other evaluations of this table: folders that evaluate wrote, or tables of predictions")


def compare_flags(parser: argparse.ArgumentParser) -> None:
    """Two evaluations."""
    parser.add_argument("ours", metavar="SCORES", help="what evaluate wrote, a run folder around it, or a table of predictions")
    parser.add_argument("other", metavar="OTHER", help="the same of another method, on the same rows")
    parser.add_argument("--label-column", default="label", help="column of labels")
    parser.add_argument("--seed", type=SEED, default=0, help="of the bootstrap")


def predict_flags(parser: argparse.ArgumentParser) -> None:
    """One note, or a table."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--note", help="one note; prints the label alone on the first line")
    what.add_argument("--data", help="table of notes: CSV, JSONL or Parquet; needs --out")
    parser.add_argument("--out", help="table to write: the input's columns, then prediction, probability, error, runner_up, "
                                      "runner_up_probability")
    parser.add_argument("--resume", action="store_true",
                        help="go on where an earlier prediction of --out was interrupted; the bytes are the same")
    parser.add_argument("--spark", action="store_true",
                        help="by PySpark on this machine (extra [spark], Java 17): --out is a folder of such tables")
    parser.add_argument("--workers", type=whole(1, 1 << 16), metavar="N",
                        help="Python processes of --spark (default: one a core)")
    parser.add_argument("--mlflow", metavar="URI", default=None,
                        help="store of a --model models:/NAME@ALIAS or models:/NAME/VERSION (default: sqlite:///mlflow.db)")
    parser.add_argument("--registry", metavar="URI", help="the registry, where it is not that store (databricks-uc)")
    parser.add_argument("--audit", metavar="FILE",
                        help="log that gets a line on this run: who, when, which model, how many rows, no text (default: "
                             "predictions-audit.jsonl beside --out; none for a --note)")


def data_flags(parser: argparse.ArgumentParser) -> None:
    """What `data` writes, and how `data check` reads a table."""
    parser.add_argument("out", help="folder to create (./check, if it is to be called check); or the word check, and "
                                    "behind it a table")
    parser.add_argument("table", nargs="?", help="table to look over: CSV, JSONL or Parquet; no note of it is shown")
    parser.add_argument("--n", type=int, default=10_000, help="notes in all three splits together (80/10/10)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    parser.add_argument("--input-column", default="input", help="column of notes (check)")
    parser.add_argument("--label-column", help="column of labels (check; default: label, if there is one)")
    parser.add_argument("--model", default="tiny", help="whose tokens are counted (check)")
    parser.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens that training is to read (check)")
    parser.add_argument("--json", metavar="FILE", help="write what was found there as well (check)")


def team_flags(parser: argparse.ArgumentParser) -> None:
    """How several processes share a training."""
    parser.add_argument("--distributed", choices=("ddp", "fsdp"),
                        help="with the processes that torchrun started: ddp shares the notes of a step, fsdp the 4-bit base "
                             "as well")


NO_SETTINGS = ("distributed", "mlflow", "experiment", "register", "alias", "registry")       # of train's flags: not the run's


def store_flags(parser: argparse.ArgumentParser, registers: bool = True) -> None:
    """Where runs are tracked and models registered."""
    group = parser.add_argument_group("MLflow (extra [mlflow])")
    group.add_argument("--mlflow", nargs="?", const="sqlite:///mlflow.db", metavar="URI",
                       help="tracking store: without URI a file here, sqlite:///mlflow.db, and no server; http://HOST:PORT; "
                            "databricks")
    group.add_argument("--experiment", default="minilora", metavar="NAME", help="for runs that belong together")
    if registers:
        group.add_argument("--register", metavar="NAME",
                           help="keep the model in the registry under this name (in Unity Catalog: catalog.schema.model)")
        group.add_argument("--alias", metavar="NAME", help="of the version that is registered, such as champion")
        group.add_argument("--registry", metavar="URI", help="the registry, where it is not the tracking store (databricks-uc)")


def out_flags(parser: argparse.ArgumentParser) -> None:
    """What every command that writes has."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")


def memory_flags(parser: argparse.ArgumentParser) -> None:
    """What is planned: names as in training, as far as they go."""
    parser.add_argument("--model", required=True,
                        help="110m, 1.1b, 7b, 8b or 70b (shapes), tiny, a folder, or a hub id (config.json alone is fetched)")
    parser.add_argument("--batch", "--batch-size", type=int, default=1, metavar="N", help="notes per micro-batch")
    parser.add_argument("--seq", "--max-length", type=int, default=512, metavar="N", help="tokens of each")
    parser.add_argument("--label-tokens", type=int, default=16, metavar="N", help="of these, tokens that carry loss")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches per optimizer step")
    parser.add_argument("--r", type=int, default=16, metavar="N", help="rank of the update, on all seven linears")
    parser.add_argument("--new-tokens", type=int, default=0, metavar="N", help="rows more of the embedding, in full")
    parser.add_argument("--optimizer", choices=("adamw", "paged_adamw"), default="adamw", help="as in train")
    parser.add_argument("--state-bits", type=int, choices=(32, 8), default=32, help="of each moment")
    parser.add_argument("--resident-mib", type=float, default=128.0, metavar="X", help="MiB of pages in memory (paged_adamw)")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False,
                        help="recompute activations in backward")
    parser.add_argument("--activation-offloading", action=argparse.BooleanOptionalAction, default=False,
                        help="keep in host memory what that keeps")
    parser.add_argument("--dtype", default="bfloat16", help="compute type of LoRA and QLoRA: float32, bfloat16 or float16")
    parser.add_argument("--double-quant", action=argparse.BooleanOptionalAction, default=True,
                        help="quantize the block constants as well")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; a GPU need not be here to be planned for")
    parser.add_argument("--processes", nargs="+", type=whole(2, 1 << 20), default=[], metavar="N",
                        help="say as well what each of N processes (2 or more) holds and sends (train --distributed)")
    parser.add_argument("--measure", nargs="+", choices=("full", "lora", "qlora"), default=[], metavar="KIND",
                        help="take three steps of full, lora or qlora over random weights, and show what they took beside it")
    parser.add_argument("--json", metavar="FILE", help="write the table there as well, in bytes")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def course_flags(lesson: argparse.ArgumentParser, check: argparse.ArgumentParser) -> None:
    """Which lesson, and what to grade."""
    lesson.add_argument("number", type=int, nargs="?", metavar="N", help="number of the lesson; without it, what there is")
    lesson.add_argument("--no-pause", action="store_true", help="do not wait where a prediction is asked for")
    what = check.add_mutually_exclusive_group(required=True)
    what.add_argument("number", type=int, nargs="?", metavar="N", help="number of the exercise")
    what.add_argument("--all", action="store_true", help="every exercise: how far you are in the course")
    check.add_argument("--file", metavar="F", help="grade this file (default: lessons/exercises/NN.py or exercises/NN.py here, "
                                                   "or the checkout's)")
