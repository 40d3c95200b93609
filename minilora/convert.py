"""Whole-checkpoint conversions: 16-bit to 4-bit, and base plus adapter to one model."""
from __future__ import annotations

from math import sqrt
from pathlib import Path

import torch
from tqdm import tqdm

from minilora.adapters import read_extra
from minilora.errors import ConfigError
from minilora.files import check_output, new_folder
from minilora.hub import resolve_model
from minilora.layers.merge import MergeError, merge_lora
from minilora.layers.qlora import Quantization, lora_layers
from minilora.layers.nf4_linear import NF4Linear
from minilora.llama.bnb_format import save_quantized
from minilora.llama.checkpoint import save_checkpoint
from minilora.llama.tokenizer import load_tokenizer
from minilora.loading import DTYPES, load_model, pick_device


def quantize_folder(model: str, out: str | Path, blocksize: int = 64, double_quant: bool = True, dtype: str = "bfloat16",
                    pad_vocab: bool = False, overwrite: bool = False, quiet: bool = False) -> str:
    """Write a 4-bit copy of a checkpoint, tokenizer included.

    Returns: a sentence with sizes and bits per weight.
    Raises: OutputError, CheckpointError, HubError, ConfigError.
    """
    check_output(out, overwrite)
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; use {', '.join(DTYPES)}")
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, double_quant=double_quant, dtype=DTYPES[dtype], blocksize=blocksize, pad_vocab=pad_vocab,
                        progress=not quiet)
    with new_folder(out, overwrite) as temporary:
        save_quantized(loaded, temporary)
        tokenizer.save(temporary)
    layers = [module for module in loaded.modules() if isinstance(module, NF4Linear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = sum(layer.quantized.bits_per_param * layer.in_features * layer.out_features for layer in layers) / weights
    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    return f"{out}: {len(layers)} linears of {weights:,} weights at {bits:.3f} bits each; {size / 1e6:,.1f} MB in all"


def merge_folder(model: str, adapter: str | Path, out: str | Path, into: str = "16bit", device: str = "auto",
                 pad_vocab: bool = False, overwrite: bool = False, quiet: bool = False) -> str:
    """Write base plus adapter as one checkpoint.

    Args:
        into: "16bit" (the dequantized base: the model that was trained), "4bit", or "original" (the unquantized base).

    Returns: a sentence with the measured error, over all adapted layers.
    Raises: OutputError, CheckpointError, HubError, ConfigError.
    """
    check_output(out, overwrite)
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    stored = read_extra(adapter).get("base_quantization", {"blocksize": 64, "double_quant": True})
    trained_on = Quantization(int(stored["blocksize"]), bool(stored["double_quant"])) if isinstance(stored, dict) else None
    dense = into == "original" or trained_on is None
    how = trained_on or Quantization()
    # 16-bit arithmetic plays no part here: weights are merged in float32 and rounded once, to the base's own type.
    loaded = load_model(folder, quantize=None if dense else "nf4", double_quant=how.double_quant, blocksize=how.blocksize,
                        dtype=torch.bfloat16, device=pick_device(device), pad_vocab=pad_vocab)
    from minilora.adapters import load_adapter
    import warnings
    with warnings.catch_warnings():
        if into == "original":
            warnings.simplefilter("ignore", UserWarning)    # that the base differs is the point, and is measured below
        load_adapter(loaded, adapter)
    errors: list[MergeError] = []
    with tqdm(total=sum(1 for _ in lora_layers(loaded)), desc="merge", unit="layer", disable=quiet) as progress:
        def measured(name: str, error: MergeError) -> None:
            errors.append(error)
            progress.update()
        merge_lora(loaded, "4bit" if into == "4bit" else "16bit", trained_on=trained_on if dense else None, on_layer=measured)
    with new_folder(out, overwrite) as temporary:
        if into == "4bit":
            save_quantized(loaded, temporary)
        else:
            save_checkpoint(loaded, temporary)
        tokenizer.save(temporary)
    return f"{out}: {len(errors)} layers merged into {into}; {describe(errors)}"


def describe(errors: list[MergeError]) -> str:
    """A sentence on the errors of many layers: root mean squares, and the mean cosine."""
    def rms(values: list[float]) -> float:
        return sqrt(sum(value * value for value in values) / len(values))
    return (f"error {rms([e.relative_error for e in errors]):.2%} of the trained weights, "
            f"{rms([e.error_to_update for e in errors]):.2f} times the update, "
            f"cosine with what was learnt {sum(e.update_cosine for e in errors) / len(errors):.3f}")
