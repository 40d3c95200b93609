"""The notes of a made-up language: repeatable, no note twice, labels as unequal as said, and codes in the place of labels."""
from __future__ import annotations

from collections import Counter
from pathlib import Path

from minilora import load_tokenizer
from minilora.llama.new_tokens import FOREIGN, tokens_a_word
from tests.notes import write_csv
from tests.scripts import load_script

script = load_script("foreign_notes")


def test_notes_are_repeatable_different_unequal_and_foreign_to_the_small_model() -> None:
    rows = script.write_notes(900, 12, seed=3)
    assert rows == script.write_notes(900, 12, seed=3) != script.write_notes(900, 12, seed=4)
    assert len({note for note, _ in rows}) == 900
    found, share = Counter(label for _, label in rows), script.shares(12)
    assert len(found) == 12 and abs(found.most_common(1)[0][1] / 900 - share[0]) < 0.05 and share[0] > 4 * share[-1]
    assert tokens_a_word(load_tokenizer("tiny"), (note for note, _ in rows)) > FOREIGN


def test_a_table_under_codes_keeps_which_notes_go_together(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [(f"{label} {n}", label) for label in ("a", "b", "c") for n in range(60)],
                      ("note", "label"))
    rows = script.under_codes(table, 1000, 2, seed=0)
    codes = {note[0]: {code for other, code in rows if other[0] == note[0]} for note, _ in rows}
    assert len(codes) == 2 and all(len(found) == 1 for found in codes.values())
    counts = sorted(Counter(label for _, label in rows).values())
    assert 59 <= counts[1] <= 60 and abs(counts[0] / counts[1] - 2 ** -0.7) < 0.02
