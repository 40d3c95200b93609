"""The model card says what a run was made from and what it must not be used for; evaluating adds what it scored."""
from __future__ import annotations

import dataclasses
import hashlib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minilora import card, score
from minilora.card import record_scores, write_model_card
from minilora.config import TrainConfig
from minilora.evaluate import Evaluation, evaluate
from minilora.evaluation import Scored
from minilora.report.runfiles import _read_card
from minilora.train import TrainResult

LABELS = ["CT Brain", "MR Knee"]


def scored(right: int, n: int = 10) -> Evaluation:
    def embed(texts: list[str]) -> Tensor:
        return torch.tensor([[1.0, 0.0] if text == LABELS[0] else [0.0, 1.0] for text in texts])
    references = [LABELS[index % 2] for index in range(n)]
    predictions = [label if index < right else LABELS[1 - index % 2] for index, label in enumerate(references)]
    return evaluate(predictions, references, embed, resamples=20)       # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with its card."""
    data = tmp_path / "train.csv"
    data.write_text("input,label\nheadache,CT Brain\n")
    config = TrainConfig(model="some-lab/base-7b", data=str(data), out=str(tmp_path / "run"), r=8, lr=3e-4, dropout=0.05,
                         max_length=300, seed=11)
    (tmp_path / "run").mkdir()
    write_model_card(TrainResult(tmp_path / "run", 7, 0.5, 0.6, 1000, 10000, 1.0, 1), config, LABELS, 1)
    return tmp_path / "run"


def test_base_data_settings_and_limits_are_all_there(run: Path) -> None:
    text = (run / "README.md").read_text()
    data = hashlib.sha256((run.parent / "train.csv").read_bytes()).hexdigest()
    for part in ('base_model: "some-lab/base-7b"', data, "r=8, alpha=32, dropout=0.05", "0.0003 at its peak", "| seed | 11 |",
                 "at most 300 tokens", "q_proj", "4-bit NF4, double-quantized", "Intended use", "no medical device",
                 "- MR Knee"):
        assert part in text, part
    assert "headache" not in text and "Scores" not in text


def test_scores_come_with_intervals_and_the_tables_hash(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "test.csv"
    table.write_text("input,label\nknee hurts,MR Knee\n")
    before = (run / "README.md").read_text()
    record_scores(run, table, scored(8))
    text = (run / "README.md").read_text()
    line, = (line for line in text.splitlines() if line.startswith("| `"))
    assert hashlib.sha256(table.read_bytes()).hexdigest()[:16] in line
    assert "| 10 | chosen among labels | 0.800 [" in line and "knee hurts" not in text
    start, end = text.index("## Scores"), text.index("## Intended use")
    assert start < end and text[:start] + text[end:] == before


def test_a_table_has_one_line_and_each_table_its_own(run: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    one.write_text("1")
    other.write_text("2")
    record_scores(run, one, scored(5))
    record_scores(run, other, scored(9), free=True)
    record_scores(run, one, scored(10))
    lines = [line for line in (run / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert len(lines) == 2 and "written freely | 0.900" in lines[0] and "chosen among labels | 1.000" in lines[1]
    assert (run / "README.md").read_text().count("## Scores") == 1


def test_the_report_reads_the_same_card_as_before(run: Path, tmp_path: Path) -> None:
    before = _read_card(run / "README.md")
    (tmp_path / "test.csv").write_text("1")
    record_scores(run, tmp_path / "test.csv", scored(8))
    assert _read_card(run / "README.md") == before and before["data"].startswith("1 notes")


def test_a_card_that_training_did_not_write_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("1")
    record_scores(tmp_path, tmp_path / "test.csv", scored(8))
    assert [path.name for path in tmp_path.iterdir()] == ["test.csv"]
    (tmp_path / "README.md").write_text("Somebody else's model.")
    record_scores(tmp_path, tmp_path / "test.csv", scored(8))
    assert (tmp_path / "README.md").read_text() == "Somebody else's model."


def test_cosine_says_by_whose_embeddings_where_they_are_not_the_base_s(run: Path, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("1")
    by_minilm = dataclasses.replace(scored(8), scored=Scored("tiny", None, "0" * 64, "1" * 64, "minilm", 4, "0.1.0"))
    record_scores(run, tmp_path / "test.csv", by_minilm)
    assert "(minilm) |" in (run / "README.md").read_text()
    record_scores(run, tmp_path / "test.csv", scored(8))
    assert "minilm" not in (run / "README.md").read_text()


def test_a_checkout_that_is_not_installed_has_no_version_and_scores_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(card, "version", unknown)
    assert card.own_version() == score.own_version() == "from a checkout"
