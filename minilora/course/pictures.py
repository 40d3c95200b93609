"""Pictures of the lessons: one style, one size, and a place to lie (matplotlib: extra ``[plots]``)."""
from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minilora.course.lesson import lessons_folder
from minilora.errors import ConfigError

BLUE, GREY, GREEN, RED, GOLD = "#3366aa", "#b8bec8", "#2e8b57", "#c0392b", "#d4a017"
FOLDER = "MINILORA_FIGURES"         # environment: another folder than lessons/figures
DPI = 90


@contextmanager
def picture(name: str, columns: int = 1, width: float = 8.0, height: float = 3.4, **options: Any) -> Iterator[Any]:
    """A figure with `columns` axes side by side; when the block ends it is saved as ``lessons/figures/<name>.png``.

    In a notebook it is shown as well.

    Args: options: of ``matplotlib.pyplot.subplots``, e.g. width_ratios.
    Yields: the axes, or a list of them where there are several.
    Raises: ConfigError: no matplotlib.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("the lessons' pictures need matplotlib: pip install -e '.[plots]'") from None
    notebook = "ipykernel" in sys.modules
    if not notebook:
        matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)
    yield axes[0, 0] if columns == 1 else list(axes[0])
    for each in axes[0]:
        each.spines[["top", "right"]].set_visible(False)
        legend = each.get_legend()
        if legend is not None:
            legend.set_frame_on(False)
    folder = Path(os.environ.get(FOLDER) or lessons_folder() / "figures")
    folder.mkdir(parents=True, exist_ok=True)
    # Without the library's version in it, the same drawing is the same file.
    figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Software": None})
    if notebook:
        plt.show()
    plt.close(figure)
    print(f"[picture: {name}.png in {folder.name}]")
