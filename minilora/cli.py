"""The command line: every subcommand is a thin call of a function that a program could call as well.

A `MiniloraError` ends as one line on the error stream and exit code 2.  Heavy imports wait until a command is chosen, so
that ``--help`` is quick.
"""
from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from minilora.config import TrainConfig, read_toml
from minilora.errors import ConfigError, MiniloraError


class _Parser(argparse.ArgumentParser):
    """Bad flags end like any other bad input: with one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, "", argparse.SUPPRESS) and action.default is not False
        return (super()._get_help_string(action) if shown else action.help) or ""


def _train_flags(parser: argparse.ArgumentParser) -> None:
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


def _model_flags(parser: argparse.ArgumentParser, adapter_required: bool = False) -> None:
    parser.add_argument("--model", required=True, help="tiny, a folder in Hugging Face's layout, or a hub id")
    parser.add_argument("--adapter", required=adapter_required, help="run folder, or any PEFT adapter")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--pad-vocab", action="store_true", help="fill missing embedding rows with their mean")


def _answer_flags(parser: argparse.ArgumentParser) -> None:
    among = parser.add_mutually_exclusive_group()
    among.add_argument("--labels", help="file with one label a line (default: the run's labels.txt)")
    among.add_argument("--free", action="store_true", help="write freely instead of choosing a label")
    parser.add_argument("--template", help="prompt: note, inst, tiny, or a text file with one {input} (default: the run's)")
    parser.add_argument("--quantize", choices=("auto", "nf4", "none"), default="auto",
                        help="how to store the base; auto is as in training, or nf4 without an adapter")
    parser.add_argument("--dtype", default="auto", help="compute type: auto, float32, bfloat16 or float16")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and label together (default: the run's)")
    parser.add_argument("--input-column", default="input", help="column of notes")


def _out_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="minilora", allow_abbrev=False,
                     description="LoRA and QLoRA from scratch: fine-tune a 4-bit Llama to label notes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", formatter_class=_Formatter,
                                  allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command("demo", _demo, "everything, offline, on the small model and data that ship")
    sub.add_argument("--out", default="demo-out", help="folder for scores, run and picture")
    sub.add_argument("--seed", type=int, default=0, help="of the data and the training")
    _out_flags(sub)

    sub = command("data", _data, "write the synthetic radiology set (train.csv, val.csv, test.csv)")
    sub.add_argument("out", help="folder to create")
    sub.add_argument("--n", type=int, default=10_000, help="notes in all three splits together (80/10/10)")
    sub.add_argument("--seed", type=int, default=0, help="same seed, same files")
    _out_flags(sub)

    sub = command("quantize", _quantize, "turn a 16-bit checkpoint into a 4-bit one (Hugging Face bitsandbytes format)")
    sub.add_argument("model", help="tiny, a folder in Hugging Face's layout, or a hub id")
    sub.add_argument("out", help="folder to create")
    sub.add_argument("--blocksize", type=int, default=64, help="weights per block")
    sub.add_argument("--double-quant", action=argparse.BooleanOptionalAction, default=True,
                     help="quantize the block constants too")
    sub.add_argument("--dtype", default="bfloat16", help="of embeddings, norms and head: float32, bfloat16 or float16")
    sub.add_argument("--pad-vocab", action="store_true", help="fill missing embedding rows with their mean")
    _out_flags(sub)

    sub = command("train", _train, "fine-tune a 4-bit base with LoRA (or all weights) on a table of notes and labels")
    sub.add_argument("--config", help="TOML file with any of the settings below; flags win over it")
    _train_flags(sub)

    sub = command("evaluate", _evaluate, "score a model on a labelled table, with intervals")
    _model_flags(sub)
    _answer_flags(sub)
    sub.add_argument("--data", required=True, help="labelled table: CSV, JSONL or Parquet")
    sub.add_argument("--label-column", default="label", help="column of labels")
    sub.add_argument("--embedder", default="base", choices=("base",),
                     help="what measures cosine similarity: the base model itself")
    sub.add_argument("--out", required=True, help="folder for metrics.json and predictions.csv")
    sub.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    _out_flags(sub)

    sub = command("predict", _predict, "label one note, or a table of them")
    _model_flags(sub)
    _answer_flags(sub)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--note", help="one note; prints the label alone on the first line")
    what.add_argument("--data", help="table of notes: CSV, JSONL or Parquet; needs --out")
    sub.add_argument("--out", help="table to write: the input's columns, then prediction, probability, error")
    _out_flags(sub)

    sub = command("merge", _merge, "fold an adapter into the weights, and say what that costs")
    _model_flags(sub, adapter_required=True)
    sub.add_argument("--into", choices=("16bit", "4bit", "original"), default="16bit",
                     help="16bit: the dequantized base, i.e. the model that was trained; 4bit: quantize the sum again; "
                          "original: the unquantized base, which training never saw")
    sub.add_argument("--out", required=True, help="folder to create")
    _out_flags(sub)

    sub = command("memory", _memory, "say what a run will take, before anything is loaded: full fine-tuning, LoRA and QLoRA")
    sub.add_argument("--model", required=True,
                     help="110m, 1.1b, 7b, 8b or 70b (shapes), tiny, a folder, or a hub id (config.json alone is fetched)")
    sub.add_argument("--batch", "--batch-size", type=int, default=1, metavar="N", help="notes per micro-batch")
    sub.add_argument("--seq", "--max-length", type=int, default=512, metavar="N", help="tokens of each")
    sub.add_argument("--label-tokens", type=int, default=16, metavar="N", help="of these, tokens that carry loss")
    sub.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches per optimizer step")
    sub.add_argument("--r", type=int, default=16, metavar="N", help="rank of the update, on all seven linears")
    sub.add_argument("--optimizer", choices=("adamw", "paged_adamw"), default="adamw", help="as in train")
    sub.add_argument("--state-bits", type=int, choices=(32, 8), default=32, help="of each moment")
    sub.add_argument("--resident-mib", type=float, default=128.0, metavar="X", help="MiB of pages in memory (paged_adamw)")
    sub.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False,
                     help="recompute activations in backward")
    sub.add_argument("--dtype", default="bfloat16", help="compute type of LoRA and QLoRA: float32, bfloat16 or float16")
    sub.add_argument("--double-quant", action=argparse.BooleanOptionalAction, default=True,
                     help="quantize the block constants as well")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    sub.add_argument("--measure", nargs="+", choices=("full", "lora", "qlora"), default=[], metavar="KIND",
                     help="take three steps of full, lora or qlora over random weights, and show what they took beside it")
    sub.add_argument("--json", metavar="FILE", help="write the table there as well, in bytes")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing file")

    sub = command("report", _report, "write a run as one HTML page: training, memory, scores, errors, settings")
    sub.add_argument("folder", metavar="RUN", help="run folder, finished or not")
    sub.add_argument("--out", help="page to write (default: report.html in the run folder)")
    sub.add_argument("--evaluation", metavar="DIR",
                     help="what evaluate wrote (default: the only evaluation in RUN, or beside it where no other run lies)")
    sub.add_argument("--show-text", action="store_true",
                     help="show the hardest notes; they are patient data: the page is then readable by its owner alone")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing page")

    sub = command("audit", _audit, "re-derive every claim of the paper and of the README, here and now")
    sub.add_argument("--json", metavar="FILE", help="write the claims there as well, as a list of objects")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing file")

    sub = command("bench", _bench, "measure the figures of the README here, ours beside a peer, in turns, as ratios")
    sub.add_argument("--only", nargs="+", metavar="PART", help="the measurements whose name holds one of these")
    sub.add_argument("--json", metavar="FILE", help="write the rows there as well, as a list of objects")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def _demo(args: argparse.Namespace) -> None:
    from minilora.demo import demo
    demo(args.out, args.seed, args.overwrite, args.quiet)


def _data(args: argparse.Namespace) -> None:
    from minilora.data.radiology import PROTOCOLS, RULES, write_dataset
    counts = write_dataset(args.out, n=args.n, seed=args.seed, overwrite=args.overwrite)
    print(", ".join(f"{name}.csv {count:,} notes" for name, count in counts.items())
          + f" in {args.out}: {len(PROTOCOLS)} protocols by {len(RULES)} clinical rules")


def _quantize(args: argparse.Namespace) -> None:
    from minilora.convert import quantize_folder
    print(quantize_folder(args.model, args.out, args.blocksize, args.double_quant, args.dtype, args.pad_vocab, args.overwrite,
                          args.quiet))


def _train(args: argparse.Namespace) -> None:
    from minilora.train import train
    given = {key: value for key, value in vars(args).items() if key not in ("command", "run", "config")}
    config = TrainConfig(**{**(read_toml(args.config) if args.config else {}), **given})
    result = train(config)
    if not config.quiet:
        print(f"{result.steps} steps in {result.seconds:.0f} s: loss {result.loss:.4f}"
              + (f", validation {result.val_loss:.4f}" if result.val_loss is not None else "")
              + f"; {result.trained:,} of {result.parameters:,} numbers trained; peak memory {result.peak_bytes / 1e9:.2f} GB")
        tuned = f"--model {config.out}" if config.tune == "full" else f"--model {config.model} --adapter {config.out}"
        print(f"next: minilora predict {tuned} --note \"...\"")


def _predictor(args: argparse.Namespace) -> Any:
    from minilora.predict import Predictor
    return Predictor.load(args.model, args.adapter, args.labels, args.free, args.template, args.quantize, args.device,
                          args.dtype, args.max_length, args.pad_vocab)


def _evaluate(args: argparse.Namespace) -> None:
    from minilora.score import read_scored_table, score_table
    read_scored_table(args.data, args.input_column, args.label_column, args.out, args.overwrite)
    evaluation = score_table(_predictor(args), args.data, args.input_column, args.label_column, args.out, args.seed,
                             args.overwrite, args.quiet)
    if not args.quiet:
        from minilora.evaluate import format_table
        print(format_table(evaluation))


def _predict(args: argparse.Namespace) -> None:
    from minilora.predict import check_tables, predict_table
    if args.note is not None:
        if args.out:
            raise ConfigError("--out goes with --data; the label of a --note is printed")
        answer, = _predictor(args).predict([args.note])
        if answer.error:
            raise ConfigError(f"--note: {answer.error}")
        print(answer.label)
        if answer.probability is not None and not args.quiet:
            print(f"probability {answer.probability:.3f}" + (f", next {answer.runner_up}" if answer.runner_up else ""))
        return
    if not args.out:
        raise ConfigError("--data needs --out: the table to write the predictions to")
    check_tables(args.data, args.out, args.input_column, args.overwrite)     # before the model is loaded
    rows = predict_table(_predictor(args), args.data, args.out, args.input_column, args.overwrite, args.quiet)
    if not args.quiet:
        print(f"{rows:,} rows in {args.out}")


def _merge(args: argparse.Namespace) -> None:
    from minilora.convert import merge_folder
    print(merge_folder(args.model, args.adapter, args.out, args.into, args.device, args.pad_vocab, args.overwrite, args.quiet))


def _memory(args: argparse.Namespace) -> None:
    from minilora.files import check_output, write_json
    from minilora.loading import pick_device, pick_dtype
    from minilora.memory import Workload
    from minilora.memory_table import as_object, describe, plan, table
    from minilora.shapes import shape_of
    if args.json:
        check_output(args.json, args.overwrite)
    device = pick_device(args.device)
    pages = int(args.resident_mib * 2 ** 20) if args.optimizer == "paged_adamw" else None
    work = Workload("qlora", args.batch, args.seq, min(args.label_tokens, args.seq), args.r,
                    compute=pick_dtype(args.dtype, device), double_quant=args.double_quant,
                    gradient_checkpointing=args.gradient_checkpointing, accumulate=args.accumulate,
                    state_bits=args.state_bits, resident_bytes=pages, on_gpu=device.type == "cuda")
    print(describe(args.model, shape_of(args.model), work))
    columns = plan(args.model, work, measured=args.measure, device=str(device))
    print(table(columns))
    if args.json:
        write_json(args.json, [as_object(column) for column in columns])


def _report(args: argparse.Namespace) -> None:
    from minilora.report import write_report
    print(write_report(args.folder, args.out, args.evaluation, args.show_text, args.overwrite))


def _audit(args: argparse.Namespace) -> None:
    from minilora.audit import audit, format_claim
    from minilora.files import check_output, write_json
    if args.json:
        check_output(args.json, args.overwrite)
    claims = []
    for claim in audit():
        claims.append(claim)
        print(format_claim(claim), flush=True)
    if args.json:
        write_json(args.json, [dataclasses.asdict(claim) for claim in claims])
    failed = sum(not claim.ok for claim in claims)
    if failed:
        raise MiniloraError(f"{failed} of {len(claims)} claims do not hold here")
    print(f"all {len(claims)} claims hold")


def _bench(args: argparse.Namespace) -> None:
    from minilora.bench import BENCHES, bench, format_row
    from minilora.files import check_output, write_json
    if args.json:
        check_output(args.json, args.overwrite)
    rows = []
    for row in bench(args.only):
        rows.append(row)
        print(format_row(row), flush=True)
    if not rows:
        raise ConfigError(f"--only: no measurement is called so; there are {', '.join(call.__name__ for call in BENCHES)}")
    if args.json:
        write_json(args.json, [dataclasses.asdict(row) for row in rows])
    missed = [row.name for row in rows if not row.ok]
    if missed:
        raise MiniloraError(f"below the limit here: {', '.join(missed)}")


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"minilora: warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a `MiniloraError` or bad flags, 130 for Ctrl-C."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _one_line_warning
        try:
            args, unknown = (parser := build_parser()).parse_known_args(argv)
            if unknown:     # of a note that was not quoted the words end here: name flags alone
                flags = ", ".join(word.partition("=")[0] for word in unknown if word.startswith("--")) or "more than one word"
                parser.error(f"{args.command}: no place for {flags}; put quotes around a text with spaces")
            args.run(args)
        except MiniloraError as error:
            print("minilora: " + " ".join(str(error).splitlines()), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("minilora: stopped", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
