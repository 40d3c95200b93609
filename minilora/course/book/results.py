"""What each cell of a lesson prints, found by running it."""
from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile

from minilora.course.lesson import Lesson, run_lesson
from minilora.course.pictures import FOLDER

SAVED = re.compile(r"^\[picture: .*\]\n", re.MULTILINE)     # says where this run's copy of the picture lies


def results(lesson: Lesson) -> list[str]:
    """Run a lesson; its pictures go to a folder that is removed, since the committed ones are shown.

    Returns: for each cell what it printed, nothing for prose.
    Raises: whatever the lesson raises.
    """
    out = io.StringIO()
    ends: list[int] = []
    before = os.environ.get(FOLDER)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
        os.environ[FOLDER] = folder
        try:
            # Called before each cell: what stands between two calls is what the first one's cell printed.
            run_lesson(lesson, show=lambda _: ends.append(len(out.getvalue())))
        finally:
            os.environ.pop(FOLDER) if before is None else os.environ.__setitem__(FOLDER, before)
    text = out.getvalue()
    return [SAVED.sub("", text[start:end]) for start, end in zip(ends, [*ends[1:], len(text)], strict=True)]
