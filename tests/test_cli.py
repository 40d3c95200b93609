"""The command line, in process: what it writes, and that bad input ends with one line, exit code 2 and nothing written."""
from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora import TrainConfig, load_model, load_tokenizer, train
from minilora.cli import build_parser, main
from minilora.data.tables import read_table
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import lora_layers
from minilora.predict import Predictor
from tests.models import write_model
from tests.notes import LABELS, SECRET, notes, write_csv

IDS = torch.arange(40)[None]
COMMANDS = ("demo", "data", "quantize", "train", "evaluate", "compare", "predict", "merge", "report", "audit")
HARD = [("He said: \"no pain\", twice", "CT Brain"), ("Zeile eins\nZeile zwei", "MR Knee, left"), ("", ""),
        ("naïve – 疼痛 🦴", "CT Brain"), ("carriage\r\nreturn", "C-Spine(Bone)"), ("comma, and 'quotes'", "CT Brain")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (a model), run/ (an adapter trained on it), train.csv, val.csv."""
    folder = tmp_path_factory.mktemp("world")
    base = write_model(folder / "base", torch_dtype="bfloat16")
    data = write_csv(folder / "train.csv", notes(24))
    write_csv(folder / "val.csv", notes(8))
    train(TrainConfig(model=str(base), data=str(data), out=str(folder / "run"), r=4, batch_size=8, epochs=4, lr=1e-2,
                      max_length=128, template="inst", dtype="float32", quiet=True))
    return folder


Call = Callable[..., tuple[int, str, str]]          # words -> exit code, stdout, stderr
Refused = Callable[..., str]                        # words, says= -> the one line
Writers = Callable[[Path], Iterator[list[Any]]]     # output -> command lines


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command line in this process."""
    def run(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return run


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")
            if path.name != "predictions-audit.jsonl"}          # has its line on a run that fails, too


@pytest.fixture
def refused(call: Call, tmp_path: Path) -> Refused:
    """Run a command line that must fail as bad input does; returns its one line."""
    def run(*words: Any, says: str | tuple[str, ...] = ()) -> str:
        before = tree(tmp_path)
        code, out, err = call(*words)
        assert code == 2, f"exit code {code}: {out}{err}"
        assert out == ""
        assert err.startswith("minilora: ") and err.endswith("\n") and err.count("\n") == 1, f"not one line: {err}"
        assert SECRET not in err and "Traceback" not in err
        assert tree(tmp_path) == before, "something was written"
        for part in (says,) if isinstance(says, str) else says:
            assert part in err, f"{part!r} is not in: {err}"
        return err
    return run


def succeeded(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, err
    return out


def train_words(world: Path, out: Path, **flags: Any) -> list[Any]:
    """A train command of two steps; `flags` replace or add."""
    given = {"model": world / "base", "data": world / "train.csv", "out": out, "max_steps": 2, "batch_size": 4, "r": 2,
             "max_length": 128, "dtype": "float32", **flags}
    words = ["train", "--quiet"]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", *([value] if value is not None else [])]
    return words


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_its_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for action in commands.choices[command]._actions:
        flag = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
        assert flag in text
        assert action.help, f"{flag} has no help"
        if action.default not in (None, "", argparse.SUPPRESS) and action.default is not False:
            assert f"(default: {action.default})" in text, flag
    if command == "train":
        for setting in dataclasses.fields(TrainConfig):
            shown = " ".join(setting.default) if isinstance(setting.default, tuple) else str(setting.default)
            if setting.default != "" and setting.default is not False:
                assert f"(default: {shown})" in text, setting.name


def test_the_commands_are_listed_without_a_long_import(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert [command for command in COMMANDS if f"    {command} " not in out] == []


# Bad flags


BAD_FLAGS: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r must be"), ({"r": "x"}, "argument --r: invalid int value"), ({"alpha": 0}, "alpha must be"),
    ({"lr": -1}, "lr must lie"), ({"lr": "nan"}, "lr must be a finite number"), ({"epochs": -1}, "epochs must lie"),
    ({"batch_size": 0}, "batch_size must lie"), ({"accumulate": 0}, "accumulate must lie"),
    ({"dropout": 1}, "dropout must lie"),
    ({"max_length": 3}, "max_length must lie"), ({"max_length": 4096}, "256 positions"), ({"warmup": 2}, "warmup must lie"),
    ({"max_length": 24}, "max_length"), ({"max_steps": 0, "epochs": 0}, "nothing to train"), ({"seed": -1}, "seed must lie"),
    ({"quantize": "int8"}, "argument --quantize: invalid choice"), ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ({"device": "tpu9"}, "unknown device 'tpu9'"), ({"blocksize": 0}, "blocksize must lie"),
    ({"tune": "full"}, "quantize none"),
    ({"target_modules": "query"}, "no linear layer is called 'query'"), ({"template": "none.txt"}, "no template 'none.txt'"),
    ({"resume": None, "overwrite": None}, "give one of the two"), ({"rank": 8}, "no place for --rank"),
    ({"model": ""}, "model is required"), ({"data": ""}, "data is required"), ({"resume": None}, "no run to resume"),
    ({"input_column": "label"}, "named for both"), ({"r": 10 ** 23}, "r must be at most 65,536"),
    ({"optimizer": "paged_adamw", "page_bytes": 10 ** 23, "resident_mib": "1e30"}, "page_bytes must lie"),
    ({"optimizer": "paged_adamw", "resident_mib": "1e30"}, "resident_mib must lie"),
    ({"max_steps": 10 ** 400}, "max_steps must lie"), ({"eval_every": 5}, "nothing to validate on"),
    ({"alias": "champion", "mlflow": None}, "add --register"),
]


@pytest.mark.parametrize(("flags", "says"), BAD_FLAGS, ids=[" ".join(f"{name}={value}" for name, value in flags.items())[:60]
                                                            for flags, _ in BAD_FLAGS])
def test_a_bad_training_flag_ends_with_one_line(world: Path, tmp_path: Path, refused: Refused, flags: dict[str, Any],
                                                says: str) -> None:
    refused(*train_words(world, tmp_path / "run", **flags), says=says)


@pytest.mark.parametrize(("words", "says"), [
    ([], "COMMAND"), (["trian"], "invalid choice: 'trian'"), (["data"], "out"),
    (["data", "x", "--n", "many"], "invalid int value"), (["data", "x", "--n", "0"], "n"),
    (["data", "x", "--seed", "-1"], "seed"), (["quantize", "base", "x", "--dtype", "int8"], "unknown dtype"),
    (["quantize", "base", "x", "--blocksize", "0"], "blocksize"),
    (["predict", "--model", "base"], "--note --data is required"),
    (["predict", "--model", "base", "--note", "a", "--data", "b"], "not allowed with argument"),
    (["predict", "--model", "base", "--note", "a", "--out", "b.csv"], "--out goes with --data"),
    (["predict", "--model", "base", "--note", "a", "--free", "--labels", "b"], "not allowed with argument"),
    (["predict", "--model", "base", "--note", "a"], "no label set"),
    (["predict", "--model", "base", "--adapter", "run", "--note", "a", "--max-length", "0"], "max_length"),
    (["predict", "--model", "base", "--adapter", "run", "--note", "a", "--max-length", "20"], "--max-length"),
    (["predict", "--model", "base", "--adapter", "run", "--note", " "], "--note: empty note"),
    (["predict", "--model", "base", "--adapter", "run", "--data", "train.csv"], "--data needs --out"),
    (["predict", "--model", "base", "--adapter", "run", "--note", SECRET, "has", SECRET], "put quotes around"),
    (["predict", "--model", "base", "--adapter", "run", "--note", "a", "--lab", "x"], "no place for --lab;"),
    (["predict", "--model", "base", "--adapter", "none", "--note", "a"], "no such adapter folder"),
    (["merge", "--model", "base", "--adapter", "run", "--out", "x", "--into", "8bit"], "invalid choice: '8bit'"),
    (["merge", "--model", "base", "--adapter", "none", "--out", "x"], "no such adapter folder"),
    (["evaluate", "--model", "base", "--adapter", "run", "--data", "train.csv"], "--out"),
    (["evaluate", "--model", "base", "--adapter", "run", "--data", "val.csv", "--out", "x", "--seed", "-1"], "--seed: must"),
    (["compare", "a", "b", "--seed", "-1"], "--seed: must lie"), (["demo", "--out", "x", "--seed", "-1"], "--seed: must lie"),
    (["memory", "--model", "tiny", "--processes", "0"], "--processes: must lie between 2"),
    (["data", "x", "--n", "9" * 20], "n from 100 to 10,000,000"),
    (["quantize", "base", "x", "--blocksize", "9" * 20], "must lie between 1 and 1,073,741,824"),
    (["predict", "--model", "base", "--adapter", "run", "--data", "val.csv", "--out", "x.csv", "--workers", "2"], "--spark"),
    (["predict", "--model", "base", "--data", "val.csv", "--out", "x.csv", "--spark", "--workers", "0"], "--workers: must lie"),
    (["track", "run", "--mlflow", "--alias", "champion"], "add --register"),
    (["audit", "--json", "no/claims.json"], "there is no folder no; make it first"),
    (["audit", "--json", "run", "--overwrite"], "run is a folder; name a file"),
    (["bench", "--json", "no/rows.json"], "there is no folder no; make it first"),
    (["bench", "--only", "machine", "--table", "run", "--overwrite"], "run is a folder; name a file"),
    (["bench", "--only", "machine", "--figure", "x.png"], "run it with --only scaling"),
    (["bench", "--only", "scaling", "--figure", "x.xyz"], "a name that ends in .png"),
    (["memory", "--model", "tiny", "--json", "no/table.json"], "there is no folder no; make it first"),
    (["report", "run", "--out", "no/page.html"], "there is no folder no; make it first"),
    (["data", "check", "train.csv", "--json", "train.csv", "--overwrite"], "train.csv, which is read here"),
    (["predict", "--model", "base", "--adapter", "run", "--data", "val.csv", "--out", "val.csv", "--overwrite"],
     "val.csv, which is read here"),
])
def test_a_bad_flag_ends_with_one_line(world: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, words: list[str],
                                       says: str) -> None:
    monkeypatch.chdir(world)
    before = set(world.iterdir())
    refused(*words, says=says)
    assert set(world.iterdir()) == before


@pytest.mark.parametrize("python", [[], ["-u"]], ids=["written at the end", "written line by line"])
def test_a_reader_that_goes_away_ends_a_command_without_a_traceback(python: list[str]) -> None:
    with subprocess.Popen([sys.executable, *python, "-m", "minilora", "memory", "--model", "7b"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": ""}) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


# Bad tables


@pytest.mark.parametrize(("content", "says"), [
    (None, ("no such file", "notes.csv")), (b"", "is empty"), (b"input,label\n", "header but no rows"),
    (f"note,protocol\n{SECRET},CT\n".encode(), ("no column 'input'", "'note', 'protocol'")),
    (f"input,label\n{SECRET},CT\n{SECRET},\n".encode(), ("row 2 (line 3)", "no label in column 'label'")),
    (f"input,label\n{SECRET},CT\n{SECRET},CT\n".encode(), "only one label"),
    (f"input,label\n{SECRET},CT\n ,MR\n".encode(), ("row 2 (line 3)", "empty note")),
    (f"input,label\n{SECRET}, x,CT\n".encode(), ("row 1 (line 2)", "3 cells")),
    (f"input,label\n{SECRET} na\xefve,CT\n".encode("latin-1"), ("not UTF-8", "line 2")),
])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_bad_table_ends_with_one_line_and_leaves_an_earlier_run_alone(
        world: Path, tmp_path: Path, refused: Refused, content: bytes | None, says: str | tuple[str, ...],
        overwrite: bool) -> None:
    data = tmp_path / "notes.csv"
    if content is not None:
        data.write_bytes(content)
    if overwrite:
        shutil.copytree(world / "run", tmp_path / "run")
    refused(*train_words(world, tmp_path / "run", data=data, **({"overwrite": None} if overwrite else {})), says=says)


def test_an_unknown_label_in_the_validation_table_names_its_row(world: Path, tmp_path: Path, refused: Refused) -> None:
    data = write_csv(tmp_path / "val.csv", [*notes(2), (SECRET, "CT Heart")])
    refused(*train_words(world, tmp_path / "run", val=data), says=("val.csv row 3: its label does not occur", "train.csv"))


def test_a_bad_table_is_found_before_the_weights_are_read(world: Path, tmp_path: Path, refused: Refused,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    (base / "model.safetensors").unlink()
    (tmp_path / "notes.csv").write_text("x,label\na,b\n")
    out, data = tmp_path / "out", tmp_path / "notes.csv"
    refused(*train_words(world, out, model=base, data=data), says="no column 'input'")
    common = ["--model", base, "--adapter", world / "run", "--data", data]
    refused("predict", *common, "--out", tmp_path / "out.csv", says="no column 'input'")
    refused("evaluate", *common, "--out", out, says="no column 'input'")


@pytest.mark.parametrize(("content", "says"), [
    (None, "no such file"), (b"", "is empty"), (b"CT\n\nMR\n", "line 2 is empty"),
    (b"CT\nMR\nCT\n", "line 3 is a duplicate of line 1"), (b"CT\nct\n", "differ only by case"), (b"C\xff\n", "not UTF-8"),
])
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_bad_label_file_ends_with_one_line(world: Path, tmp_path: Path, refused: Refused, content: bytes | None,
                                             says: str, command: str) -> None:
    if content is not None:
        (tmp_path / "labels.txt").write_bytes(content)
    refused(command, "--model", world / "base", "--adapter", world / "run", "--data", world / "train.csv", "--quiet",
            "--labels", tmp_path / "labels.txt", "--out", tmp_path / "out.csv", says=says)


# Bad models and adapters


def cut(base: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[: len(content) // 2])


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")       # of the second layer, of all else


def write_shards(base: Path, listed: tuple[str, ...] = SHARDS) -> None:
    """Two shards; the index names the tensors of those `listed`."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = {key: SHARDS["layers.1" not in key] for key in tensors}
    for shard in SHARDS:
        save_file({key: tensor for key, tensor in tensors.items() if names[key] == shard}, base / shard)
    (base / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {key: name for key, name in names.items() if name in listed}}))


def lose_a_shard(base: Path) -> None:
    write_shards(base)
    (base / SHARDS[1]).unlink()


def drop_from_the_index(base: Path) -> None:
    write_shards(base, SHARDS[1:])


def edit_config(base: Path, **changes: Any) -> None:
    raw = {**json.loads((base / "config.json").read_text()), **changes}
    (base / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


BROKEN_MODELS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "cut short": (cut, ("model.safetensors",)),
    "a shard missing": (lose_a_shard, (SHARDS[1], "index.json")),
    "a shard missing from the index": (drop_from_the_index, ("model.layers.1", "index.json")),
    "no weights": (lambda base: (base / "model.safetensors").unlink(), ("base",)),
    "no tokenizer": (lambda base: (base / "tokenizer.json").unlink(), ("tokenizer",)),
    "config without hidden_size": (lambda base: edit_config(base, hidden_size=None), ("config.json", "hidden_size")),
    "config without vocab_size": (lambda base: edit_config(base, vocab_size=None), ("config.json", "vocab_size")),
    "config not JSON": (lambda base: (base / "config.json").write_text("{"), ("config.json",)),
    "no config": (lambda base: (base / "config.json").unlink(), ("config.json",)),
    "another shape": (lambda base: edit_config(base, intermediate_size=256), ("gate_proj", "(128, 64)", "(256, 64)")),
}


@pytest.mark.parametrize("case", BROKEN_MODELS)
@pytest.mark.parametrize("command", ["train", "quantize", "predict", "merge"])
def test_a_broken_model_ends_with_one_line(world: Path, tmp_path: Path, refused: Refused, case: str, command: str) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    damage, says = BROKEN_MODELS[case]
    damage(base)
    out, adapted = tmp_path / "out", ["--model", base, "--adapter", world / "run", "--quiet"]
    words = {"train": train_words(world, out, model=base), "quantize": ["quantize", base, out, "--quiet"],
             "predict": ["predict", *adapted, "--note", SECRET], "merge": ["merge", *adapted, "--out", out]}[command]
    refused(*words, says=says)


@pytest.mark.parametrize("name", ["nobody/nothing", "no-such-model", "./nowhere", "a b c"])
def test_an_unknown_model_ends_with_one_line(world: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    refused(*train_words(world, tmp_path / "run", model=name), says=name)
    refused("quantize", name, tmp_path / "out", says=name)


@pytest.mark.parametrize("command", ["predict", "evaluate", "merge"])
def test_an_adapter_of_another_models_shape_ends_with_one_line(world: Path, tmp_path: Path, refused: Refused,
                                                               command: str) -> None:
    other = write_model(tmp_path / "other", hidden_size=32)
    out = tmp_path / "out"
    more: dict[str, list[Any]] = {"predict": ["--note", SECRET], "merge": ["--out", out],
                                  "evaluate": ["--data", world / "train.csv", "--out", out]}
    refused(command, "--model", other, "--adapter", world / "run", "--quiet", *more[command],
            says=("adapter_model.safetensors", "another model"))


@pytest.mark.parametrize("words", [
    ["train", "--model", "tiny", "--data", "train.csv", "--out", "PATH"],
    ["train", "--model", "tiny", "--data", "PATH.csv", "--out", "new"],
    ["train", "--model", "tiny", "--data", "train.csv", "--out", "new", "--template", "PATH"],
    ["train", "--model", "PATH", "--data", "train.csv", "--out", "new"], ["data", "check", "PATH.csv"],
    ["predict", "--model", "tiny", "--labels", "PATH", "--note", SECRET], ["predict", "--model", "tiny", "--adapter", "PATH",
                                                                          "--note", SECRET],
    ["evaluate", "--model", "tiny", "--adapter", "PATH", "--data", "train.csv", "--out", "new"],
    ["merge", "--model", "tiny", "--adapter", "PATH", "--out", "new"], ["quantize", "PATH", "new"], ["report", "PATH"],
    ["memory", "--model", "PATH"], ["compare", "PATH", "PATH"], ["show", "--model", "tiny", "--data", "PATH.csv"],
    ["audit", "--json", "PATH"],
])
def test_a_path_that_the_system_will_not_look_at_ends_with_one_line(
        tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    # As in a folder that one may not search; but that the superuser may, and a name too long nobody.
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "train.csv", notes(8))
    path = str(tmp_path / ("x" * 300))
    refused(*(word.replace("PATH", path) for word in words), says=("x" * 300,))


# Bad configurations, templates, outputs


@pytest.mark.parametrize(("content", "says"), [
    (None, "cannot read the configuration"), (b"r = ", "is not TOML"), (b"\xff", "is not TOML"),
    (b"rank = 8\n", "unknown setting 'rank'"), (b"quantize = \"int8\"\n", "quantize must be nf4 or none"),
    (b"r = \"8\"\n", "r must be int"), (b"r = 1.5\n", "r must be int"),
    (b"target_modules = \"q_proj\"\n", "target_modules must be a list"), (b"[r]\nx = 1\n", "r must be int"),
    (b"r = 99999999999999999999999\n", "r must be at most 65,536"),
    (b"alpha = 1" + b"0" * 400, "alpha must be a finite number"),
    (b"eval_every = 5\n", "nothing to validate on"), (b"seed = 1" + b"0" * 5000, "is not TOML"),
    (b"target_modules = " + b"[" * 20_000 + b"]" * 20_000, "nested too deep"),
    (b'template = "note\\u0000"\n', "template holds '\\x00'"),
])
def test_a_bad_configuration_ends_with_one_line(world: Path, tmp_path: Path, refused: Refused, content: bytes | None,
                                                says: str) -> None:
    config = tmp_path / "run.toml"
    if content is not None:
        config.write_bytes(content)
    refused("train", "--config", config, "--model", world / "base", "--data", world / "train.csv", "--out", tmp_path / "run",
            says=says)


@pytest.mark.parametrize("flag", ["out", "data", "val", "model", "template", "input-column"])
def test_a_name_that_is_not_utf_8_ends_with_one_line_as_no_config_could_hold_it(world: Path, tmp_path: Path, refused: Refused,
                                                                               flag: str) -> None:
    refused(*train_words(world, tmp_path / "run"), f"--{flag}", f"{tmp_path}/caf\udce9",
            says=(f"{flag.replace('-', '_')} holds", "UTF-8"))


@pytest.mark.parametrize(("text", "says"), [("Note:", "{input} 0 times"), ("{input} {input}", "{input} 2 times"),
                                            ("<s>{input}", "'<s>'"), ("x" * 300 + "{input}", "max_length")])
def test_a_bad_template_ends_with_one_line(world: Path, tmp_path: Path, refused: Refused, text: str, says: str) -> None:
    template = tmp_path / "template.txt"
    template.write_text(text)
    refused(*train_words(world, tmp_path / "run", template=template), says=says)
    refused("predict", "--model", world / "base", "--adapter", world / "run", "--note", "a", "--template", template, says=says)


@pytest.fixture
def writers(world: Path) -> Writers:
    """Every command that writes, with its output."""
    adapted = ["--model", world / "base", "--adapter", world / "run", "--quiet"]

    def commands(out: Path) -> Iterator[list[Any]]:
        yield train_words(world, out)
        yield ["quantize", world / "base", out, "--quiet"]
        yield ["evaluate", *adapted, "--data", world / "val.csv", "--out", out]
        yield ["predict", *adapted, "--data", world / "val.csv", "--out", out]
        yield ["merge", *adapted, "--out", out]
        yield ["data", out, "--quiet"]
    return commands


def test_an_output_in_use_ends_with_one_line(tmp_path: Path, refused: Refused,
                                             writers: Writers) -> None:
    (tmp_path / "used.csv").mkdir()
    (tmp_path / "used.csv" / "thesis.txt").write_text("mine")
    for words in writers(tmp_path / "used.csv"):
        refused(*words, says="used.csv exists already")


def test_a_folder_of_another_kind_is_not_overwritten(tmp_path: Path, refused: Refused,
                                                     writers: Writers) -> None:
    (tmp_path / "used.csv").mkdir()
    (tmp_path / "used.csv" / "thesis.txt").write_text("mine")
    for words in writers(tmp_path / "used.csv"):
        if words[0] != "data":
            refused(*words, "--overwrite", says="used.csv")


def test_an_output_below_a_file_ends_with_one_line(tmp_path: Path, refused: Refused,
                                                   writers: Writers) -> None:
    (tmp_path / "file").write_text("mine")
    for words in writers(tmp_path / "file" / "deep" / "out.csv"):
        refused(*words, says="is a file, not a folder")


def test_a_loss_that_is_not_finite_ends_with_one_line(world: Path, tmp_path: Path, call: Call,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    stepping = importlib.import_module("minilora.stepping")
    label_loss = stepping.label_loss
    monkeypatch.setattr(stepping, "label_loss", lambda model, batch: label_loss(model, batch) * float("nan"))
    code, out, err = call(*train_words(world, tmp_path / "run"))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("minilora: step 1: loss nan") and "rows [" in err and SECRET not in err


# Tables of all kinds


def write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    columns = ("id", "Note text", "Protocol, final")
    records = [dict(zip(columns, (str(index), *row), strict=True)) for index, row in enumerate(rows)]
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), path)


@pytest.mark.parametrize(("suffix", "to"), [(".csv", ".csv"), (".csv", ".jsonl"), (".jsonl", ".parquet"), (".parquet", ".csv")])
def test_a_table_of_ones_own_trains_and_comes_back_with_predictions(world: Path, tmp_path: Path, call: Call, suffix: str,
                                                                    to: str) -> None:
    rows = HARD * 2
    data, test, out = tmp_path / f"train{suffix}", tmp_path / f"test{suffix}", tmp_path / f"out{to}"
    write_table(data, [row for row in rows if row[0]])
    write_table(test, rows)
    columns = ["--input-column", "Note text"]
    words = train_words(world, tmp_path / "run", data=data, input_column="Note text", label_column="Protocol, final")
    assert succeeded(call(*words)) == ""
    assert succeeded(call("predict", "--model", world / "base", "--adapter", tmp_path / "run", "--data", test, "--out", out,
                          "--quiet", *columns)) == ""
    assert mode(out) == 0o600
    table = read_table(out, "Note text")
    assert table.columns == ["id", "Note text", "Protocol, final", "prediction", "probability", "error", "runner_up",
                             "runner_up_probability"]
    assert [(row.values["Note text"], row.values["Protocol, final"]) for row in table.rows] == rows
    assert [row.values["id"] for row in table.rows] == [str(index) for index in range(len(rows))]
    for row in table.rows:
        if row.text:
            assert row.values["prediction"] in {label for _, label in HARD if label} and row.values["error"] == ""
            assert 0 < float(row.values["probability"]) <= 1 + 1e-6
        else:
            assert [row.values[name] for name in table.columns[3:]] == ["", "", "empty note", "", ""]


@pytest.mark.parametrize("count", [9, 200])
def test_any_number_of_labels_is_learnt_and_answered(world: Path, tmp_path: Path, call: Call, count: int) -> None:
    labels = [f"Protocol {index:03d} ({'left' if index % 2 else 'right'}, {index * 7 % 13} mm)" for index in range(count)]
    data = write_csv(tmp_path / "train.csv", notes(2 * count, labels))
    succeeded(call(*train_words(world, tmp_path / "run", data=data)))
    assert (tmp_path / "run" / "labels.txt").read_text().splitlines() == labels
    test = write_csv(tmp_path / "test.csv", notes(6, labels))
    succeeded(call("evaluate", "--model", world / "base", "--adapter", tmp_path / "run", "--data", test, "--quiet",
                   "--out", tmp_path / "scores"))
    assert {row["prediction"] for row in rows_of(tmp_path / "scores" / "predictions.csv")} <= set(labels)


def test_thirty_thousand_rows_and_two_hundred_labels_are_read_for_two_steps(world: Path, tmp_path: Path, call: Call) -> None:
    labels = [f"Protocol {index}" for index in range(200)]
    data = write_csv(tmp_path / "train.csv", [(f"note {index}", labels[index % 200]) for index in range(30_000)])
    succeeded(call(*train_words(world, tmp_path / "run", data=data, max_length=48)))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "run" / "labels.txt").read_text().splitlines()) == 200
    assert "30,000 notes, 200 labels" in (tmp_path / "run" / "README.md").read_text()


# The commands


def test_training_by_flags_and_by_configuration_are_one(world: Path, tmp_path: Path, call: Call) -> None:
    succeeded(call(*train_words(world, tmp_path / "a", seed=5, no_double_quant=None, target_modules="v_proj")))
    written = tmp_path / "a" / "config.toml"
    succeeded(call("train", "--config", written, "--out", tmp_path / "b", "--quiet"))
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert first == second, "the adapters differ"
    assert TrainConfig.from_toml(written).double_quant is False
    succeeded(call("train", "--config", written, "--out", tmp_path / "c", "--seed", "6", "--quiet"))
    assert TrainConfig.from_toml(tmp_path / "c" / "config.toml").seed == 6, "flags win over the file"


def test_training_says_what_it_did_and_what_comes_next(world: Path, tmp_path: Path, call: Call) -> None:
    words = train_words(world, tmp_path / "run", val=world / "val.csv")
    words.remove("--quiet")
    code, out, err = call(*words)
    assert code == 0 and SECRET not in out + err
    assert out.startswith("2 steps in ") and "validation" in out and f"--adapter {tmp_path / 'run'}" in out
    assert "100%" in err and "step/s" in err.replace("s/step", "step/s"), "progress with a rate"


def test_a_fully_tuned_run_is_used_as_a_model(world: Path, tmp_path: Path, call: Call) -> None:
    words = train_words(world, tmp_path / "run", tune="full", quantize="none")
    words.remove("--quiet")
    assert f"next: minilora predict --model {tmp_path / 'run'} --note" in succeeded(call(*words))
    assert succeeded(call("predict", "--model", tmp_path / "run", "--note", "fall")).splitlines()[0] in LABELS
    succeeded(call("quantize", tmp_path / "run", tmp_path / "small", "--quiet"))
    predictor = Predictor.load(str(tmp_path / "small"))
    assert predictor.labels == LABELS and any(isinstance(module, NF4Linear) for module in predictor.model.modules())


@pytest.mark.parametrize("label", ["C-Spine(Bone)", "MR Knee, left", "(none)", "CT, Abdomen (W/O), \"late\""])
def test_a_note_is_answered_with_the_label_alone_on_the_first_line(world: Path, tmp_path: Path, call: Call, label: str) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text(label + "\n")
    words = ["predict", "--model", world / "base", "--adapter", world / "run", "--labels", labels, "--note", SECRET]
    code, out, err = call(*words)
    assert (code, err) == (0, "") and SECRET not in out
    assert out.splitlines() == [label, "probability 1.000"]
    assert succeeded(call(*words, "--quiet")) == label + "\n"


def test_evaluate_writes_scores_and_predictions(world: Path, tmp_path: Path, call: Call) -> None:
    out = succeeded(call("evaluate", "--model", world / "base", "--adapter", world / "run", "--data", world / "val.csv",
                         "--out", tmp_path / "scores"))
    assert "exact match" in out and SECRET not in out
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert scores["n"] == 8 and set(scores["intervals"]) == {"exact_match", "macro_f1", "cosine"}
    for name in ("exact_match", "macro_f1", "cosine"):
        low, high = scores["intervals"][name]
        assert 0 <= low <= scores[name] <= high <= 1
    rows = rows_of(tmp_path / "scores" / "predictions.csv")
    assert list(rows[0]) == ["input", "label", "prediction", "probability", "runner_up", "runner_up_probability"]
    assert [(row["input"], row["label"]) for row in rows] == notes(8)
    assert mode(tmp_path / "scores" / "predictions.csv") == 0o600
    card = (world / "run" / "README.md").read_text()
    assert f"| 8 | chosen among labels | {scores['exact_match']:.3f} [" in card and SECRET not in card


@torch.no_grad()
def test_a_quantized_folder_loads_again_with_the_same_logits(world: Path, tmp_path: Path, call: Call) -> None:
    out = succeeded(call("quantize", world / "base", tmp_path / "small", "--quiet"))
    assert "14 linears" in out and "bits each" in out
    expected, found = load_model(world / "base"), load_model(tmp_path / "small")
    assert any(isinstance(module, NF4Linear) for module in found.modules())
    assert torch.equal(found(IDS), expected(IDS))
    assert load_tokenizer(tmp_path / "small").encode("fall") == load_tokenizer(world / "base").encode("fall")
    succeeded(call("quantize", world / "base", tmp_path / "plain", "--no-double-quant", "--blocksize", "32",
                   "--dtype", "float32"))
    assert torch.equal(load_model(tmp_path / "plain", dtype=torch.float32)(IDS),
                       load_model(world / "base", double_quant=False, blocksize=32, dtype=torch.float32)(IDS))


@pytest.mark.parametrize("into", ["16bit", "4bit", "original"])
@torch.no_grad()
def test_a_merged_model_loads_again_and_its_error_is_told(world: Path, tmp_path: Path, call: Call, into: str) -> None:
    out = succeeded(call("merge", "--model", world / "base", "--adapter", world / "run", "--into", into, "--quiet",
                         "--out", tmp_path / "merged"))
    assert f"14 layers merged into {into}; error " in out and "% of the trained weights" in out
    assert "cosine with what was learnt" in out
    told = float(out.split("; error ")[1].split("%")[0]) / 100
    assert (told < 0.005) is (into == "16bit"), "16-bit rounding alone, or the error of quantization"
    predictor = Predictor.load(str(tmp_path / "merged"), dtype="float32")
    assert any(isinstance(module, NF4Linear) for module in predictor.model.modules()) is (into == "4bit")
    assert predictor.labels == LABELS and predictor.template.text == "[INST] {input} [/INST]" and predictor.max_length == 128
    trained = load_model(world / "base", adapter=world / "run", dtype=torch.float32)(IDS)
    distance = float((predictor.model(IDS) - trained).norm() / trained.norm())
    assert distance < (0.03 if into == "16bit" else 0.6)
    assert predictor.predict(["fall"])[0].label in LABELS


@torch.no_grad()
def test_merging_into_a_float32_original_rounds_once(world: Path, tmp_path: Path, call: Call) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    edit_config(base, torch_dtype="float32")
    succeeded(call("merge", "--model", base, "--adapter", world / "run", "--into", "original", "--quiet",
                   "--out", tmp_path / "merged"))
    merged, rounded_twice = load_file(tmp_path / "merged" / "model.safetensors"), 0
    with pytest.warns(UserWarning, match="was trained on a base"):
        adapted = load_model(base, quantize=None, adapter=world / "run", dtype=torch.float32)
    for name, layer in lora_layers(adapted):
        weight = layer.base_layer.weight
        assert torch.equal(merged[f"{name}.weight"], layer.merged_weight().bfloat16()), name
        rounded_twice += not torch.equal(merged[f"{name}.weight"], layer.merged_weight(weight.bfloat16()).bfloat16())
    assert rounded_twice > 0, "the test would not see an early rounding"
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_a_merge_keeps_the_bases_sixteen_bit_type(world: Path, tmp_path: Path, call: Call) -> None:
    for dtype, expected in (("float16", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.bfloat16)):
        base = shutil.copytree(world / "base", tmp_path / f"base-{dtype}")
        edit_config(base, torch_dtype=dtype)
        succeeded(call("merge", "--model", base, "--adapter", world / "run", "--out", tmp_path / dtype, "--quiet"))
        assert {tensor.dtype for tensor in load_file(tmp_path / dtype / "model.safetensors").values()} == {expected}


def test_merges_that_make_no_sense_are_refused(world: Path, tmp_path: Path, call: Call, refused: Refused) -> None:
    succeeded(call(*train_words(world, tmp_path / "dense", quantize="none")))
    succeeded(call("quantize", world / "base", tmp_path / "small", "--quiet"))
    refused("merge", "--model", world / "base", "--adapter", tmp_path / "dense", "--into", "4bit", "--out", tmp_path / "out",
            says=("unquantized base", "--into 16bit"))
    refused("merge", "--model", tmp_path / "small", "--adapter", world / "run", "--into", "original", "--out", tmp_path / "out",
            says="name the 16-bit model")


def test_outputs_of_the_same_kind_are_overwritten_when_asked(world: Path, tmp_path: Path, call: Call) -> None:
    words = ["quantize", world / "base", tmp_path / "small", "--quiet"]
    succeeded(call(*words))
    shard = tmp_path / "small" / "model-00002-of-00009.safetensors"
    shard.write_text("gone after this")
    succeeded(call(*words, "--overwrite"))
    assert not shard.exists() and [path.name for path in tmp_path.iterdir()] == ["small"]


# Privacy


def test_no_note_comes_out_but_in_predictions(world: Path, tmp_path: Path, call: Call) -> None:
    run, adapted = tmp_path / "run", ["--model", world / "base", "--adapter", tmp_path / "run"]
    words = train_words(world, run, val=world / "val.csv")
    words.remove("--quiet")
    said = []
    for line in ([*words], ["evaluate", *adapted, "--data", world / "val.csv", "--out", tmp_path / "scores"],
                 ["predict", *adapted, "--data", world / "val.csv", "--out", tmp_path / "predictions.csv"],
                 ["predict", *adapted, "--note", f"{SECRET} fell"], ["merge", *adapted, "--out", tmp_path / "merged"]):
        code, out, err = call(*line)
        assert code == 0, err
        said.append(out + err)
    assert SECRET not in "".join(said)
    holding = [path.name for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding == ["predictions.csv"] * 2
    assert all(mode(path) == 0o600 for path in tmp_path.rglob("predictions.csv"))
