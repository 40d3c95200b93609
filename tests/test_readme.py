"""The README is checked like code: its commands parse, its files exist, its Python runs and prints what it says."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from minilora import audit
from minilora.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def _commands() -> list[str]:
    plain = "\n".join(block for language, block in BLOCKS if not language).replace("\\\n", " ")
    return [line.strip() for line in plain.splitlines() if line.strip().startswith("minilora ")]


def test_every_command_it_shows_is_one_that_the_parser_takes() -> None:
    commands = _commands()
    assert len(commands) >= 5
    for command in commands:
        args, unknown = build_parser().parse_known_args(shlex.split(command, comments=True)[1:])
        assert not unknown and callable(args.run), command


def test_every_file_it_names_exists() -> None:
    named = set(re.findall(r"`((?:minilora|tests|scripts|lessons)/[\w./-]+)`", TEXT))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", TEXT))
    named |= {line.split()[0] for language, block in BLOCKS if not language for line in block.splitlines()
              if line.startswith("scripts/")}
    assert len(named) >= 15
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_its_python_runs_and_gives_the_figures_of_its_comments(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    bits, size = capsys.readouterr().out.splitlines()[0].split()
    assert f"{float(bits):.3f} bits a weight: {int(size):,} bytes instead of {4096 * 4096 * 4:,}" in code
    assert names["logits"].shape[-1] == names["model"].config.vocab_size  # type: ignore[attr-defined]


def test_the_core_to_read_in_an_afternoon_is_as_long_as_it_says() -> None:
    told = re.search(r"^The afternoon is for the core, some ([\d,]+) lines:(.*?)\n\n", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert told is not None
    named = [ROOT / name for name in re.findall(r"`(minilora/[\w./]+)`", told[2])]
    files = [file for path in named for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])]
    lines, said = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files), int(told[1].replace(",", ""))
    assert len(named) == 6 and 0.9 * said < lines < 1.1 * said, f"{lines:,} lines"


def test_what_merging_into_4_bits_keeps_is_what_the_audit_measures() -> None:
    measured = [f"{float(claim.measured):.2f}" for claim in audit.merging() if "merging into 4 bits" in claim.claim]
    told = "keeps a cosine of {}, {} and {};".format(*measured)
    assert told in " ".join(TEXT.split()), told


def test_no_placeholder_is_left_in_it() -> None:
    assert "@@" not in TEXT
