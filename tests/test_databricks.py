"""The Databricks job, as far as it can be held to anything without Databricks: its commands, their order, its entry point."""
from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")          # huggingface-hub needs it

from minilora.cli import build_parser, main  # noqa: E402
from tests.notes import notes, write_csv  # noqa: E402
from tests.test_pipeline import STAGES  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / "databricks"
BUNDLE = yaml.safe_load((FOLDER / "databricks.yml").read_text())
JOB = yaml.safe_load((FOLDER / "job.yml").read_text())["resources"]["jobs"]["minilora_pipeline"]
TASKS = {task["task_key"]: task for task in JOB["tasks"]}


def filled(word: Any) -> str:
    """A word with the bundle's variables at their defaults, which are those that are there."""
    return re.sub(r"\$\{var\.(\w+)\}", lambda found: str(BUNDLE["variables"][found[1]]["default"]), str(word))


def words(task: dict[str, Any]) -> list[str]:
    return [filled(word) for word in task["spark_python_task"]["parameters"]]


def before(key: str) -> set[str]:
    """Every task that must be done before this one."""
    needed = {entry["task_key"] for entry in TASKS[key].get("depends_on", [])}
    return needed.union(*(before(other) for other in needed))


def test_every_command_is_one_that_the_parser_takes_and_they_are_the_pipelines() -> None:
    parser, commands = build_parser(), [words(task) for task in TASKS.values()]
    assert [parser.parse_args(line).command for line in commands if line[0] != "copy"] == STAGES
    assert all(len(line) == 3 for line in commands if line[0] == "copy")
    assert all(isinstance(word, str) for task in TASKS.values() for word in task["spark_python_task"]["parameters"])


def test_each_task_reads_what_one_before_it_wrote_and_no_command_writes_a_run_into_a_volume() -> None:
    def wrote(line: list[str]) -> set[str]:
        target = {line[2]} if line[0] == "copy" else {line[1]} if line[0] == "data" else set()
        return target | {line[index + 1] for index, word in enumerate(line) if word in ("--out", "--audit")}

    for key, task in TASKS.items():
        line, known = words(task), set().union(*(wrote(words(TASKS[other])) for other in before(key)))
        for path in {word for word in line if word.startswith(("/local_disk0", "/Volumes"))} - wrote(line):
            assert any(path == other or path.startswith(f"{other}/") for other in known), f"{key} reads {path}"
        for path in wrote(line):
            assert line[0] in ("copy", "predict") or not path.startswith("/Volumes"), f"{key} writes {path}"


def test_the_bundle_holds_together() -> None:
    keys = {cluster["job_cluster_key"] for cluster in JOB["job_clusters"]}
    assert "job.yml" in BUNDLE["include"] and all((FOLDER / name).is_file() for name in BUNDLE["include"])
    for task in TASKS.values():
        assert task["job_cluster_key"] in keys and task["libraries"]
        assert (FOLDER / task["spark_python_task"]["python_file"]).is_file()
        assert {entry["task_key"] for entry in task.get("depends_on", [])} <= TASKS.keys()
    text = (FOLDER / "databricks.yml").read_text() + (FOLDER / "job.yml").read_text()
    assert text.count("NOT RUN") == 2
    assert set(re.findall(r"\$\{var\.(\w+)\}", text)) == BUNDLE["variables"].keys()


@pytest.fixture(scope="module")
def run() -> Callable[[list[str]], None]:
    return runpy.run_path(str(FOLDER / "run.py"))["run"]    # type: ignore[no-any-return]


def test_a_command_that_fails_raises_and_one_that_does_not_returns(run: Callable[[list[str]], None], tmp_path: Path) -> None:
    run(["data", str(tmp_path / "data"), "--n", "100", "--quiet"])
    with pytest.raises(RuntimeError, match="minilora data ended with exit code 2"):
        run(["data", str(tmp_path / "data"), "--n", "100", "--quiet"])
    run(["copy", str(tmp_path / "data"), str(tmp_path / "volume" / "data")])
    run(["copy", str(tmp_path / "data" / "val.csv"), str(tmp_path / "volume" / "audit" / "1.csv")])
    for copied in ("data/train.csv", "audit/1.csv"):
        assert (tmp_path / "volume" / copied).stat().st_size > 100


@pytest.mark.timeout(900)
def test_under_spark_submit_the_clusters_own_spark_labels(tmp_path: Path) -> None:
    pyspark = pytest.importorskip("pyspark", reason="PySpark is not installed: it comes with the extra [spark]")
    if shutil.which("java") is None:
        pytest.skip("no Java here, on which Spark runs")
    data = write_csv(tmp_path / "notes.csv", notes(12))
    (tmp_path / "labels.txt").write_text("CT Brain\nMR Knee, left\n")
    predict = ["predict", "--model", "tiny", "--labels", tmp_path / "labels.txt", "--dtype", "float32", "--data", data]
    submit = [Path(pyspark.__file__).parent / "bin" / "spark-submit", "--master", "local[3]", FOLDER / "run.py", *predict,
              "--out", tmp_path / "out.jsonl", "--spark", "--quiet"]
    done = subprocess.run(list(map(str, submit)), capture_output=True, text=True, env={
        **os.environ, "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"})
    said = "\n".join(line for line in done.stderr.splitlines() if " INFO " not in line)
    assert done.returncode == 0, done.stdout[-2000:] + said[-2000:]
    parts = sorted((tmp_path / "out.jsonl").glob("part-*"))
    assert len(parts) == 3, "spark-submit's master, not the machine's cores"
    assert main([*map(str, predict), "--out", str(tmp_path / "one.jsonl")]) == 0
    found = [json.loads(line)["prediction"] for part in parts for line in part.read_text().splitlines()]
    assert found == [json.loads(line)["prediction"] for line in (tmp_path / "one.jsonl").read_text().splitlines()]
