"""MLflow: what is sent of a run, what never is, what a store that fails does, and a registered model in a fresh process."""
from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: it comes with the extra [mlflow]")

from minilora import TrainConfig, train  # noqa: E402
from minilora.audit_log import FILE, model_digest  # noqa: E402
from minilora.cli import main  # noqa: E402
from minilora.errors import ConfigError, OutputError, StoppedError  # noqa: E402
from minilora.integrations import tracking  # noqa: E402
from minilora.integrations.serving import DIGEST_TAG, EXAMPLE, register  # noqa: E402
from minilora.integrations.tracking import STATE_FILE, Store, follow, read_state, sync, track, track_scores  # noqa: E402
from minilora.predict import ADDED_COLUMNS  # noqa: E402
from tests.notes import LABELS, SECRET, notes, write_csv  # noqa: E402
from tests.runs import metrics_lines, write_run  # noqa: E402


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path}/store/mlflow.db")


@pytest.fixture(autouse=True)
def folder_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()


def history(store: Store, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in store.client().get_metric_history(run_id, name)]


def test_each_step_is_sent_once_however_often_a_run_is_sent(store: Store, tmp_path: Path) -> None:
    lines = metrics_lines(30)
    run = write_run(tmp_path / "run", lines=lines[:20], finished=False)
    client = store.client()
    run_id = sync(run, store, client)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines[20:29]))
        file.write(json.dumps(lines[29])[:40])              # half there
    assert sync(run, store, client) == sync(run, store, client) == run_id
    assert history(store, str(run_id), "loss") == [(line["step"], line["loss"]) for line in lines[:29]]
    # Resumed from an earlier checkpoint: the steps behind it are done, and written, again.
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:25]))
    sync(run, store, client)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sync(run, store, client)
    assert [step for step, _ in history(store, str(run_id), "loss")] == list(range(1, 31))
    assert len(history(store, str(run_id), "system/resident_bytes")) == 3


def test_settings_and_the_datas_hash_are_sent_and_no_note(store: Store, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "notes.csv", notes(40))
    run = write_run(tmp_path / "run", data=str(data), lr=3e-4)
    run_id = track(run, store)
    sent = store.client().get_run(run_id)
    assert sent.data.params["lr"] == "0.0003" and sent.data.params["model"] == "tiny" and sent.info.status == "FINISHED"
    assert len(sent.data.tags["data_sha256"]) == 64 and sent.info.run_name == "run"
    names = {artifact.path for artifact in store.client().list_artifacts(run_id)}
    assert names == {"README.md", "config.toml", "labels.txt", "report.html"}
    for path in (tmp_path / "store").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_the_store_and_its_artifacts_are_their_owners_alone(store: Store, tmp_path: Path) -> None:
    track(write_run(tmp_path / "run"), store)
    assert (tmp_path / "store" / "mlflow.db").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "store" / "mlartifacts").stat().st_mode & 0o777 == 0o700


def test_a_store_out_of_reach_stops_no_training_and_is_sent_to_later(store: Store, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"

    def refuse(*_: Any) -> None:
        raise ConnectionError(SECRET)

    monkeypatch.setattr(tracking, "sync", refuse)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with follow(run, store, seconds=0.01):
            write_run(run, finished=False)
    monkeypatch.undo()
    message, = [str(warning.message) for warning in said if "MLflow" in str(warning.message)]
    assert "ConnectionError" in message and SECRET not in message and "minilora track" in message
    assert len(history(store, track(run, store), "loss")) == 30


@pytest.mark.parametrize(("error", "status"), [(None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (StoppedError, "KILLED"),
                                               (ValueError, "FAILED")])
def test_the_store_is_told_how_a_run_ended(store: Store, tmp_path: Path, error: type[BaseException] | None,
                                           status: str) -> None:
    run = tmp_path / "run"
    try:
        with follow(run, store):
            write_run(run)
            if error is not None:
                raise StoppedError("stopped", 15) if error is StoppedError else error
    except BaseException as raised:
        assert type(raised) is error
    assert store.client().get_run(read_state(run)["run_id"]).info.status == status


def test_an_earlier_run_in_the_folder_is_not_sent_for_the_one_that_replaces_it(store: Store, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with follow(run, store, seconds=0.01):
        time.sleep(0.2)
    assert read_state(run) == {}


def test_scores_go_to_the_run_that_was_scored(store: Store, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "scores").mkdir()
    (run / "scores" / "metrics.json").write_text(json.dumps({"n": 9, "exact_match": 0.5, "labels": [], "ok": True}))
    track_scores(run, run / "scores", store)
    sent = store.client().get_run(read_state(run)["run_id"]).data.metrics
    assert sent["evaluation/exact_match"] == 0.5 and sent["evaluation/n"] == 9 and "evaluation/ok" not in sent


def test_what_is_no_run_or_no_store_is_said_in_one_line(store: Store, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no run"):
        track(tmp_path / "empty", store)
    with pytest.raises(ConfigError, match="no finished run"):
        register(write_run(tmp_path / "half", finished=False), store, "protocols")
    with pytest.raises(OutputError, match="MLflow takes nothing"):
        track(write_run(tmp_path / "run"), Store("http://user:hunter2@127.0.0.1:9/"))
    with pytest.raises(OutputError, match="cannot make the store"):
        track(tmp_path / "run", Store(f"sqlite:///{tmp_path}/nowhere/mlflow.db"))


ELSEWHERE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
LOADED = """
import json, mlflow, pandas, sys
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/protocols@champion")
print(json.dumps(model.predict(pandas.DataFrame({"note": [sys.argv[2], "", None], "other": [1, 2, 3]})).to_dict("list")))
"""


def test_a_model_is_trained_registered_and_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    data, uri = write_csv(tmp_path / "notes.csv", notes(40)), f"sqlite:///{tmp_path}/store/mlflow.db"
    command = ["train", "--model", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--max-steps", "3", "--quiet",
               "--mlflow", uri, "--register", "protocols", "--alias", "champion"]
    assert main(command) == 0
    model_folder, = (tmp_path / "store" / "mlartifacts").rglob("MLmodel")
    kept = {path.name for path in (model_folder.parent / "artifacts" / "run").iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "labels.txt"} <= kept
    assert not kept & {"metrics.jsonl", "checkpoints", "predictions.csv", STATE_FILE}
    version = Store(uri).client().get_model_version_by_alias("protocols", "champion")
    assert version.tags[DIGEST_TAG] == model_digest(tmp_path / "run"), "a line of the audit log leads to a version"
    done = subprocess.run([sys.executable, "-c", LOADED, uri, EXAMPLE], capture_output=True, text=True, env=ELSEWHERE)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    assert answers["prediction"][0] in LABELS and 0 < answers["probability"][0] <= 1
    assert answers["error"][1:] == ["empty note", "empty note"], "what is missing is no note that says nan"
    assert list(answers) == list(ADDED_COLUMNS), "the columns that predict adds to a table"
    assert 0 < answers["runner_up_probability"][0] <= answers["probability"][0]
    assert register(tmp_path / "run", Store(uri), "protocols") == 2
    model = ["predict", "--mlflow", uri, "--data", str(data), "--quiet", "--model"]
    for number, reference in enumerate(("models:/protocols@champion", "models:/protocols/2", "tiny")):
        folder = ["--adapter", str(tmp_path / "run")] if reference == "tiny" else []
        assert main([*model, reference, *folder, "--out", str(tmp_path / f"{number}.csv")]) == 0
    first, second, third = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(line["registered"], line["version"]) for line in (first, second)] == [("protocols", "1"), ("protocols", "2")]
    for key in ("model", "model_sha256", "adapter_sha256", "output_sha256"):
        assert first[key] == second[key] == third[key], f"{key}: the registered model is the run's"
    assert third["registered"] is None and first["adapter"] is None


@pytest.mark.parametrize(("reference", "more", "words"), [
    ("models:/protocols", [], "models:/NAME@ALIAS"), ("models:/protocols@gone", [], "the registry has no"),
    ("models:/gone/1", [], "the registry has no"), ("models:/protocols@champion", ["--adapter", "run"], "leave --adapter out")])
def test_a_registered_model_that_is_not_there_is_told_in_one_line(store: Store, reference: str, more: list[str], words: str,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    store.client().create_registered_model("protocols")
    capsys.readouterr()
    assert main(["predict", "--model", reference, *more, "--mlflow", store.tracking, "--note", "x"]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """MLflow's own server on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "server.log").open("w")
    process = subprocess.Popen([sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
                                "--artifacts-destination", str(tmp_path / "kept"), "--host", "127.0.0.1", "--port", str(port),
                                "--workers", "1"], stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        time.sleep(0.2)
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            break
        except OSError:
            assert process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
    yield url
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_server_takes_a_run_and_its_model_as_a_file_does(server: str, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "notes.csv", notes(40))
    command = ["train", "--model", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--max-steps", "2", "--quiet",
               "--mlflow", server, "--experiment", "orders", "--register", "protocols", "--alias", "champion"]
    assert main(command) == 0
    client = Store(server).client()
    run = client.get_run(read_state(tmp_path / "run")["run_id"])
    assert run.info.status == "FINISHED" and run.data.metrics["loss"] > 0
    assert client.get_experiment_by_name("orders").experiment_id == run.info.experiment_id
    assert client.get_model_version_by_alias("protocols", "champion").version in (1, "1")
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or path == data or SECRET.encode() not in path.read_bytes(), path
    done = subprocess.run([sys.executable, "-c", LOADED, server, EXAMPLE], capture_output=True, text=True, env=ELSEWHERE)
    assert done.returncode == 0 and json.loads(done.stdout)["prediction"][0] in LABELS, done.stderr[-2000:]


def test_flags_that_need_a_store_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "tiny", "--data", "x.csv", "--out", "y", "--register", "protocols"]) == 2
    assert "--mlflow" in capsys.readouterr().err


def test_training_meets_its_own_run(tmp_path: Path, store: Store) -> None:
    data = write_csv(tmp_path / "notes.csv", notes(40))
    config = TrainConfig(model="tiny", data=str(data), out=str(tmp_path / "run"), max_steps=4, quiet=True)
    with follow(config.out, store, seconds=0.05):
        train(config)
    run_id = read_state(tmp_path / "run")["run_id"]
    assert [step for step, _ in history(store, run_id, "loss")] == [1, 2, 3, 4]
    assert store.client().get_run(run_id).info.status == "FINISHED"
    train(dataclasses.replace(config, max_steps=2, overwrite=True))
    assert not (tmp_path / "run" / STATE_FILE).exists(), "the next run would be sent as this one"
