"""Adapters that bring their base along, because training began by changing it (PiSSA, LoftQ).

    run/minilora.json      "init_lora_weights": "pissa"
    run/base/              the changed base: config.json, model.safetensors, tokenizer; 4-bit where the base is

The base is a model folder like any other, so transformers and PEFT load it too.
"""
from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from minilora.adapters import read_extra
from minilora.errors import CheckpointError
from minilora.files import new_folder
from minilora.layers.qlora import bases_in_place, lora_layers, quantization_of
from minilora.layers.starts import Start, start_from_weight
from minilora.llama.bnb_format import save_quantized
from minilora.llama.checkpoint import FLOATS, save_checkpoint
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.tokenizer import Tokenizer
from minilora.llama.weights import WeightFiles

FOLDER = "base"


def own_base(adapter: str | Path) -> Path | None:
    """The base in an adapter's folder; None where the adapter goes over a model as it is published.

    Raises: CheckpointError: the adapter's own base is gone.
    """
    if read_extra(adapter).get("init_lora_weights", "lora") == "lora":
        return None
    base = Path(adapter) / FOLDER
    if not (base / "config.json").is_file():
        raise CheckpointError(f"{adapter}: the adapter was trained over weights that its start changed, and {base}, which held "
                              "them, is gone; copy the run folder whole")
    return base


def start_adapters(model: LlamaForCausalLM, folder: Path, start: Start, quiet: bool = True) -> None:
    """Start every adapter from its weight, which is read from the model's folder, one at a time.

    Args:
        model: with fresh LoRA layers, as loaded from `folder`.

    Raises: CheckpointError: the folder has no such weight in 16 or 32 bits. ConfigError: see `start_from_weight`.
    """
    weights = WeightFiles(folder)
    for name, layer in tqdm(list(lora_layers(model)), desc=start, unit="layer", disable=quiet):
        entry = weights.entries.get(f"{name}.weight")
        if entry is None or entry.dtype not in FLOATS:
            raise CheckpointError(f"{folder}: {start} starts from the weights as they were before quantization, and "
                                  f"{name}.weight is not there in 16 or 32 bits; name the unquantized model")
        start_from_weight(layer, weights.borrow(entry.key).to(layer.lora_A.weight.device), start)
    weights.close()


def save_base(model: LlamaForCausalLM, tokenizer: Tokenizer, run: Path) -> Path:
    """Write what lies under the model's adapters into the run folder; returns where.

    Raises: OutputError: the disk refuses.
    """
    with new_folder(run / FOLDER, overwrite=True) as temporary, bases_in_place(model):
        if quantization_of(model):
            save_quantized(model, temporary)
        else:
            save_checkpoint(model, temporary)
        tokenizer.save(temporary)
    return run / FOLDER
