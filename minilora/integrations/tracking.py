"""MLflow: a run's settings, figures and files in a tracking store.

The run folder is the truth, and the store a copy of it.  `sync` sends what the store lacks, so that a store which was out of
reach, a training that was killed and one that was resumed lose nothing; a kill between sending and noting that it was sent
sends those steps twice, with the same values.  While training runs, `follow` syncs every few seconds from a thread; training
does not wait for it, and does not fail of it.

    mlflow.json                                 the run's id in the store, and how far it was sent
    config.toml, the data's SHA-256             parameters and a tag
    metrics.jsonl                               metrics, a value a step, and the memory of this process
    model card, settings, label set, report     artifacts

Nothing of a note is sent: not the data, not a prediction, and the report is the one without texts.

Lesson 19 explains it.
"""
from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from minilora.adapters import read_json_object
from minilora.config import read_toml
from minilora.errors import ConfigError, MiniloraError, OutputError, StoppedError
from minilora.files import file_sha256, write_json
from minilora.report import write_report
from minilora.runs import CONFIG_FILE, METRICS_FILE, resident_bytes

if TYPE_CHECKING:
    from mlflow import MlflowClient

STATE_FILE = "mlflow.json"
EXPERIMENT = "minilora"
EMBEDDED = "sqlite:///mlflow.db"        # a file in the folder the command is given in; no server
SYNC_SECONDS = 5.0
RETRIES = "3"                           # a quarter of a minute; MLflow's own seven take four minutes to find a server away
METRICS_AT_ONCE = 1000                  # as many as a server takes in one call
SENT_FILES = ("README.md", CONFIG_FILE, "labels.txt")


@dataclass(frozen=True)
class Store:
    """Where runs and models are kept.

    Attributes:
        tracking: URI of the runs; a password in it is neither shown nor kept. registry: of the models, None: the same.
        experiment: a name for runs that belong together.
    """

    tracking: str = EMBEDDED
    registry: str | None = None
    experiment: str = EXPERIMENT

    def client(self) -> MlflowClient:
        """The library's client, whose calls go to this store.

        Raises: ConfigError: MLflow is not installed. OutputError: the store's file cannot be made.
        """
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError:
            raise ConfigError("--mlflow needs MLflow: pip install 'minilora[mlflow]'") from None
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
        if self.file is not None:
            try:                # before MLflow does, so that it is its owner's alone
                os.close(os.open(self.file, os.O_CREAT, 0o600))
                self.artifacts.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot make the store {self.file}: {error.strerror}; name another with --mlflow "
                                  "sqlite:///FILE") from None
        return MlflowClient(tracking_uri=self.tracking, registry_uri=self.registry)

    @property
    def file(self) -> Path | None:
        """The database, where it is a file here."""
        return Path(self.tracking.removeprefix("sqlite:///")).absolute() if self.tracking.startswith("sqlite:///") else None

    @property
    def artifacts(self) -> Path:
        """The folder beside that file where artifacts lie."""
        assert self.file is not None
        return self.file.with_name("mlartifacts")


def read_state(out: Path) -> dict[str, Any]:
    """What was sent of a run: run_id, steps; empty before the first time."""
    return read_json_object(out / STATE_FILE) if (out / STATE_FILE).is_file() else {}


def sync(out: Path, store: Store, client: MlflowClient) -> str | None:
    """Send what the store lacks of a run folder.

    Returns: the run's id there, or None where there is no run in the folder yet.
    Raises: what MLflow raises; MiniloraError: the folder's own files cannot be read.
    """
    from mlflow.entities import Metric

    if not (out / CONFIG_FILE).is_file():
        return None
    state = read_state(out)
    if "run_id" not in state:
        state = {"run_id": _new_run(out, store, client), "steps": 0}
        write_json(out / STATE_FILE, state)
    run_id, now = str(state["run_id"]), int(time.time() * 1000)
    metrics = []
    for line in _whole_lines(out / METRICS_FILE):
        if line["step"] > state["steps"]:
            metrics += [Metric(name, float(value), now, line["step"]) for name, value in line.items()
                        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)]
            state["steps"] = line["step"]
    if metrics:
        metrics.append(Metric("system/resident_bytes", float(resident_bytes()), now, state["steps"]))
    for start in range(0, len(metrics), METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_AT_ONCE])
    if metrics:
        write_json(out / STATE_FILE, state)
    return run_id


def _new_run(out: Path, store: Store, client: MlflowClient) -> str:
    from mlflow.entities import Param

    found = client.get_experiment_by_name(store.experiment)
    where = None if store.file is None else (store.artifacts / store.experiment).as_uri()
    experiment_id = found.experiment_id if found else client.create_experiment(store.experiment, artifact_location=where)
    settings = read_toml(out / CONFIG_FILE)
    data = Path(settings["data"])
    tags = {"data_sha256": file_sha256(data)} if data.is_file() else {}
    run_id: str = client.create_run(experiment_id, run_name=out.absolute().name, tags=tags).info.run_id
    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in settings.items()])
    return run_id


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl; the last one may be half there."""
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def finish(out: Path, store: Store, client: MlflowClient, status: str = "FINISHED") -> str | None:
    """Send the rest: metrics, files, report, and how it ended (FINISHED, FAILED or KILLED).

    Returns, Raises: as `sync`.
    """
    run_id = sync(out, store, client)
    if run_id is None:
        return None
    for name in SENT_FILES:
        if (out / name).is_file():
            client.log_artifact(run_id, str(out / name))
    with TemporaryDirectory() as folder:
        try:
            client.log_artifact(run_id, str(write_report(out, Path(folder) / "report.html")))
        except MiniloraError as error:          # a run that was stopped early may have nothing to draw
            warnings.warn(f"no report of {out} in MLflow: {error}", stacklevel=2)
    client.set_terminated(run_id, status)
    return run_id


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells one file of a name from the next: training writes its settings anew, also when it goes on with a run."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextmanager
def follow(out: str | Path, store: Store, seconds: float = SYNC_SECONDS) -> Iterator[None]:
    """While the body trains into a run folder, send what it writes there, and at its end the rest.

    Args: seconds: between two syncs.
    Raises: ConfigError: MLflow is not installed; what the body raises.  A store that fails is warned of once, and
        ``minilora track`` sends later what it missed.
    """
    client, out = store.client(), Path(out)
    done, failed = threading.Event(), list[str]()

    before = _identity(out / CONFIG_FILE)           # of an earlier run there, which is none of ours

    def attempt(last: str | None = None) -> None:
        if _identity(out / CONFIG_FILE) == before:
            return
        try:
            if last is None:
                sync(out, store, client)
            else:
                finish(out, store, client, last)
        except Exception as error:      # whatever MLflow, its server, its database or the network raise
            if not failed:
                failed.append(type(error).__name__)
                warnings.warn(f"MLflow takes nothing at present ({failed[0]}); training goes on, and `minilora track {out}` "
                              "sends it later", stacklevel=2)

    def loop() -> None:
        while not done.wait(seconds):
            attempt()

    thread = threading.Thread(target=loop, name="mlflow", daemon=True)
    thread.start()
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, StoppedError):
        status = "KILLED"
        raise
    finally:
        done.set()
        thread.join()
        attempt(status)


def track(run: str | Path, store: Store) -> str:
    """Send a run folder, whatever became of it; returns the run's id in the store.

    Raises: ConfigError: no run there. OutputError: the store takes nothing.
    """
    with or_one_line(store):
        return _known(run, finish(Path(run), store, store.client()))


def track_scores(run: str | Path, evaluation: str | Path, store: Store) -> None:
    """Send the figures of an evaluation, the numbers of its metrics.json, to the run that was evaluated.

    Raises: ConfigError: no run there. OutputError: the store takes nothing.
    """
    with or_one_line(store):
        from mlflow.entities import Metric

        client = store.client()
        run_id = _known(run, sync(Path(run), store, client))
        scores, now = read_json_object(Path(evaluation) / "metrics.json"), int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(f"evaluation/{name}", float(value), now, 0) for name, value in scores.items()
                                          if isinstance(value, (int, float)) and not isinstance(value, bool)])


def _known(run: str | Path, run_id: str | None) -> str:
    if run_id is None:
        raise ConfigError(f"{run} holds no run (no {CONFIG_FILE}) that could be sent to MLflow")
    return run_id


@contextmanager
def or_one_line(store: Store) -> Iterator[None]:
    """What MLflow raises, of which the text may hold an address with a password, as one line without."""
    try:
        yield
    except MiniloraError:
        raise
    except Exception as error:
        raise OutputError(f"MLflow takes nothing at present ({type(error).__name__}); is its server up, and --mlflow right?") \
            from error
