"""The model card that is saved with every run: what it is, what it was made from, what it must not be used for.

`evaluate` adds what the run scored: a line for each table that it was scored on, named by its hash.
"""
from __future__ import annotations

import json
import math
import platform
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minilora.config import TrainConfig, remarks
from minilora.errors import OutputError
from minilora.files import file_sha256, write_text
from minilora.hub import split_revision

if TYPE_CHECKING:
    from minilora.evaluate import Evaluation
    from minilora.train import TrainResult

SCORES = re.compile(r"^## Scores\n.*?(?=^## )", re.DOTALL | re.MULTILINE)
MADE_BY = "| made with | minilora "


def own_version() -> str:
    """This package's; where it runs from a checkout that is not installed, it has none."""
    try:
        return version("minilora")
    except PackageNotFoundError:
        return "from a checkout"


def write_model_card(result: TrainResult, config: TrainConfig, labels: list[str], notes: int) -> None:
    """Write README.md of a run folder, in the hub's format (YAML front matter, then Markdown).

    Args:
        labels: the label set. notes: rows trained on.
    """
    base = "unquantized"
    if config.quantize == "nf4":
        base = f"4-bit NF4{', double-quantized' if config.double_quant else ''}, blocks of {config.blocksize}"
    full = config.tune == "full"
    all_weights = [("tuned", "all weights" + (f", over at most {config.new_tokens:,} new tokens" if config.new_tokens else ""))]
    adapter = [
        ("adapter", f"LoRA r={config.r}, alpha={config.alpha:g}, dropout={config.dropout:g}"
                    + (", rsLoRA" if config.use_rslora else "") + (", DoRA" if config.use_dora else "")),
        ("targets", ", ".join(config.target_modules)),
    ]
    rows = [
        ("base model", config.model), ("base weights", base), *(all_weights if full else adapter),
        ("trained numbers", f"{result.trained:,} of {result.parameters:,} ({result.trained / result.parameters:.2%})"),
        ("data", f"{notes:,} notes, {len(labels)} labels, SHA-256 {file_sha256(config.data)}"),
        ("steps", f"{result.steps} of {config.batch_size} x {config.accumulate} notes"),
        ("last training loss", f"{result.loss:.4f}" if math.isfinite(result.loss) else "resumed after the last step"),
        ("validation loss", f"{result.val_loss:.4f}" if result.val_loss is not None else "not measured"),
        ("learning rate", f"{config.lr:g} at its peak" if config.lr else "QLoRA's, by width"),
        ("schedule", f"warm-up over {config.warmup:g} of the steps, then a cosine to 0; gradients clipped to norm "
                     f"{config.max_grad_norm:g}"),
        ("optimizer", f"{config.optimizer}, moments in {config.state_bits} bits, weight decay {config.weight_decay:g}"),
        ("prompt", f"template {Path(config.template).name}, at most {config.max_length} tokens with the label"),
        ("seed", str(config.seed)),
        *(("length", remark) for remark in remarks(result.out / "config.toml")),
        ("made with", f"minilora {own_version()}, torch {torch.__version__}, Python {platform.python_version()}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    listed = "\n".join(f"- {label}" for label in labels[:200]) + ("\n- …" if len(labels) > 200 else "")
    if full:
        head = f"""library_name: transformers
tags: [minilora]
---
# Model for labelling short notes

All weights of the base model below, tuned to turn a note into one of {len(labels)} labels."""
    else:
        head = f"""library_name: peft
tags: [{"qlora" if config.quantize == "nf4" else "lora"}, minilora]
---
# Adapter for labelling short notes

A low-rank adapter that turns a note into one of {len(labels)} labels. It fits the base model below, stored as below, and
no other: on a base quantized in another way its answers differ."""
    use = f"--model {result.out}" if full else f"--model {config.model} --adapter {result.out}"
    # A JSON text is a YAML one, whatever stands in the name.
    write_text(result.out / "README.md", f"""---
base_model: {json.dumps(split_revision(config.model)[0], ensure_ascii=False)}
{head}

| | |
| --- | --- |
{table}

## Use

```
minilora predict {use} --note "..."
minilora evaluate {use} --data test.csv --out scores
```

## Intended use and limits

For research and teaching. It is **no medical device**: nobody has shown it safe for patients. A label is a suggestion that
a qualified person checks before anything is done to anybody. It knows the labels and the style of notes it was trained on;
on others it still answers, and may be sure of itself while it is wrong. Evaluate it on your own notes first.

## Labels

{listed}
""")


def record_scores(run: str | Path, data: str | Path, evaluation: Evaluation, free: bool = False) -> None:
    """Add what a run scored on a table to its model card, in the place of an earlier score on the same table.

    Args:
        run: the folder that was evaluated; without a card that training wrote, nothing happens.
        data: the table. free: whether answers were written instead of chosen among the labels.

    A card that cannot be written is a warning: the scores stand in metrics.json.
    """
    card = Path(run) / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if MADE_BY not in text:
        return
    name = f"| `{file_sha256(data)[:16]}` |"
    found = SCORES.search(text)
    rows = [line for line in (found[0] if found else "").splitlines() if line.startswith("| `") and not line.startswith(name)]
    scores = []
    for key in ("exact_match", "macro_f1", "cosine"):
        low, high = evaluation.intervals[key]
        scores.append(f"{getattr(evaluation, key):.3f} [{low:.3f}, {high:.3f}]")
    if evaluation.scored is not None and evaluation.scored.embedder != "base":
        scores[-1] += f" ({evaluation.scored.embedder})"
    rows.append(f"{name} {evaluation.n:,} | {'written freely' if free else 'chosen among labels'} | {' | '.join(scores)} |")
    section = ("## Scores\n\nWith 95 % intervals over the notes; cosine is that of the base model's own embeddings where "
               "no other is named.\n\n"
               "| SHA-256 of the table | notes | answers | exact match | macro F1 | cosine |\n"
               "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(rows) + "\n\n")
    text = SCORES.sub("", text)
    before, heading, after = text.partition("## Intended use")
    try:
        write_text(card, before + section + heading + after if heading else text + "\n" + section)
    except OutputError as error:
        warnings.warn(f"the scores were not added to the model card ({error})", stacklevel=2)
