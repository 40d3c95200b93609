"""The command line: every subcommand is a thin call of a function that a program could call as well.

A `MiniloraError` ends as one line on the error stream and exit code 2.  Heavy imports wait until a command is chosen, so
that ``--help`` is quick.
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from minilora import store_commands, task_commands
from minilora.config import TrainConfig, check_offloading, read_toml
from minilora.errors import ConfigError, MiniloraError, StoppedError, memory_reason
from minilora.flags import (
    NO_SETTINGS,
    SEED,
    Formatter,
    Parser,
    answer_flags,
    compare_flags,
    course_flags,
    data_flags,
    memory_flags,
    model_flags,
    out_flags,
    predict_flags,
    quantize_flags,
    score_flags,
    store_flags,
    team_flags,
    train_flags,
)
from minilora.stopping import reader_gone, terminated_cleanly


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(prog="minilora", allow_abbrev=False,
                     description="LoRA and QLoRA from scratch: fine-tune a 4-bit Llama to label notes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", formatter_class=Formatter,
                                  allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command("demo", _demo, "everything, offline, on the small model and data that ship")
    sub.add_argument("--out", default="demo-out", help="folder for scores, run and picture")
    sub.add_argument("--seed", type=SEED, default=0, help="of the data and the training")
    out_flags(sub)

    sub = command("data", task_commands.data,
                  "write the synthetic radiology set (train.csv, val.csv, test.csv), or look a table over (data check FILE)")
    data_flags(sub)
    out_flags(sub)

    sub = command("quantize", _quantize, "turn a 16-bit checkpoint into a 4-bit one (Hugging Face bitsandbytes format)")
    quantize_flags(sub)
    out_flags(sub)

    sub = command("train", _train, "fine-tune a 4-bit base with LoRA (or all weights) on a table of notes and labels")
    sub.add_argument("--config", help="TOML file with any of the settings below; flags win over it")
    train_flags(sub)
    team_flags(sub)
    store_flags(sub)

    sub = command("track", store_commands.track,
                  "send a run folder to MLflow, and register its model: what train --mlflow does meanwhile")
    sub.add_argument("folder", metavar="RUN", help="run folder, finished or not")
    store_flags(sub)

    sub = command("evaluate", task_commands.evaluate, "score a model on a labelled table, with intervals")
    model_flags(sub)
    answer_flags(sub)
    score_flags(sub)
    out_flags(sub)
    store_flags(sub, registers=False)

    compare_flags(command("compare", task_commands.compare,
                          "say whether one evaluation's answers are better than another's, or only luckier"))

    sub = command("predict", task_commands.predict, "label one note, or a table of them")
    model_flags(sub, registry=True)
    answer_flags(sub)
    predict_flags(sub)
    out_flags(sub)

    sub = command("merge", _merge, "fold an adapter into the weights, and say what that costs")
    model_flags(sub, adapter_required=True)
    sub.add_argument("--into", choices=("16bit", "4bit", "original"), default="16bit",
                     help="16bit: the dequantized base, i.e. the model that was trained; 4bit: quantize the sum again; "
                          "original: the unquantized base, which training never saw")
    sub.add_argument("--out", required=True, help="folder to create")
    out_flags(sub)

    sub = command("memory", _memory, "say what a run will take, before anything is loaded: full fine-tuning, LoRA and QLoRA")
    memory_flags(sub)

    sub = command("show", _show, "show one row as training sees it: prompt, tokens, and which of them carry loss (the note is "
                                 "patient data, and is printed)")
    sub.add_argument("--model", required=True, help="tiny, a folder, or a hub id: whose tokenizer is used")
    sub.add_argument("--data", required=True, help="labelled table: CSV, JSONL or Parquet")
    sub.add_argument("--row", type=int, default=1, metavar="N", help="number of the row, from 1, as in messages")
    sub.add_argument("--template", default="note", help="prompt: note, inst, meditron, tiny, or a text file with one {input}")
    sub.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of prompt and label together")
    sub.add_argument("--input-column", default="input", help="column of notes")
    sub.add_argument("--label-column", default="label", help="column of labels")

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
    sub.add_argument("--peers", action="store_true",
                     help="measure bitsandbytes, peft and transformers too (extra [peers], from a checkout; half an hour)")
    sub.add_argument("--quick", action="store_true", help="some rows, in fewer rounds: less than a minute without peers")
    sub.add_argument("--only", nargs="+", metavar="PART", help="the measurements whose name holds one of these")
    sub.add_argument("--json", metavar="FILE", help="write the rows there as well, as a list of objects")
    sub.add_argument("--table", metavar="FILE", help="write them there as a table in Markdown")
    sub.add_argument("--figure", metavar="FILE", help="draw there how a step's cost grows (PNG; extra [plots])")
    sub.add_argument("--overwrite", action="store_true", help="replace existing files")

    course_flags(command("lesson", _lesson, "run a lesson of the course: prose, code, what it prints, a picture"),
                 command("check", _check, "grade what you wrote in lessons/exercises, and name the mistake"))
    return parser


def _demo(args: argparse.Namespace) -> None:
    from minilora.demo import demo
    demo(args.out, args.seed, args.overwrite, args.quiet)


def _quantize(args: argparse.Namespace) -> None:
    from minilora.convert import quantize_folder
    print(quantize_folder(args.model, args.out, args.blocksize, args.double_quant, args.dtype, args.pad_vocab, args.overwrite,
                          args.quiet))


def _train(args: argparse.Namespace) -> None:
    from minilora.train import train
    given = {key: value for key, value in vars(args).items() if key not in ("command", "run", "config", *NO_SETTINGS)}
    config = TrainConfig(**{**(read_toml(args.config) if args.config else {}), **given})
    if args.distributed:
        store_commands.train_by_many(args, config)
        return
    with store_commands.followed(args, config.out):
        result = train(config)
    store_commands.register(args, config.out)
    if not config.quiet:
        print(f"{result.steps} steps in {result.seconds:.0f} s: loss {result.loss:.4f}"
              + (f", validation {result.val_loss:.4f}" if result.val_loss is not None else "")
              + f"; {result.trained:,} of {result.parameters:,} numbers trained; peak memory {result.peak_bytes / 1e9:.2f} GB")
        tuned = f"--model {config.out}" if config.tune == "full" else f"--model {config.model} --adapter {config.out}"
        print(f"next: minilora predict {tuned} --note \"...\"")


def _merge(args: argparse.Namespace) -> None:
    from minilora.convert import merge_folder
    print(merge_folder(args.model, args.adapter, args.out, args.into, args.device, args.pad_vocab, args.overwrite, args.quiet))


def _memory(args: argparse.Namespace) -> None:
    import torch

    from minilora.files import check_output_file, write_json
    from minilora.loading import pick_device, pick_dtype
    from minilora.memory import Workload
    from minilora.memory_shared import table as shared_table
    from minilora.memory_table import as_object, describe, plan, table
    from minilora.shapes import shape_of
    if args.json:
        check_output_file(args.json, args.overwrite)
    # A GPU that is not here can be planned for, but not measured.
    device = torch.device("cuda") if args.device.startswith("cuda") and not args.measure else pick_device(args.device)
    if not 0 < args.resident_mib < 2 ** 30:
        raise ConfigError(f"--resident-mib must be a number of MiB above 0, not {args.resident_mib}")
    check_offloading(args.activation_offloading, args.gradient_checkpointing, device.type)
    pages = int(args.resident_mib * 2 ** 20) if args.optimizer == "paged_adamw" else None
    work = Workload("qlora", args.batch, args.seq, args.label_tokens, args.r,
                    compute=pick_dtype(args.dtype, device), double_quant=args.double_quant,
                    gradient_checkpointing=args.gradient_checkpointing, activation_offloading=args.activation_offloading,
                    accumulate=args.accumulate, state_bits=args.state_bits, resident_bytes=pages,
                    on_gpu=device.type == "cuda", new_tokens=args.new_tokens)
    config = shape_of(args.model)
    shared = f"\n{shared_table(config, work, args.processes)}" if args.processes else ""
    print(describe(args.model, config, work))
    columns = plan(args.model, config, work, measured=args.measure, device=str(device))
    print(table(columns))
    if shared:
        print(shared)
    if args.json:
        write_json(args.json, [as_object(column) for column in columns])


def _report(args: argparse.Namespace) -> None:
    from minilora.report import write_report
    print(write_report(args.folder, args.out, args.evaluation, args.show_text, args.overwrite))


def _show(args: argparse.Namespace) -> None:
    from minilora.data.prompts import load_template
    from minilora.loading import load_tokenizer
    from minilora.show import render, show_row
    shown = show_row(load_tokenizer(args.model), load_template(args.template), args.data, args.row, args.max_length,
                     args.input_column, args.label_column)
    print(render(shown, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))


def _audit(args: argparse.Namespace) -> None:
    from minilora.audit import audit, format_claim
    from minilora.files import check_output_file, write_json
    if args.json:
        check_output_file(args.json, args.overwrite)
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
    from minilora.bench import BENCHES, Settings, bench, chosen, format_row, left_out, markdown
    from minilora.bench.scaling import check_figure, draw, scaling
    from minilora.files import check_output_file, write_json, write_text
    for path in (args.json, args.table, args.figure):
        if path:
            check_output_file(path, args.overwrite)
    settings = Settings(args.peers, args.quick)
    if not (calls := chosen(args.only, settings)):
        raise ConfigError(f"--only: no measurement is called so; there are {', '.join(call.__name__ for call in BENCHES)}")
    if args.figure:
        check_figure(args.figure, scaling in calls)
    rows = []
    for row in bench(args.only, settings):
        rows.append(row)
        print(format_row(row), flush=True)
    if not rows:
        raise MiniloraError("there is no GPU here: nothing was measured")
    if left_out(settings) and not args.only:
        print(f"left out by --quick: {', '.join(left_out(settings))}")
    if args.json:
        write_json(args.json, [dataclasses.asdict(row) for row in rows])
    if args.table:
        write_text(args.table, markdown(rows))
    if args.figure:
        draw(rows, args.figure)
    missed = [row.name for row in rows if not row.ok]
    if missed:
        raise MiniloraError(f"below what is to be reached: {', '.join(missed)}")


def _lesson(args: argparse.Namespace) -> None:
    from minilora.course.lesson import find_lesson, list_lessons, run_lesson
    if args.number is None:
        print(list_lessons())
    else:
        run_lesson(find_lesson(args.number), ask=input if sys.stdin.isatty() and not args.no_pause else None)


def _check(args: argparse.Namespace) -> None:
    from minilora.course.progress import format_standings, print_verdicts, standings
    if args.all:
        print(format_standings(standings()))
    else:
        print_verdicts(args.number, args.file)


def _say(text: str) -> None:
    """A line on the error stream, by one write: with several processes on one terminal two would mix."""
    sys.stderr.write(f"minilora: {text}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a `MiniloraError` or bad flags, 128 + n if signal n stopped it."""
    with warnings.catch_warnings(), terminated_cleanly():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        try:
            args, unknown = (parser := build_parser()).parse_known_args(argv)
            if unknown:     # of a note that was not quoted the words end here: name flags alone
                flags = ", ".join(word.partition("=")[0] for word in unknown if word.startswith("--")) or "more than one word"
                parser.error(f"{args.command}: no place for {flags}; put quotes around a text with spaces")
            args.run(args)
            sys.stdout.flush()
        except BrokenPipeError:
            if not reader_gone():
                raise
            return 128 + signal.SIGPIPE         # as behind ``| head``
        except MiniloraError as error:
            _say(" ".join(str(error).splitlines()))
            return 128 + error.signal if isinstance(error, StoppedError) else 2
        except (MemoryError, RuntimeError) as error:
            if (reason := memory_reason(error)) is None:
                raise
            _say(f"out of memory ({reason}); `minilora memory` says what a run takes")
            return 2
        except OSError as error:
            # Trap: asked whether a path is there, Python raises where it may not look, or a name is too long (until 3.14).
            if not isinstance(error.filename, str):
                raise
            _say(str(MiniloraError(f"{error.filename}: {error.strerror}; check the path and its permissions")))
            return 2
        except KeyboardInterrupt:
            _say("stopped")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
