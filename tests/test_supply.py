"""constraints-core.txt covers what minilora needs, at the versions that are tested, and lets pip install nothing else."""
from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

from minilora.config import tomllib

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"^([\w.-]+)==(\S+)( ; [^\\\n]+)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)
CUDA = ("nvidia-", "cuda-", "triton")           # torch's CUDA build pins these itself


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return found[0].lower().replace("_", "-").replace(".", "-")


def entries() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version, _, hashes in ENTRY.findall((ROOT / "constraints-core.txt").read_text()):
        assert hashes.count("--hash=") >= 1
        found.setdefault(name_of(name), set()).add(version)
    return found


def needed(requirement: str, seen: set[str]) -> set[str]:
    """A package and all that it needs here, extras left out."""
    name = name_of(requirement)
    if name in seen or "extra ==" in requirement:
        return seen
    try:
        below = requires(name) or []
    except PackageNotFoundError:                # needed on another system, or by another Python
        return seen
    seen.add(name)
    for each in below:
        needed(each, seen)
    return seen


def test_every_line_is_a_comment_or_part_of_an_entry_with_hashes() -> None:
    text = (ROOT / "constraints-core.txt").read_text()
    rest = ENTRY.sub("", text)
    assert [line for line in rest.splitlines() if line and not line.startswith("#")] == []
    assert len(entries()) >= 40


def test_all_that_the_core_needs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core: set[str] = set()
    for requirement in project["dependencies"]:
        needed(requirement, core)
    assert {"torch", "numpy", "tokenizers", "jinja2"} <= core
    assert sorted(core - entries().keys()) == []


def test_its_versions_are_those_of_the_tests() -> None:
    pinned: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition(";")[0].strip().partition("==")
            pinned.setdefault(name_of(name), set()).add(version)
    both = {name for name in entries().keys() & pinned.keys() if not name.startswith(CUDA)}
    assert len(both) >= 20
    assert [name for name in sorted(both) if not pinned[name] <= entries()[name]] == []


@pytest.mark.parametrize("line", ["torch==2.13.0\n", "torch>=2 \\\n    --hash=sha256:" + "0" * 64 + "\n",
                                  "torch==2.13.0 \\\n    --hash=md5:" + "0" * 32 + "\n"])
def test_an_entry_without_version_or_hash_is_none(line: str) -> None:
    assert not ENTRY.match(line)
