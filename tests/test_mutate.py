"""The mutation script stays able to run: its lines stand in the package, its tests exist, and it tells a survivor."""
from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    return load_script("mutate")


def test_every_line_to_be_broken_stands_once_and_its_tests_exist(mutate: ModuleType) -> None:
    assert len(mutate.MUTATIONS) >= 25 and len({mutation.name for mutation in mutate.MUTATIONS}) == len(mutate.MUTATIONS)
    for mutation in mutate.MUTATIONS:
        source = (ROOT / "minilora" / mutation.file).read_text(encoding="utf-8")
        assert source.count(mutation.before) == 1, mutation.name
        if mutation.file.endswith(".py"):
            compile(source.replace(mutation.before, mutation.after), mutation.file, "exec")
        assert all((ROOT / path).exists() for path in mutation.tests.split()), mutation.name


def test_a_mistake_is_caught_and_a_harmless_change_survives(mutate: ModuleType, tmp_path: Path) -> None:
    for part in ("minilora", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tests = "tests/quant/test_codebooks.py"
    wrong = mutate.Mutation("a level", "quant/codebooks.py", "0.07958029955625534", "0.0760", tests)
    harmless = mutate.Mutation("a comment", "quant/codebooks.py", "# the index of the exact zero", "# zero", tests)
    before = (tmp_path / "minilora" / "quant" / "codebooks.py").read_text()
    caught, first = mutate.run(wrong, tmp_path)
    assert caught and first.startswith(tests)
    assert mutate.run(harmless, tmp_path) == (False, "")
    assert (tmp_path / "minilora" / "quant" / "codebooks.py").read_text() == before
