"""The model card that is saved with every run: what it is, what it was made from, what it must not be used for."""
from __future__ import annotations

import hashlib
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minilora.config import TrainConfig
from minilora.files import write_text

if TYPE_CHECKING:
    from minilora.train import TrainResult


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file: names the data of a run without telling anything of what stands in it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file.read())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_model_card(result: TrainResult, config: TrainConfig, labels: list[str], notes: int) -> None:
    """Write README.md of a run folder, in the hub's format (YAML front matter, then Markdown).

    Args:
        labels: the label set. notes: rows trained on.
    """
    base = "unquantized"
    if config.quantize == "nf4":
        base = f"4-bit NF4{', double-quantized' if config.double_quant else ''}, blocks of {config.blocksize}"
    full = config.tune == "full"
    adapter = [
        ("adapter", f"LoRA r={config.r}, alpha={config.alpha:g}, dropout={config.dropout:g}"
                    + (", rsLoRA" if config.use_rslora else "") + (", DoRA" if config.use_dora else "")),
        ("targets", ", ".join(config.target_modules)),
    ]
    rows = [
        ("base model", config.model), ("base weights", base), *([("tuned", "all weights")] if full else adapter),
        ("trained numbers", f"{result.trained:,} of {result.parameters:,} ({result.trained / result.parameters:.2%})"),
        ("data", f"{notes:,} notes, {len(labels)} labels, SHA-256 {file_sha256(config.data)}"),
        ("steps", f"{result.steps} of {config.batch_size} x {config.accumulate} notes"),
        ("last training loss", f"{result.loss:.4f}" if math.isfinite(result.loss) else "resumed after the last step"),
        ("validation loss", f"{result.val_loss:.4f}" if result.val_loss is not None else "not measured"),
        ("seed", str(config.seed)),
        ("made with", f"minilora {version('minilora')}, torch {torch.__version__}, Python {platform.python_version()}"),
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
base_model: {json.dumps(config.model, ensure_ascii=False)}
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
