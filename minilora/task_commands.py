"""The commands of the task itself: look a table over, score, compare, label.  Each is a thin call, as in `cli`.

Whatever can be found wrong without the model is looked for before it is loaded.
"""
from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.errors import ConfigError
from minilora.store_commands import predict_by_spark, registered_model, send_scores

if TYPE_CHECKING:
    from minilora.audit_log import Asked


def data(args: argparse.Namespace) -> None:
    """`minilora data`."""
    if args.table is not None:
        check(args)
        return
    if args.out == "check":
        raise ConfigError("data check needs a table to look over: minilora data check FILE (a folder called check is ./check)")
    from minilora.data.radiology import PROTOCOLS, RULES, write_dataset
    counts = write_dataset(args.out, n=args.n, seed=args.seed, overwrite=args.overwrite)
    print(", ".join(f"{name}.csv {count:,} notes" for name, count in counts.items())
          + f" in {args.out}: {len(PROTOCOLS)} protocols by {len(RULES)} clinical rules")


def check(args: argparse.Namespace) -> None:
    """`minilora data check FILE`."""
    if args.out != "check":
        raise ConfigError("data takes one folder to create; data check FILE looks a table over")
    from minilora.files import check_output_file, write_json
    from minilora.loading import load_tokenizer
    from minilora.table_check import check_table, format_check
    if args.json:
        check_output_file(args.json, args.overwrite, reads=(args.table,))
    found = check_table(args.table, args.input_column, args.label_column, load_tokenizer(args.model), args.max_length)
    print(format_check(found, args.max_length))
    if args.json:
        write_json(args.json, found.to_dict())


def _predictor(args: argparse.Namespace) -> Any:
    from minilora.predict import Predictor
    return Predictor.load(args.model, args.adapter, args.labels, args.free, args.template, args.quantize, args.device,
                          args.dtype, args.max_length, args.pad_vocab, args.cache, args.quiet)


def evaluate(args: argparse.Namespace) -> None:
    """`minilora evaluate`."""
    from minilora.card import record_scores
    from minilora.score import read_answers, read_beside, read_scored_table, score_table, training_table
    table = read_scored_table(args.data, args.input_column, args.label_column, args.out, args.overwrite,
                              reads=(args.model, args.adapter, args.labels, args.train, args.answers))
    train = training_table(args.adapter or args.model)
    if args.train:
        train = Path(args.train), args.input_column, args.label_column
    beside = read_beside(table, args.embedder, train, args.baseline, args.against)
    if args.answers:
        beside = dataclasses.replace(beside, answers_file=Path(args.answers),
                                     answers=read_answers(args.answers, table, args.adapter))
    evaluation = score_table(_predictor(args), args.data, args.input_column, args.label_column, args.out, args.seed,
                             args.overwrite, args.quiet, beside)
    record_scores(args.adapter or args.model, args.data, evaluation, args.free)
    send_scores(args)
    if not args.quiet:
        from minilora.evaluate import format_table
        print(format_table(evaluation))


def compare(args: argparse.Namespace) -> None:
    """`minilora compare`."""
    from minilora.compare import compare_files, format_comparison
    print(format_comparison(compare_files(args.ours, args.other, args.label_column, args.seed), args.ours, args.other))


def predict(args: argparse.Namespace) -> None:
    """`minilora predict`."""
    from minilora.audit_log import Asked
    if args.note is None and not args.out:
        raise ConfigError("--data needs --out: the table to write the predictions to")
    if args.workers is not None and not args.spark:
        raise ConfigError("--workers counts the Python processes of --spark: add --spark, or leave it out")
    with registered_model(args) as (name, version):
        _predict(args, Asked(args.model, args.adapter, args.labels, name, version, args.data, args.out, args.resume,
                             args.spark))


def _predict(args: argparse.Namespace, asked: Asked) -> None:
    from minilora.audit_log import audited
    from minilora.predict import check_tables, predict_table
    if args.note is not None:
        if args.out or args.resume:
            raise ConfigError(f"--{'out' if args.out else 'resume'} goes with --data; the label of a --note is printed")
        with audited(asked, args.audit) as tally:
            answer, = _predictor(args).predict([args.note])
            tally.count([answer.error])
        if answer.error:
            raise ConfigError(f"--note: {answer.error}")
        print(answer.label)
        if answer.probability is not None and not args.quiet:
            print(f"probability {answer.probability:.3f}" + (f", next {answer.runner_up}" if answer.runner_up else ""))
        return
    if args.spark:
        predict_by_spark(args, asked)
        return
    check_tables(args.data, args.out, args.input_column, args.overwrite, args.resume)     # before the model is loaded
    with audited(asked, args.audit) as tally:
        rows = predict_table(_predictor(args), args.data, args.out, args.input_column, args.overwrite, args.quiet, args.resume,
                             tally)
    if not args.quiet:
        print(f"{rows:,} rows in {args.out}")
