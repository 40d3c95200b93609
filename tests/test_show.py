"""A row as training sees it, for the eye."""
from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.cli import main
from minilora.data.prompts import load_template
from minilora.errors import DataError
from minilora.loading import load_tokenizer
from minilora.show import render, show_row, token_texts

NOTE = "CT for liver laceration, r/o bleed"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "notes.csv"
    path.write_text(f"input,label\n\"{NOTE}\",CT Abdomen W Contrast\n\"two\nlines, 3 × 4 mm\",US Pelvis\n", encoding="utf-8")
    return path


def test_tokens_are_the_text_and_the_label_with_its_end_carries_loss(table: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    shown = show_row(tokenizer, load_template("tiny"), table, 1)
    assert "".join(shown.tokens[1:-1]).replace(" ", "") == f"Note: {NOTE}\nIn short:CT Abdomen W Contrast".replace(" ", "")
    loss = [token for token, wanted in zip(shown.tokens, shown.carries_loss, strict=True) if wanted]
    assert "".join(loss[:-1]).strip() == "CT Abdomen W Contrast" and loss[-1] == tokenizer.token(tokenizer.eos_id)
    assert shown.tokens[0] == tokenizer.token(tokenizer.bos_id) and not shown.cut
    plain = render(shown, colour=False)
    assert plain.count("|") == shown.carries_loss.count(False) and plain.count("[") == len(loss) and "⏎" in plain
    assert plain.endswith(f"row 1: {len(shown.tokens)} tokens, {len(shown.tokens) - len(loss)} of the prompt (template tiny), "
                          f"{len(loss)} carry loss")


def test_a_character_of_several_tokens_is_told_by_the_tokenizers_names() -> None:
    tokenizer = load_tokenizer("tiny")
    ids = tokenizer.encode("3 𝄞 x")
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and all(texts) and not any("\ufffd" in text for text in texts)


def test_a_long_note_says_that_it_was_shortened_as_in_training(table: Path) -> None:
    shown = show_row(load_tokenizer("tiny"), load_template("inst"), table, 1, max_length=24)
    assert shown.cut and len(shown.tokens) <= 24 and str(shown).endswith("the note was shortened")


def test_a_row_that_is_not_there_is_refused_without_its_neighbours_text(table: Path) -> None:
    with pytest.raises(DataError, match=r"no row 7: its rows are 1 to 2") as refused:
        show_row(load_tokenizer("tiny"), load_template("tiny"), table, 7)
    assert "liver" not in str(refused.value)


def test_the_command_prints_plain_text_into_a_pipe(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--model", "tiny", "--data", str(table), "--row", "2", "--template", "inst"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "INST" in printed.replace("|", "") and "row 2:" in printed


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_colours_unless_they_are_not_wanted(table: Path, no_color: bool) -> None:
    reader, writer = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    subprocess.run([sys.executable, "-m", "minilora", "show", "--model", "tiny", "--data", str(table)], stdout=writer,
                   check=True, env=environment | ({"NO_COLOR": "1"} if no_color else {}))
    os.close(writer)
    printed = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert ("\x1b[48;5;" in printed) == (not no_color)
    if not no_color:
        bare = re.sub(r"\x1b\[[0-9;]*m", "", printed)
        assert NOTE.split()[-1] in bare and printed.count("\x1b[0m") >= printed.count("⏎")
