"""The commands that meet a platform: runs sent to MLflow, models registered, tables labelled by Spark."""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from minilora.config import TrainConfig
from minilora.errors import ConfigError

if TYPE_CHECKING:
    from minilora.audit_log import Asked
    from minilora.integrations.tracking import Store


def _store(args: argparse.Namespace) -> Store:
    from minilora.integrations.tracking import Store
    return Store(args.mlflow or Store.tracking, getattr(args, "registry", None), getattr(args, "experiment", Store.experiment))


def _check_store(args: argparse.Namespace) -> None:
    """Refuse flags that say something of what is not asked for."""
    if args.alias and not args.register:
        raise ConfigError("--alias names the version that is registered: add --register NAME, or leave it out")


def followed(args: argparse.Namespace, out: str) -> AbstractContextManager[None]:
    """What `minilora train` trains in: with ``--mlflow`` the run is sent while it goes on.

    Raises: ConfigError: flags that need a store, or a library that is missing, which is to be missed before the training.
    """
    if not args.mlflow:
        if args.register or args.alias or args.registry:
            raise ConfigError("--register, --alias and --registry need --mlflow")
        return nullcontext()
    _check_store(args)
    from minilora.integrations.tracking import follow
    return follow(out, _store(args))


def train_by_many(args: argparse.Namespace, config: TrainConfig) -> None:
    """`minilora train --distributed`: the same in every process that torchrun started; the first one writes and says.

    Raises: ConfigError: settings that one process alone can train with.
    """
    if config.tune == "full":
        raise ConfigError("--distributed trains adapters; --tune full is for one process")
    if args.distributed == "fsdp" and config.init_lora_weights != "lora":
        raise ConfigError(f"--init-lora-weights {config.init_lora_weights} saves the base it has changed, of which no process "
                          "of --distributed fsdp has the whole: give --distributed ddp")
    from minilora.integrations.distributed import ProcessGroup
    from minilora.train import train
    team = ProcessGroup(args.distributed, config.device)
    try:
        with followed(args, config.out) if team.leads else nullcontext():
            result = train(config if team.leads else replace(config, quiet=True), team)
        if team.leads:
            register(args, config.out)
            if not config.quiet:
                print(f"{result.steps} steps by {team.size} processes in {result.seconds:.0f} s: loss {result.loss:.4f}; peak "
                      f"memory of the first {result.peak_bytes / 1e9:.2f} GB")
        team.wait()
    finally:
        team.close()


def register(args: argparse.Namespace, out: str) -> None:
    """``--register NAME``, where it was given: the run's model as that name's next version."""
    if args.register:
        from minilora.integrations.serving import register
        version = register(out, _store(args), args.register, args.alias)
        print(f"registered {args.register}, version {version}"
              + (f": models:/{args.register}@{args.alias}" if args.alias else ""))


def track(args: argparse.Namespace) -> None:
    """`minilora track`."""
    _check_store(args)
    from minilora.integrations.tracking import track
    print(f"run {track(args.folder, _store(args))}")
    register(args, args.folder)


def send_scores(args: argparse.Namespace) -> None:
    """The end of `minilora evaluate`, with ``--mlflow``."""
    if args.mlflow:
        from minilora.integrations.tracking import track_scores
        track_scores(args.adapter or args.model, args.out, _store(args))


@contextmanager
def registered_model(args: argparse.Namespace) -> Iterator[tuple[str | None, str | None]]:
    """``--model models:/NAME@ALIAS``: fetched for the length of the block, its base and adapter named in `args` instead.

    Yields: name and version in the registry, or None and None for any other model.
    """
    if not args.model.startswith("models:/"):
        if args.registry and not args.mlflow:
            raise ConfigError("--registry needs --mlflow")
        yield None, None
        return
    if args.adapter:
        raise ConfigError(f"{args.model} brings its own adapter: leave --adapter out")
    from minilora.integrations.serving import fetched
    with fetched(args.model, _store(args)) as found:
        args.model, args.adapter = found.model, found.adapter
        yield found.name, found.version


def predict_by_spark(args: argparse.Namespace, asked: Asked) -> None:
    """`minilora predict --spark`."""
    if args.resume:
        raise ConfigError("--resume goes on with one file; Spark tries its own tasks again, and writes a folder anew")
    from minilora.audit_log import audited
    from minilora.integrations.spark import Labelling, check_answers, predict_files
    how = Labelling(args.model, args.adapter, args.labels, args.free, args.template, args.quantize, args.device, args.dtype,
                    args.max_length, args.pad_vocab, args.input_column)
    check_answers(args.data, args.out, how, args.overwrite)
    with audited(asked, args.audit) as tally:
        rows = predict_files(args.data, args.out, how, args.workers, args.overwrite, tally, args.quiet)
    if not args.quiet:
        print(f"{rows:,} rows in {args.out}")
