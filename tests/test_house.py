"""The house keeps its order: who may import whom, what is documented and typed, how long a file may be.

Each rule is a function from source text to the violations in it, so that it can be shown to find one.
"""
from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "minilora"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = ("kernels", "quant", "layers", "llama", "optim", "data")     # each imports from those before it
FOUNDATION = ("errors", "files")                                      # modules that any room but kernels may use
PEERS = ("bitsandbytes", "peft", "transformers", "sentencepiece", "accelerate", "sentence_transformers")
LONGEST = 330
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def module_name(path: Path) -> str:
    """minilora/llama/model.py -> minilora.llama.model; a package's __init__.py is the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, package: str) -> Iterator[str]:
    """Every module that the source imports, wherever the statement stands; `package` resolves relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)         # the name may be a module itself
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value)


def room(name: str) -> str:
    """minilora.llama.model -> llama, minilora.train -> train, torch.nn -> "" (not ours)."""
    first, _, rest = name.partition(".")
    return (rest.partition(".")[0] or "minilora") if first == "minilora" else ""


def order_violations(source: str, name: str) -> list[str]:
    """Imports of module `name` that the order of rooms forbids."""
    found = []
    here = room(name)
    package = name if (PACKAGE.parent / Path(*name.split("."))).is_dir() else name.rpartition(".")[0]
    for target in imported(source, package):
        there = room(target)
        if target.partition(".")[0] in PEERS:
            found.append(f"{name} imports the peer library {target}")
        if not there:
            continue
        if there == "cli" and name != "minilora.__main__":
            found.append(f"{name} imports cli")
        elif there == "integrations" and here not in ("cli", "store_commands", "integrations"):
            found.append(f"{name} imports {target}, which only cli may")
        elif here == "testing" and there != "testing":
            found.append(f"{name} imports {target}; it must stand alone")
        elif here == "kernels" and there != "kernels":
            found.append(f"{name} imports {target}; kernels import nothing of the package")
        elif here in FOUNDATION and there not in FOUNDATION:
            found.append(f"{name} imports {target}; it lies below all rooms")
        elif here in ROOMS and there != here and there not in FOUNDATION and there not in ROOMS[: ROOMS.index(here)]:
            found.append(f"{name} imports {target}, which is no room before {here}")
    return found


def documentation_violations(source: str) -> list[str]:
    """Public classes, functions and methods without docstring or with a parameter or result without type."""
    found = []

    def visit(parent: ast.Module | ast.ClassDef, where: str) -> None:
        if ast.get_docstring(parent) is None:
            found.append(f"{where} has no docstring")
        for node in parent.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node, node.name)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                check(node, node.name if isinstance(parent, ast.Module) else f"{where}.{node.name}",
                      method=isinstance(parent, ast.ClassDef))

    def check(node: ast.FunctionDef | ast.AsyncFunctionDef, where: str, method: bool) -> None:
        overload = any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)
        if not node.name.startswith("_") and not overload and ast.get_docstring(node) is None:
            found.append(f"{where} has no docstring")
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
        rest = [argument for argument in (node.args.vararg, node.args.kwarg) if argument is not None]
        for argument in (every[1:] if method and not static else every) + rest:
            if argument.annotation is None:
                found.append(f"{where}: parameter {argument.arg} has no type")
        if node.returns is None:
            found.append(f"{where} has no result type")

    visit(ast.parse(source), "the module")
    return found


@EACH_FILE
def test_imports_follow_the_order_of_rooms(path: Path) -> None:
    assert order_violations(path.read_text(encoding="utf-8"), module_name(path)) == []


@EACH_FILE
def test_public_names_are_documented_and_typed(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert (documentation_violations(source) if source.strip() else []) == []


@EACH_FILE
def test_no_file_holds_two_ideas(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{lines} lines"


def test_every_room_of_the_rules_exists() -> None:
    assert [name for name in ROOMS if not (PACKAGE / name / "__init__.py").is_file()] == []
    assert [name for name in FOUNDATION if not (PACKAGE / f"{name}.py").is_file()] == []


@pytest.mark.parametrize(("name", "source", "words"), [
    ("minilora.kernels.gpu", "from minilora.quant.codebooks import NF4_CODE", "kernels import nothing"),
    ("minilora.kernels.gpu", "from minilora.errors import ConfigError", "kernels import nothing"),
    ("minilora.quant.nf4", "from minilora.layers import lora", "no room before quant"),
    ("minilora.quant.nf4", "from ..layers import lora", "minilora.layers.lora, which is no room"),
    ("minilora.llama.model", "def f():\n    from minilora.train import train", "no room before llama"),
    ("minilora.data.batches", "import minilora", "no room before data"),
    ("minilora.optim.paged", "import minilora.data.batches", "no room before optim"),
    ("minilora.errors", "from minilora.quant import nf4", "below all rooms"),
    ("minilora.demo", "from minilora import cli", "imports cli"),
    ("minilora.train", "from minilora.integrations.tracking import Tracker", "only cli may"),
    ("minilora.testing", "from minilora.quant import nf4", "stand alone"),
    ("minilora.layers.qlora", "import bitsandbytes as bnb", "peer library bitsandbytes"),
    ("minilora.bench", "import importlib\nimportlib.import_module('transformers.models')", "peer library transformers.models"),
])
def test_the_checker_finds_a_forbidden_import(name: str, source: str, words: str) -> None:
    assert any(words in found for found in order_violations(source, name))


@pytest.mark.parametrize(("name", "source"), [
    ("minilora.quant.nf4", "from minilora.kernels.reference import pack\nfrom . import codebooks\nimport torch.nn"),
    ("minilora.data.prompts", "from minilora.llama.tokenizer import Tokenizer\nfrom minilora.errors import DataError"),
    ("minilora.cli", "from minilora.integrations.spark import run\nfrom minilora.train import train"),
    ("minilora.__main__", "from minilora.cli import main"),
])
def test_the_checker_passes_what_is_allowed(name: str, source: str) -> None:
    assert order_violations(source, name) == []


def test_the_checker_finds_missing_docstrings_and_types() -> None:
    source = '"""A module."""\nclass A:\n    def f(self, x, *rest: int) -> None: ...\n\ndef g(y: int = 0): "What it does."\n'
    assert documentation_violations(source) == ["A has no docstring", "A.f has no docstring", "A.f: parameter x has no type",
                                                "g has no result type"]
