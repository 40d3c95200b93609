"""The lessons in their two other forms: Jupyter notebooks, and a static book with what each cell prints.

    python scripts/build_lessons.py [--out build/lessons] [--unrun]

The lessons are run for it, which takes a few minutes on two cores; --unrun leaves out what they print.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from minilora.course.lesson import Lesson, lesson_paths
from minilora.errors import MiniloraError


def main(arguments: Sequence[str] | None = None) -> int:
    """Build; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/lessons"), help="folder to write into (default %(default)s)")
    parser.add_argument("--unrun", action="store_true", help="do not run the lessons: a book without what they print")
    args = parser.parse_args(arguments)
    try:
        # Here, since without the extra [book] the import itself says what to install.
        from minilora.course.book.build import build
        from minilora.course.book.results import results

        with tqdm(total=len(lesson_paths()), unit="lesson", disable=args.unrun) as progress:
            def run(lesson: Lesson) -> list[str]:
                progress.set_description(lesson.path.stem)
                found = results(lesson)
                progress.update()
                return found

            files = build(args.out, None if args.unrun else run)
    except MiniloraError as error:
        print(f"build_lessons: {error}", file=sys.stderr)
        return 2
    print(f"{len(files)} files; the book begins at {files[0]}, the notebooks are in {files[-1].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
