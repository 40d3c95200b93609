"""What a training run needs to know, and its run.toml.

`TrainConfig` is the one list of settings: the command line's flags are made from its fields, ``--config run.toml`` is read
into it, and a run folder's ``config.toml`` is it, written back.
"""
from __future__ import annotations

import dataclasses
import math
import re
import sys
import typing
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import tomli_w

from minilora.errors import ConfigError
from minilora.files import write_text
from minilora.layers.lora import ALL_LINEARS, LoRAConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST_RANK = 1 << 16      # more than any matrix of a known model has rows
# Settings that a resumed run may change.
MAY_CHANGE = {"model", "data", "val", "out", "epochs", "max_steps", "eval_every", "save_every", "device",
              "resident_mib", "page_bytes", "backing", "cache", "activation_offloading"}
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")        # a byte of a file's name that is not UTF-8 comes as half of a surrogate


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """Settings of a run; each field's help is the command line's.

    Raises: ConfigError: a value of the wrong type or out of range; `model`, `data` and `out` are required.
    """

    model: str = _setting("", "base model: tiny, a folder in Hugging Face's layout, or a hub id (or ID@REVISION)")
    data: str = _setting("", "training table: CSV, JSONL or Parquet")
    out: str = _setting("", "run folder to create")
    val: str = _setting("", "validation table with the same columns; none if empty")
    input_column: str = _setting("input", "column of notes")
    label_column: str = _setting("label", "column of labels")
    template: str = _setting("note", "prompt: note, inst, meditron, tiny (of the small model), or a text file with one {input}")
    quantize: Literal["nf4", "none"] = _setting("nf4", "store the base in 4 bits (QLoRA), or not (LoRA)")
    tune: Literal["lora", "full"] = _setting("lora", "train low-rank adapters over a frozen base, or all weights (full; in "
                                                     "float32, needs quantize none)")
    new_tokens: int = _setting(0, "tokens at most that the tokenizer first learns of the notes, whose language it cuts into "
                                  "scraps (4000 does); needs tune full, which trains their rows of the embedding")
    double_quant: bool = _setting(True, "quantize the block constants as well")
    blocksize: int = _setting(64, "weights per quantization block")
    r: int = _setting(16, "rank of the update")
    alpha: float = _setting(32.0, "strength of the update: it is scaled by alpha/r")
    dropout: float = _setting(0.0, "share of each adapter's input that is zeroed in training")
    target_modules: tuple[str, ...] = _setting(ALL_LINEARS, "linears to adapt, by name")
    use_rslora: bool = _setting(False, "scale by alpha/sqrt(r) (rsLoRA)")
    use_dora: bool = _setting(False, "train a length for each output row as well (DoRA)")
    init_lora_weights: Literal["lora", "pissa", "loftq"] = _setting(
        "lora", "what A and B start as: lora (random and zero), pissa (the weight's strongest directions) or loftq (what "
                "quantization lost); the last two change the base, which the run folder then holds")
    loraplus_lr_ratio: float = _setting(1.0, "learning rate of B over that of A; above 1 it is LoRA+")
    epochs: float = _setting(3.0, "passes over the training table; a fraction stops early")
    max_steps: int = _setting(0, "optimizer steps at most; 0 = as epochs say")
    batch_size: int = _setting(16, "notes per micro-batch")
    accumulate: int = _setting(1, "micro-batches per optimizer step")
    max_length: int = _setting(512, "tokens of prompt and label together; a longer note keeps its head and tail")
    lr: float = _setting(0.0, "peak learning rate; 0 = 2e-4 * 4096 / hidden size (QLoRA's rate at 7B, scaled by width), and a "
                              "tenth of that for tune full")
    optimizer: Literal["adamw", "paged_adamw"] = _setting(
        "adamw", "adamw keeps both moments in memory; paged_adamw keeps them in pages, a budget of which is in memory")
    state_bits: int = _setting(32, "of each moment: 32, or with paged_adamw 8")
    resident_mib: float = _setting(128.0, "MiB of pages in memory (paged_adamw)")
    page_bytes: int = _setting(1 << 21, "bytes of a page (paged_adamw)")
    backing: Literal["auto", "host", "disk"] = _setting(
        "auto", "where the other pages lie: host memory or a file on disk; auto is the host for a GPU, else the disk")
    warmup: float = _setting(0.05, "share of the steps in which the rate rises from 0; then it falls as a cosine to 0")
    weight_decay: float = _setting(0.0, "AdamW's decoupled weight decay")
    max_grad_norm: float = _setting(1.0, "gradients are scaled down to this norm; 0 = never")
    gradient_checkpointing: bool = _setting(
        False, "recompute activations in backward: less memory, and about half as many products again over frozen weights, a "
               "third where all are trained")
    activation_offloading: bool = _setting(False, "keep in host memory what gradient checkpointing keeps, for notes that a GPU "
                                                  "does not hold otherwise")
    eval_every: int = _setting(0, "optimizer steps between validations; 0 = at the end only")
    save_every: int = _setting(200, "optimizer steps between checkpoints; 0 = at the end only")
    seed: int = _setting(0, "fixes initial adapters, order and dropout")
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = _setting("auto", "compute type: auto, float32, bfloat16 or float16")
    pad_vocab: bool = _setting(False, "fill missing embedding rows with their mean")
    cache: bool = _setting(False, "keep a 4-bit copy of the base beside it, and read that the next time")
    resume: bool = _setting(False, "go on from the run folder's newest checkpoint")
    overwrite: bool = _setting(False, "replace an existing run folder")
    quiet: bool = _setting(False, "no progress on the terminal")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for setting in dataclasses.fields(self):
            setattr(self, setting.name, _checked(setting.name, getattr(self, setting.name), hints[setting.name]))
        for name in ("model", "data", "out"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is required: {_help(name)}")
        ranges = [("blocksize", 1, 1 << 16), ("batch_size", 1, 1 << 16), ("accumulate", 1, 1 << 16), ("max_length", 8, 1 << 20),
                  ("lr", 0, 10), ("loraplus_lr_ratio", 1e-3, 1e3), ("warmup", 0, 1), ("weight_decay", 0, 100),
                  ("max_grad_norm", 0, math.inf), ("eval_every", 0, 10 ** 12), ("save_every", 0, 10 ** 12),
                  ("max_steps", 0, 10 ** 12), ("new_tokens", 0, 1 << 20), ("epochs", 0, 10 ** 6), ("seed", 0, 2 ** 63 - 1),
                  ("page_bytes", 1, 1 << 30), ("resident_mib", 0, 1 << 40)]
        if self.r > LARGEST_RANK:
            raise ConfigError(f"r must be at most {LARGEST_RANK:,}, not {self.r}")
        for name, low, high in ranges:
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must lie between {low} and {high:,}, not {getattr(self, name)}")
        if not self.epochs and not self.max_steps:
            raise ConfigError("nothing to train: epochs is 0; give epochs or max_steps")
        if self.eval_every and not self.val:
            raise ConfigError("eval_every says how often to validate, and there is nothing to validate on: add val, or leave "
                              "it out")
        if self.resume and self.overwrite:
            raise ConfigError("resume goes on with the run folder, overwrite replaces it: give one of the two")
        if self.tune == "full" and self.quantize != "none":
            raise ConfigError("tune full changes every weight, which 4-bit ones can't be: add quantize none, or tune lora")
        if self.tune == "full" and self.dtype not in ("auto", "float32"):
            raise ConfigError(f"tune full trains float32 weights (small updates are lost in {self.dtype}): leave dtype auto")
        if self.new_tokens and self.tune != "full":
            raise ConfigError("new_tokens adds rows to the embedding, which tune lora never trains: add tune full and quantize "
                              "none")
        if self.state_bits not in (32, 8) or (self.state_bits == 8 and self.optimizer == "adamw"):
            raise ConfigError(f"state_bits must be 32, or 8 with optimizer paged_adamw, not {self.state_bits} with "
                              f"{self.optimizer}")
        if self.init_lora_weights == "loftq" and self.quantize == "none":
            raise ConfigError("init_lora_weights loftq makes up for what quantization lost: add quantize nf4, or take pissa")
        self.lora()

    def lora(self) -> LoRAConfig:
        """The part that says what to attach."""
        return LoRAConfig(self.r, self.alpha, self.dropout, self.target_modules, self.use_rslora, self.use_dora)

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """Read a run.toml; `overrides` (the flags given on the command line) win."""
        return cls(**{**read_toml(path), **overrides})

    def save(self, path: str | Path, remark: str = "") -> None:
        """Write config.toml: everything but how this call was made (resume, overwrite, quiet).

        Args: remark: what the settings do not tell, of one line: a comment on top, under those of a run that is gone on with.
        """
        said = [*(remarks(path) if self.resume else ()), *([remark] if remark else ())]
        write_text(path, "".join(f"# {line}\n" for line in said) + tomli_w.dumps(self.settings()))

    def steps(self, per_epoch: int) -> int:
        """Optimizer steps of the whole run, of which an epoch has `per_epoch`."""
        total = math.ceil(Fraction(str(self.epochs)) * per_epoch)       # 1.1 epochs of 10 are 11: 1.1 * 10 is more in floats
        return total if not self.max_steps else min(total, self.max_steps) if self.epochs else self.max_steps

    def settings(self) -> dict[str, Any]:
        """What config.toml holds."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
                if name not in ("resume", "overwrite", "quiet")}

    def check_resumes(self, path: str | Path) -> TrainConfig:
        """Refuse to go on with a run under settings that would make another run of it.

        Files may have moved, and a run may be made longer or shorter (the rate then follows the new length, and whoever trains
        says so: `run_checkpoints.length_changed`).

        Returns: these settings with the length that the run had until now.
        Raises: ConfigError: the run's config.toml differs, or cannot be read.
        """
        # An older run's file lacks what was no setting yet: it went by the default.
        defaults = {setting.name: setting.default for setting in dataclasses.fields(self)}
        before, now = {**defaults, **read_toml(path)}, self.settings()
        for name in sorted(now.keys() - MAY_CHANGE):
            was = list(before[name]) if isinstance(before[name], tuple) else before[name]
            if was != now[name]:
                raise ConfigError(f"resume: {name} is {now[name]!r} and was {was!r} in {path}; give it as before, or start "
                                  "another run")
        return dataclasses.replace(self, epochs=before["epochs"], max_steps=before["max_steps"])


def check_offloading(offloading: bool, checkpointing: bool, device: str | None = None) -> None:
    """Refuse to offload where there is nothing to offload, or nowhere else.

    Args: device: its type, as torch names it; None where it is not known.
    Raises: ConfigError: so.
    """
    if offloading and not checkpointing:
        raise ConfigError("activation_offloading moves what gradient checkpointing keeps: add --gradient-checkpointing")
    if offloading and device == "cpu":
        raise ConfigError("activation_offloading moves a GPU's activations to host memory, and the device is the CPU: leave it "
                          "out")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises: ConfigError: no such file, not TOML, or a name that is no setting.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deep for a list of settings") from None
    except ValueError as error:         # TOMLDecodeError, UnicodeDecodeError, or a number of more digits than Python reads
        raise ConfigError(f"{path} is not TOML: {error!s:.200}") from None
    known = {setting.name for setting in dataclasses.fields(TrainConfig)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ConfigError(f"{path}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return values


def remarks(path: str | Path) -> list[str]:
    """What `TrainConfig.save` wrote on top of a config.toml; nothing where there is no such file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
    return [line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("# "), lines)]


def _help(name: str) -> str:
    return next(setting.metadata["help"] for setting in dataclasses.fields(TrainConfig) if setting.name == name)


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value in the type its field declares: an int may stand for a float, a list for a tuple; nothing else is bent."""
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{name} must be {' or '.join(typing.get_args(hint))}, not {value!r}")
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{name} must be a list of names, not {value!r}")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1023 else math.inf       # a TOML file's numbers have no end
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and (found := _NO_TEXT.search(value)):      # NUL ends a path; config.toml is UTF-8
        raise ConfigError(f"{name} holds {found[0]!a}, which is no text that a file of settings can hold: rename what it "
                          "names, in UTF-8")
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ConfigError(f"{name} must be {'a finite number' if hint is float else hint.__name__}, not {value!r}")
    return value
