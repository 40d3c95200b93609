"""Whole-checkpoint conversions: 16-bit to 4-bit, and base plus adapter to one model."""
from __future__ import annotations

import warnings
from math import sqrt
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minilora.adapters import base_quantization, load_adapter, read_adapter_config, read_extra, save_extra
from minilora.data.tables import read_labels, write_labels
from minilora.errors import ConfigError
from minilora.files import MODEL_FILES, Kind, check_output, new_folder
from minilora.hub import resolve_model
from minilora.layers.merge import MergeError, merge_lora
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import Quantization, lora_layers
from minilora.llama.bnb_format import save_quantized
from minilora.llama.checkpoint import save_checkpoint
from minilora.llama.config import LlamaConfig
from minilora.llama.tokenizer import read_tokenizer
from minilora.loading import DTYPES, load_model, pick_device
from minilora.own_base import own_base

KIND = Kind("config.json", MODEL_FILES)


def quantize_folder(model: str, out: str | Path, blocksize: int = 64, double_quant: bool = True, dtype: str = "bfloat16",
                    pad_vocab: bool = False, overwrite: bool = False, quiet: bool = False) -> str:
    """Write a 4-bit copy of a checkpoint, tokenizer included.

    Returns: a sentence with sizes and bits per weight.
    Raises: OutputError, CheckpointError, HubError, ConfigError.
    """
    check_output(out, overwrite, KIND, reads=(model,))
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; use {', '.join(DTYPES)}")
    if blocksize < 1:
        raise ConfigError(f"blocksize must be at least 1, not {blocksize}")
    folder = resolve_model(model, progress=not quiet)
    tokenizer = read_tokenizer(folder)
    loaded = load_model(folder, double_quant=double_quant, dtype=DTYPES[dtype], blocksize=blocksize, pad_vocab=pad_vocab,
                        progress=not quiet)
    with new_folder(out, overwrite, KIND) as temporary:
        save_quantized(loaded, temporary)
        tokenizer.save(temporary)
        _keep_task(loaded, folder, temporary)
    layers = [module for module in loaded.modules() if isinstance(module, NF4Linear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = sum(layer.quantized.bits_per_param * layer.in_features * layer.out_features for layer in layers) / weights
    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    return f"{out}: {len(layers)} linears of {weights:,} weights at {bits:.3f} bits each; {size / 1e6:,.1f} MB in all"


def merge_folder(model: str, adapter: str | Path, out: str | Path, into: str = "16bit", device: str = "auto",
                 pad_vocab: bool = False, overwrite: bool = False, quiet: bool = False) -> str:
    """Write base plus adapter as one checkpoint, in the 16-bit type of the base (bfloat16 where that has another).

    Args:
        into: "16bit" (the dequantized base: the model that was trained), "4bit", or "original" (the unquantized base).

    Returns: a sentence with the measured error, over all adapted layers.
    Raises: OutputError, CheckpointError, HubError, ConfigError.
    """
    check_output(out, overwrite, KIND, reads=(model, adapter))
    if into not in ("16bit", "4bit", "original"):
        raise ConfigError(f"into must be 16bit, 4bit or original, not {into!r}")
    on = pick_device(device)
    read_adapter_config(adapter)
    folder = own_base(adapter) or resolve_model(model, progress=not quiet)
    trained_on = base_quantization(adapter)
    raw = LlamaConfig.from_json(folder / "config.json").to_dict()
    if into == "4bit" and trained_on is None:
        raise ConfigError(f"the adapter in {adapter} was trained on an unquantized base: merge it --into 16bit, then minilora "
                          "quantize the result")
    if into == "original" and raw.get("quantization_config"):
        raise ConfigError(f"{folder} is a 4-bit model, so the original weights are not there; name the 16-bit model, or merge "
                          "--into 16bit")
    tokenizer = read_tokenizer(folder)
    dense = into == "original" or trained_on is None
    how = trained_on or Quantization()
    # 16-bit arithmetic plays no part here: weights are merged in float32 and rounded once, to the base's own type.
    stored = {raw.get("torch_dtype"), raw.get("dtype")}
    dtype = torch.float16 if "float16" in stored else torch.bfloat16
    # Trap: training quantized what the file holds; a float32 base rounded to 16 bits first would be measured as another one.
    wide = into == "original" and not stored & {"float16", "bfloat16"}
    loaded = load_model(folder, quantize=None if dense else "nf4", double_quant=how.double_quant, blocksize=how.blocksize,
                        dtype=torch.float32 if wide else dtype, device=on, pad_vocab=pad_vocab, progress=not quiet)
    with warnings.catch_warnings():
        if into == "original":
            warnings.simplefilter("ignore", UserWarning)    # that the base differs is the point, and is measured below
        load_adapter(loaded, adapter)
    errors: list[MergeError] = []
    with tqdm(total=sum(1 for _ in lora_layers(loaded)), desc="merge", unit="layer", disable=quiet) as progress:
        def measured(name: str, error: MergeError) -> None:
            errors.append(error)
            progress.update()
        merge_lora(loaded, "4bit" if into == "4bit" else "16bit", dtype=dtype, trained_on=trained_on if dense else None,
                   on_layer=measured)
    if wide:
        loaded.to(dtype)        # embeddings, norms and head
    with new_folder(out, overwrite, KIND, mode=0o700) as temporary:
        if into == "4bit":
            save_quantized(loaded, temporary)
        else:
            save_checkpoint(loaded, temporary)
        tokenizer.save(temporary)
        _keep_task(loaded, Path(adapter), temporary)
    return f"{out}: {len(errors)} layers merged into {into}; {describe(errors)}"


def _keep_task(model: nn.Module, source: Path, folder: Path) -> None:
    """Carry labels and prompt from a run or model folder into a new model's, so that predicting needs no flags for them.

    minilora.json also says how this model is stored: one merged into 16 bits must not be quantized again unasked.
    """
    recorded = read_extra(source)
    if "template" in recorded:
        save_extra(model, folder, {key: recorded[key] for key in ("template", "max_length", "base_model") if key in recorded})
    if (source / "labels.txt").is_file():
        write_labels(folder / "labels.txt", read_labels(source / "labels.txt"))


def describe(errors: list[MergeError]) -> str:
    """A sentence on the errors of many layers: root mean squares, and the mean cosine."""
    def rms(values: list[float]) -> float:
        return sqrt(sum(value * value for value in values) / len(values))
    return (f"error {rms([e.relative_error for e in errors]):.2%} of the trained weights, "
            f"{rms([e.error_to_update for e in errors]):.2f} times the update, "
            f"cosine with what was learnt {sum(e.update_cosine for e in errors) / len(errors):.3f}")
