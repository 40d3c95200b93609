"""--overwrite replaces what an earlier output of the kind was, and nothing that is read or that somebody else put there."""
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from minilora import TrainConfig, train
from minilora.cli import main
from tests.models import write_model
from tests.notes import notes, write_csv


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (a model), run/ (an adapter over it), full/ (a run that is a model), scores/, merged/, set/, train.csv."""
    folder = tmp_path_factory.mktemp("made")
    base = write_model(folder / "base", torch_dtype="bfloat16")
    data = write_csv(folder / "train.csv", notes(24))
    settings: dict[str, Any] = {"model": str(base), "data": str(data), "r": 4, "max_steps": 2, "max_length": 128,
                                "template": "inst", "dtype": "float32", "quiet": True}
    train(TrainConfig(**settings, out=str(folder / "run")))
    train(TrainConfig(**settings, out=str(folder / "full"), tune="full", quantize="none"))
    for words in ([*scoring(folder), "--out", folder / "scores"], ["data", folder / "set", "--n", 100],
                  ["merge", "--model", base, "--adapter", folder / "run", "--out", folder / "merged", "--quiet"]):
        assert main([str(word) for word in words]) == 0
    return folder


def scoring(folder: Path) -> list[Any]:
    return ["evaluate", "--model", folder / "base", "--adapter", folder / "run", "--data", folder / "train.csv", "--quiet"]


def training(folder: Path, **flags: Any) -> list[Any]:
    given = {"model": folder / "base", "data": folder / "train.csv", "template": "inst", "r": 4, "max-steps": 2,
             "max-length": 128, "dtype": "float32", **flags}
    return ["train", "--quiet", *(word for name, value in given.items() for word in (f"--{name}", value))]


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "here")
    return tmp_path / "here"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, words: list[Any]) -> str:
    before = content(folder)
    capsys.readouterr()
    assert main([*map(str, words), "--overwrite"]) == 2
    assert content(folder) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("out", ["run", "scores", "merged", "set"])
def test_what_an_earlier_command_wrote_is_replaced(here: Path, out: str) -> None:
    words = {"run": training(here), "scores": scoring(here), "set": ["data", here / "set", "--n", 100],
             "merged": ["merge", "--model", here / "base", "--adapter", here / "run", "--quiet"]}[out]
    assert main([*map(str, words), *([] if out == "set" else ["--out", str(here / out)]), "--overwrite"]) == 0


def test_a_run_that_other_commands_added_to_is_replaced(here: Path) -> None:
    assert main([*map(str, scoring(here)), "--out", str(here / "run" / "evaluation")]) == 0
    assert main(["report", str(here / "run")]) == 0
    assert {"evaluation", "report.html"} <= {path.name for path in (here / "run").iterdir()}
    assert main([*map(str, training(here)), "--out", str(here / "run"), "--overwrite"]) == 0
    assert not (here / "run" / "evaluation").exists()


@pytest.mark.parametrize("out", ["run", "scores", "merged", "set"])
@pytest.mark.parametrize("name", ["notes.txt", "src/code.py"])
def test_a_folder_that_holds_something_else_is_left_alone(here: Path, out: str, name: str,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    (here / out / name).parent.mkdir(exist_ok=True)
    (here / out / name).write_text("important")
    words = {"run": training(here), "scores": scoring(here), "set": ["data", here / "set", "--n", 100],
             "merged": ["merge", "--model", here / "base", "--adapter", here / "run", "--quiet"]}[out]
    said = refused(capsys, here, [*words, *([] if out == "set" else ["--out", here / out])])
    assert f"{out} holds {name.split('/')[0]}, which no earlier output of this kind would" in said


def test_the_project_that_a_configuration_lies_in_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "config.toml").write_text(f'model = "{here / "base"}"\ntemplate = "inst"\nmax_steps = 2\nmax_length = 128\n')
    assert "holds full, which no earlier output" in refused(
        capsys, here, ["train", "--config", here / "config.toml", "--data", here / "train.csv", "--out", here, "--quiet"])


@pytest.mark.parametrize("words", [
    ["quantize", "full", "full"], ["quantize", "link", "full"], ["quantize", "full", "."],
    ["merge", "--model", "full", "--adapter", "run", "--out", "full"],
    ["merge", "--model", "base", "--adapter", "run", "--out", "base"],
], ids=" ".join)
def test_a_model_is_not_replaced_by_what_is_made_of_it(here: Path, words: list[str], monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(here)
    (here / "link").symlink_to("full")
    if words[2] == ".":
        shutil.copy("full/config.json", "config.json")
    else:
        for name in ("config.toml", "metrics.jsonl"):
            (here / "full" / name).unlink()
        shutil.rmtree("full/checkpoints")
    said = refused(capsys, here, [*words, "--quiet"])
    assert "which is read here and would be gone" in said or (words[2] == "." and ". holds base" in said)


@pytest.mark.parametrize("flags", [{"model": "full"}, {"data": "full/README.md"}, {"val": "full/labels.txt"},
                                   {"template": "full/minilora.json"}], ids=str)
def test_a_run_does_not_replace_what_it_is_trained_on(here: Path, flags: dict[str, str], monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(here)
    assert "which is read here and would be gone" in refused(capsys, here, [*training(here, **flags), "--out", "full"])


def test_a_table_is_not_replaced_by_its_scores(here: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(here)
    words = [*scoring(here)[:-3], "--data", "scores/predictions.csv", "--out", "scores", "--quiet"]
    assert "scores is or holds scores/predictions.csv, which is read here" in refused(capsys, here, words)
