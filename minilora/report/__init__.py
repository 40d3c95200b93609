"""A run as one page: how it went, how good it is, what it gets wrong, and how to make it again.

The page stands alone: one HTML file without scripts, fonts, pictures or links, that can be mailed, printed and archived with
the run.  It is a function of the run's files (and of when metrics.jsonl was last written): the same files give the same bytes.
"""
from __future__ import annotations

from pathlib import Path

from minilora.errors import OutputError
from minilora.files import check_output_file, write_text
from minilora.report.confusion import errors_section
from minilora.report.facts import facts_section, heading
from minilora.report.hardest import hardest_section
from minilora.report.held import others_section
from minilora.report.markup import Markup
from minilora.report.page import page
from minilora.report.pager import pager_section
from minilora.report.runfiles import read_run
from minilora.report.scorefiles import find_evaluation, read_evaluation
from minilora.report.scoring import calibration_section, labels_section, scores_section
from minilora.report.training import training_section

__all__ = ["write_report"]


def write_report(run: str | Path, out: str | Path | None = None, evaluation: str | Path | None = None, show_text: bool = False,
                 overwrite: bool = False) -> Path:
    """Write the report of a run folder, finished or not.

    Args:
        out: the page; default report.html in the run folder.
        evaluation: what `minilora evaluate` wrote; default the only one inside the run folder, or else the only one beside it,
            unless another run lies there that it could be of.
        show_text: show the hardest notes; the page is then readable by its owner alone.

    Returns: the page's path.
    Raises: MiniloraError: no run, an evaluation or file of it that is broken, or an output in use; nothing is written then.
    Guarantee: without `show_text` no text of a note, nor an answer that is no known label, is in the page (test_report.py).
    """
    folder = Path(run)
    path = Path(out) if out is not None else folder / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{path}: the report is an HTML page; give it a name that ends in .html")
    read = read_run(folder)
    check_output_file(path, overwrite)
    scores, hint = (Path(evaluation), "") if evaluation is not None else find_evaluation(folder)
    if show_text and scores is None:
        raise OutputError("--show-text shows notes of an evaluation, and there is none" + (f": {hint}" if hint else
                          "; name one with --evaluation"))
    found = read_evaluation(scores, read, show_text) if scores is not None else None
    sections: list[Markup | None] = [heading(read, found, hint)]
    if found is not None:
        sections += [scores_section(found, read), others_section(found.held), calibration_section(found),
                     errors_section(found), labels_section(found), hardest_section(found)]
    sections += [training_section(read), pager_section(read), facts_section(read)]
    write_text(path, page(f"{folder.resolve().name}: minilora report", sections), mode=0o600 if show_text else 0o644)
    return path
