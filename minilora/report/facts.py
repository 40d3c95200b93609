"""What was trained, on what, with what: the heading, the settings, and the command that makes the run again."""
from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from minilora.baseline import NAME as BAG_OF_WORDS
from minilora.config import TrainConfig
from minilora.report.markup import Child, Markup, table, tag
from minilora.report.parts import byte_text, duration, percent
from minilora.report.runfiles import RunFiles
from minilora.report.scorefiles import ScoreFiles
from minilora.report.scoring import BASELINES, interval_bar
from minilora.report.svg import smooth
from minilora.report.training import window

NEXT_LINE = " \\\n    "      # between the flags of a command, which a shell reads as one


def trained_with(config: TrainConfig) -> str:
    """The method in a phrase: "QLoRA r=16, alpha 32, over a 4-bit base"."""
    if config.tune == "full":
        return "every weight tuned"
    kind = "DoRA" if config.use_dora else "LoRA"
    name = f"Q{kind}" if config.quantize == "nf4" else kind
    start = {"pissa": ", started by PiSSA", "loftq": ", started by LoftQ"}.get(config.init_lora_weights, "")
    base = "16-bit or wider base"
    if config.quantize == "nf4":
        base = f"4-bit NF4 base{', double-quantized' if config.double_quant else ''}"
    return f"{name} r={config.r}, alpha {config.alpha:g}{' by √r' if config.use_rslora else ''}{start}, over a {base}"


def heading(run: RunFiles, found: ScoreFiles | None, hint: str) -> Markup:
    """Title, state of the run, headline score and a few figures."""
    metrics, config = run.metrics, run.config
    steps = int(metrics.steps[-1])
    notes = run.card.get("data", "").partition(" notes")[0]
    what = [trained_with(config), f"{len(run.labels)} labels" if run.labels else "", f"{steps:,} steps",
            f"last step {run.last_written:%Y-%m-%d %H:%M} UTC", f"run folder {run.folder.resolve().name}"]
    state = ""
    if not run.finished:
        planned = f" of at most {config.max_steps:,}" if config.max_steps else ""
        state = (f"Unfinished: {steps:,}{planned} steps, and no adapter or model yet. It is still running, or was stopped; "
                 "train --resume goes on from its last checkpoint.")
    elif (saved := run.card.get("steps", "").partition(" ")[0]).isdigit() and int(saved) != steps:
        state = f"What it holds to predict with is of step {int(saved):,}; the run went on since, and has not ended again."
    if metrics.cut:
        state += " The last line of metrics.jsonl was cut short and is left out."
    return tag("header", tag("p", "minilora run report", class_="quiet"),
               tag("h1", f"{_base_name(config.model)}, fine-tuned{f' on {notes} notes' if notes else ''}"),
               tag("p", " · ".join(part for part in what if part), class_="lead"),
               tag("p", state, class_="notice") if state else None, _headline(run, found, hint), _figures(run))


def _base_name(model: str) -> str:
    return Path(model).name if model.startswith(("/", ".", "~")) else model


def _headline(run: RunFiles, found: ScoreFiles | None, hint: str) -> Markup:
    if found is None:
        if hint or not run.finished:
            return tag("p", hint or "No evaluation yet.", class_="hint")
        full = run.config.tune == "full"
        flags = {"model": run.folder if full else run.config.model, **({} if full else {"adapter": run.folder}),
                 "data": "TEST.csv", "input-column": run.config.input_column, "label-column": run.config.label_column,
                 "out": run.folder / "evaluation"}
        command = NEXT_LINE.join(["minilora evaluate", *(f"--{flag} {shlex.quote(str(it))}" for flag, it in flags.items())])
        return tag("div", tag("p", "No evaluation yet. This writes one where the report finds it:"), tag("pre", command),
                   class_="hint")
    score, interval = found.scores["exact_match"], found.intervals.get("exact_match")
    between = f", 95% interval {percent(interval[0])} to {percent(interval[1])}" if interval else ""
    others = {name: float(entry["exact_match"]) for name, entry in found.baselines.items() if "exact_match" in entry}
    guesses = [rate for name, rate in others.items() if name in BASELINES]
    said = [f"A guess is right in {percent(max(guesses))} at best"] if guesses else []
    said += [f"{'a ' if name == BAG_OF_WORDS else ''}{name} in {percent(rate)}" for name, rate in others.items()
             if name not in BASELINES]
    guess = f" {', '.join(said)} (grey ticks)." if said else ""
    return tag("div", tag("p", percent(score), class_="score"),
               tag("div", tag("p", tag("strong", "exact match"), f" on {found.n:,} rows{between}.{guess}"),
                   interval_bar(score, interval, others, width=320)), class_="headline")


def _figures(run: RunFiles) -> Markup:
    metrics = run.metrics
    loss, (_, val) = metrics.series("loss")[1], metrics.series("val_loss")
    tiles = [(f"{smooth(loss, window(len(loss)))[-1]:.3f}", "training loss, last steps")]
    if len(val):
        tiles.append((f"{val[-1]:.3f}", "validation loss, last"))
    seconds, tokens, peak = (metrics.series(name)[1] for name in ("seconds", "tokens", "peak_bytes"))
    if len(seconds):
        tiles.append((duration(float(seconds.sum())), "in training steps"))
    if len(tokens):
        tiles.append((f"{tokens.sum():,.0f}", "tokens seen"))
    if len(peak):
        tiles.append((byte_text(float(peak.max())), "peak memory"))
    if "trained numbers" in run.card:
        tiles.append((run.card["trained numbers"].partition(" of ")[0], "numbers trained"))
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for value, name in tiles], class_="tiles")


def train_command(config: TrainConfig) -> list[str]:
    """The command line that makes the run again, a flag with its value each: every setting that is not the default."""
    words = ["minilora train"]
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if value == setting.default or setting.name in ("resume", "overwrite", "quiet"):
            continue
        flag = setting.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, str):
            words.append(f"--{flag}={shlex.quote(value)}" if value.startswith("-") else f"--{flag} {shlex.quote(value)}")
        else:
            shown = value if isinstance(value, tuple) else (value,)
            words.append(f"--{flag} {' '.join(shlex.quote(str(item)) for item in shown)}")
    return words


def facts_section(run: RunFiles) -> Markup:
    """Data, versions, command, and every setting."""
    config, card = run.config, run.card
    unknown = "recorded when a run ends; this one has not"
    facts: list[tuple[Child, Child]] = [
        ("training table", config.data), ("validation table", config.val or "none"),
        ("columns", f"{config.input_column} → {config.label_column}"), ("its rows", card.get("data", unknown)),
        ("label set", f"{len(run.labels)} labels (labels.txt)" if run.labels else "no labels.txt"),
        ("trained numbers", card.get("trained numbers", unknown)), ("made with", card.get("made with", unknown)),
        ("run folder", str(run.folder))]
    settings = []
    for setting in dataclasses.fields(config):
        if setting.name not in ("resume", "overwrite", "quiet"):
            value = getattr(config, setting.name)
            changed = value != setting.default
            text = ", ".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else \
                f"{value:g}" if isinstance(value, float) else str(value)
            settings.append(tag("div", tag("dt", setting.name), tag("dd", text or "–"),
                                class_="changed" if changed else None))
    return tag("section", tag("h2", "How it was made"), table(["", ""], facts, class_="facts"),
               tag("h3", "The command that makes it again"),
               tag("pre", NEXT_LINE.join(train_command(config))),
               tag("p", "On the same machine and versions it writes the same bytes. Choose another --out, or add --overwrite.",
                   class_="quiet"),
               tag("h3", "Settings (config.toml)"), tag("p", "Bold: not the default.", class_="quiet"),
               tag("dl", settings, class_="settings"))
