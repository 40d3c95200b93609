"""The pipeline: its commands are ones that the parser takes, a small run of it comes to its end, and is not done twice."""
from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["data", "train", "merge", "track", "predict", "evaluate", "report"]
ELSEWHERE = {**os.environ, "MINILORA_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def pipeline(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(ROOT / "scripts" / "pipeline"), *map(str, words)], capture_output=True, text=True, env=ELSEWHERE)


def listed(out: Path) -> list[list[str]]:
    return [shlex.split(line) for line in pipeline("--list", out, 200).stdout.splitlines()]


def test_each_stage_is_a_command_that_the_parser_takes(tmp_path: Path) -> None:
    stages, parser = listed(tmp_path / "a folder" / "out"), build_parser()
    ours = [words[1:] for words in stages if words[0] == "minilora"]
    assert [parser.parse_args(words).command for words in ours] == STAGES
    assert [words[:3] for words in stages if words[0] != "minilora"] == [["mlflow", "models", "predict"]]
    assert list(tmp_path.iterdir()) == [], "listing makes nothing"


def test_what_a_stage_reads_an_earlier_one_wrote(tmp_path: Path) -> None:
    written: set[str] = set()
    for words in listed(tmp_path / "out"):
        named = [word for word in words if word.startswith(str(tmp_path))]
        outs = {words[index + 1] for index, word in enumerate(words) if word == "--out"} | {words[2]} & {f"{tmp_path}/out/data"}
        for path in set(named) - outs - {f"{tmp_path}/out/note.csv"}:
            assert any(path == known or path.startswith(f"{known}/") for known in written), f"{words[1]} reads {path}"
        written |= outs


@pytest.mark.timeout(1200)
def test_a_small_run_ends_with_a_registered_model_and_a_scored_table_and_is_not_done_twice(tmp_path: Path) -> None:
    """The real thing on two hundred notes: some forty seconds on two idle cores."""
    pytest.importorskip("mlflow", reason="MLflow is not installed: it comes with the extra [mlflow]")
    pytest.importorskip("pyspark", reason="PySpark is not installed: it comes with the extra [spark]")
    if shutil.which("java") is None:
        pytest.skip("no Java here, on which Spark runs")
    out = tmp_path / "out"
    done = pipeline(out, 200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    scores = json.loads((out / "scores" / "metrics.json").read_text())
    labels = (out / "run" / "labels.txt").read_text().splitlines()
    assert scores["n"] == 20 and 0 <= scores["cosine"] <= 1 and scores["scored"]["answers"]
    served = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"predictions"')))
    assert served["predictions"][0]["prediction"] in labels, "MLflow loaded it in a process of its own"
    line, = [json.loads(line) for line in (out / "predictions-audit.jsonl").read_text().splitlines()]
    assert (line["registered"], line["version"], line["spark"], line["rows_read"]) == ("protocols", "1", True, 20)
    assert line["output_sha256"] == scores["scored"]["answers"]
    assert (out / "report.html").is_file() and out.stat().st_mode & 0o077 == 0

    again = pipeline(out, 200)
    assert again.returncode == 0 and again.stdout.count("done already") == len(STAGES) + 1

    # The first stage behind which something has gone, and all that come after it, are done anew; here the second cannot be.
    for path in ("done/evaluate", "done/report"):
        (out / path).unlink()
    shutil.rmtree(out / "answers.parquet")
    failed = pipeline(out, 200)
    assert failed.returncode == 2 and failed.stdout.count("done already") == 5
    assert "answers.parquet" in failed.stderr.splitlines()[-2]
    assert failed.stderr.splitlines()[-1].startswith("pipeline: stage 6 (evaluate) failed")
    assert not (out / "done" / "report").exists() and "The run as a page" not in failed.stdout
