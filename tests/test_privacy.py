"""Patient text stays where it was put: planted notes are looked for in everything that a whole run leaves and says."""
from __future__ import annotations

import ast
import importlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.cli import main
from tests.models import write_model
from tests.notes import LABELS, write_csv

# Head, middle and tail of every note: a name, a number, a date, and letters that JSON and HTML write in another way.
WORDS = ("Quasimodo", "Esméralda", "MRN 8675309", "12.03.1831", "campanile")
TOKEN = "hf_plantedPlantedPlantedPlanted"
NOTES = [(f"{WORDS[0]} {WORDS[1]} {number}, {WORDS[2]}: {'pain, ' * (number % 4)}fell on {WORDS[3]} from the {WORDS[4]}", label)
         for number, label in enumerate(LABELS * 5)]
PACKAGE = Path(__file__).resolve().parents[1] / "minilora"


def forms() -> set[bytes]:
    """Each planted word as text, as JSON and HTML escape it, in UTF-16, and in any case."""
    texts = {*WORDS, "Esm\\u00e9ralda", "Esm&#233;ralda", "Esm&eacute;ralda", "8675309", TOKEN}
    return {text.casefold().encode(code) for text in texts for code in ("utf-8", "utf-16-le")}


def told(content: bytes) -> list[bytes]:
    folded = content.decode("utf-8", "surrogateescape").casefold().encode("utf-8", "surrogateescape")
    return [form for form in forms() if form in folded]


def test_a_planted_word_is_found_in_every_form() -> None:
    for text in ("x QUASIMODO", "Esméralda", 'Esm\\u00E9ralda"', "Esm&#233;ralda", f"token {TOKEN}"):
        assert told(text.encode()), text
    assert told("campanile".encode("utf-16-le")) and not told(b"CT Brain W Contrast")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model and tables, a token in the environment, no network, and no protection by the user's own file mask."""
    def connect(*_: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    write_model(tmp_path / "model")
    write_csv(tmp_path / "train.csv", NOTES)
    write_csv(tmp_path / "test.csv", NOTES[:8])
    before = os.umask(0)
    yield tmp_path
    os.umask(before)


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command; its exit code, and all it said, whatever part of the program did."""
    def run(*words: Any) -> tuple[int, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        captured = capfd.readouterr()
        return code, captured.out + captured.err
    return run


Say = Callable[..., tuple[int, str]]


def train_words(world: Path, out: Path, *more: Any) -> list[Any]:
    return ["train", "--model", world / "model", "--data", world / "train.csv", "--val", world / "test.csv", "--out", out,
            "--r", 4, "--epochs", 2, "--batch-size", 4, "--max-length", 192, "--lr", 0.01, "--dtype", "float32",
            "--device", "cpu", "--save-every", 3, "--eval-every", 2, *more]


def holding(folder: Path, *inputs: str) -> dict[str, int]:
    """Every file but the inputs in which a planted word stands, and who may read it."""
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")
            if path.is_file() and path.name not in inputs and told(path.read_bytes())}


def test_a_whole_run_keeps_notes_and_token_to_itself(world: Path, say: Say) -> None:
    run, base = world / "run", ["--model", world / "model"]
    adapted = [*base, "--adapter", run]
    lines = [
        train_words(world, run, "--max-steps", 4, "--optimizer", "paged_adamw"),
        train_words(world, run, "--resume", "--optimizer", "paged_adamw"),
        train_words(world, run, "--overwrite"),
        train_words(world, world / "started", "--init-lora-weights", "pissa", "--max-steps", 2),
        train_words(world, world / "full", "--tune", "full", "--quantize", "none", "--max-steps", 2),
        ["evaluate", *adapted, "--data", world / "test.csv", "--out", run / "evaluation"],
        ["evaluate", *adapted, "--free", "--data", world / "test.csv", "--out", world / "free"],
        ["predict", *adapted, "--data", world / "test.csv", "--out", world / "predictions.csv"],
        ["predict", *adapted, "--data", world / "test.csv", "--out", world / "predictions.jsonl"],
        ["predict", *adapted, "--note", NOTES[0][0]],
        ["merge", *adapted, "--out", world / "merged"], ["quantize", world / "model", world / "quantized"],
        ["report", run], ["report", run, "--out", world / "shown.html", "--show-text"],
        ["memory", *base, "--seq", 128], ["show", *base, "--data", world / "train.csv"]]
    for words in lines:
        code, said = say(*words)
        assert code == 0, said
        # `show` is there to show a note, and says so in its help: here a token a byte, with bars between.
        found = told(said.replace("|", "").encode() if words[0] == "show" else said.encode())
        assert bool(found) == (words[0] == "show"), f"{words[0]}: {found}"
    assert holding(world, "train.csv", "test.csv") == dict.fromkeys(
        ("run/evaluation/predictions.csv", "free/predictions.csv", "predictions.csv", "predictions.jsonl", "shown.html"), 0o600)


loop, stepping = importlib.import_module("minilora.train"), importlib.import_module("minilora.stepping")


def broken_loss(*_: Any) -> torch.Tensor:
    return torch.tensor(float("nan"), requires_grad=True)


def no_memory(*_: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def asked_to_stop(*_: Any) -> float:
    os.kill(os.getpid(), signal.SIGTERM)
    return 1.0


@pytest.mark.parametrize(("module", "name", "replacement", "code"), [
    (stepping, "label_loss", broken_loss, 2), (stepping, "label_loss", no_memory, 2), (os, "fsync", no_disk, 2),
    (loop, "validation_loss", asked_to_stop, 143)], ids=["NaN", "memory", "disk", "signal"])
def test_a_run_that_fails_keeps_notes_to_itself(world: Path, say: Say, monkeypatch: pytest.MonkeyPatch, module: Any, name: str,
                                                replacement: Any, code: int) -> None:
    monkeypatch.setattr(module, name, replacement)
    ended, said = say(*train_words(world, world / "run"))
    assert ended == code and told(said.encode()) == [], said
    assert holding(world, "train.csv", "test.csv") == {}


@pytest.mark.parametrize("words", [
    ["train", "--model", "MODEL", "--out", "OUT", "--input-column", "label", "--label-column", "input"],
    ["train", "--model", "MODEL", "--out", "OUT", "--label-column", "protocol"],
    ["train", "--model", "MODEL", "--out", "OUT", "--val", "mixed.csv"],
    ["train", "--model", "MODEL", "--out", "OUT", "--data", "ragged.csv"],
    ["train", "--model", "MODEL", "--out", "OUT", "--data", "quotes.csv"],
    ["train", "--model", "MODEL", "--out", "OUT", "--data", "latin.csv"],
    ["predict", "--model", "MODEL", "--free", "--data", "ragged.csv", "--out", "OUT.csv"],
    ["predict", "--model", "MODEL", "--free", "--note", *NOTES[0][0].split()]], ids=lambda words: " ".join(words[5:]))
def test_bad_input_is_told_without_quoting_a_note(world: Path, say: Say, words: list[str]) -> None:
    note = NOTES[0][0]
    (world / "ragged.csv").write_text(f"input,label\n{note},CT\n")
    (world / "quotes.csv").write_text(f'input,label\n"{note}" {note},CT\n')
    (world / "latin.csv").write_bytes(f"input,label\n{note},CT\n".encode("latin-1"))
    write_csv(world / "mixed.csv", [(label, text) for text, label in NOTES[:3]])
    places = {"MODEL": world / "model", "OUT": world / "out", "OUT.csv": world / "out.csv"}
    given = [str(places.get(word, world / word if word.endswith(".csv") else word)) for word in words]
    if given[0] == "train" and "--data" not in given:
        given += ["--data", str(world / "train.csv")]
    code, said = say(*given, "--quiet")
    assert code == 2 and len(said.splitlines()) == 1, said
    assert told(said.encode()) == [], said


def test_what_a_killed_prediction_leaves_is_the_owners_alone(world: Path) -> None:
    code = ("import os, signal, sys; os.umask(0); os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL); "
            "from minilora.cli import main; sys.exit(main(sys.argv[1:]))")
    (world / "labels.txt").write_text("\n".join(LABELS) + "\n")
    ended = subprocess.run([sys.executable, "-c", code, "predict", "--model", str(world / "model"), "--labels",
                            str(world / "labels.txt"), "--data", str(world / "test.csv"), "--out", str(world / "out.csv")],
                           capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (left, mode), = holding(world, "train.csv", "test.csv").items()
    assert left.startswith(".tmp-") and mode == 0o600


# No code and nothing else from the network


CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN = {"requests", "urllib", "http", "socket", "httpx", "ftplib", "marshal", "shelve", "dill", "cloudpickle"}


def violations(source: str, name: str) -> list[str]:
    """What would run code from a file or from the network, or reach for the network anywhere but in `hub`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            if module.partition(".")[0] in FORBIDDEN or (module.startswith("huggingface_hub") and name != "hub"):
                found.append(f"line {node.lineno} imports {module}")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            weights_only = any(word.arg == "weights_only" and getattr(word.value, "value", None) is True
                               for word in node.keywords)
            if called in CALLS or called in ("pickle.load", "pickle.loads", "os.system") or \
                    (called == "torch.load" and not weights_only) or \
                    any(word.arg in ("trust_remote_code", "shell", "allow_pickle") for word in node.keywords):
                found.append(f"line {node.lineno} calls {called}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_runs_no_code_that_came_from_elsewhere(path: Path) -> None:
    peers = path.relative_to(PACKAGE).parts[0] == "bench"           # measures what others do, as their pages say it
    assert peers or violations(path.read_text(encoding="utf-8"), path.stem) == []


@pytest.mark.parametrize("line", ["import requests", "from urllib.request import urlopen", "eval(text)", "pickle.loads(data)",
                                  "torch.load(path)", "torch.load(path, weights_only=False)", "f(trust_remote_code=True)",
                                  "np.load(path, allow_pickle=True)", "subprocess.run(line, shell=True)",
                                  "from huggingface_hub import snapshot_download"])
def test_the_checker_finds_code_from_elsewhere(line: str) -> None:
    assert violations(line, "train") and not violations("torch.load(path, weights_only=True)", "train")
