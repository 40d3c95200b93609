"""Pictures, drawn where matplotlib is installed (extra ``[plots]``)."""
from __future__ import annotations

import json
from pathlib import Path

from minilora.evaluate import Evaluation
from minilora.runs import METRICS_FILE

BLUE, GREY, GREEN = "#3366aa", "#b8bec8", "#2e8b57"


def draw_demo(out: Path, before: Evaluation, after: Evaluation) -> Path | None:
    """Loss over the steps, and scores before and after with 95 % intervals: `out`/demo.png, or None without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (out / "run" / METRICS_FILE).read_text().splitlines()]
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1.3, 1), layout="constrained")
    left.plot(steps, losses, color=GREY, linewidth=0.8, label="each step")
    left.plot(steps, _smooth(losses, 25), color=BLUE, linewidth=2, label="running mean of 25")
    left.set(xlabel="optimizer step", ylabel="loss per label token (nats)", title="QLoRA training: 4-bit base, r = 16",
             yscale="log")
    left.legend(frameon=False)

    names = {"exact_match": "exact match", "macro_f1": "macro-F1", "cosine": "cosine"}
    for shift, scores, color, label in ((-0.2, before, GREY, "base model"), (0.2, after, GREEN, "after fine-tuning")):
        values = [getattr(scores, name) for name in names]
        spread = [[max(0.0, v - scores.intervals[n][0]) for n, v in zip(names, values, strict=True)],
                  [max(0.0, scores.intervals[n][1] - v) for n, v in zip(names, values, strict=True)]]
        bars = right.bar([i + shift for i in range(len(names))], values, 0.38, yerr=spread, capsize=3, color=color, label=label)
        right.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=9)
    right.set(ylim=(0, 1.18), title=f"{after.n:,} test notes in unseen phrasing", ylabel="score, with 95 % interval")
    right.set_xticks(range(len(names)), list(names.values()))
    right.legend(frameon=False, loc="upper left", ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path = out / "demo.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _smooth(values: list[float], width: int) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
