"""What a Databricks task runs: one command of minilora, or `copy FROM TO`, which takes files out of the driver's own disk.

A task counts as done unless its program raises, whatever exit code it returns; so here a command that fails raises.
"""
from __future__ import annotations

import shutil
import sys
from pathlib import Path

from minilora.cli import main


def run(words: list[str]) -> None:
    """Run the words of a command line.

    Raises: RuntimeError: it failed; what was wrong is the line before, on the error stream.
    """
    if words[:1] == ["copy"]:
        source, target = map(Path, words[1:])
        for path in source.rglob("*") if source.is_dir() else [source]:
            if path.is_file():          # contents alone: a volume has no modes
                to = target / path.relative_to(source) if source.is_dir() else target
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)
    elif code := main(words):
        raise RuntimeError(f"minilora {words[0] if words else ''} ended with exit code {code}; its own line stands above")


if __name__ == "__main__":
    run(sys.argv[1:])
