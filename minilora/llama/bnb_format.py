"""The Hugging Face bitsandbytes 4-bit format, read and written.

    <linear>.weight                                  uint8 (n/2, 1)          two codes a byte
    <linear>.weight.absmax                           uint8 (blocks,)         float32 where the constants are not nested
    <linear>.weight.quant_map                        float32 (16,)           the NF4 table
    <linear>.weight.nested_absmax                    float32 (blocks/256,)   only nested, as the next
    <linear>.weight.nested_quant_map                 float32 (256,)          the signed 8-bit dynamic map
    <linear>.weight.quant_state.bitsandbytes__nf4    uint8                   JSON: quant_type, blocksize, dtype, shape,
                                                                             nested_blocksize, nested_dtype, nested_offset

and `quantization_config` in config.json.  A file is read as it says: block size, nested or not, its own offset.  Files in
the wild have nested_dtype "bfloat16": bitsandbytes then rounds the decoded constants to bfloat16, twice, so these are
decoded here by the same steps and kept as float32; the weights come out bitsandbytes' to the bit.

Source: `QuantState.as_dict` and `dequantize_4bit` in bitsandbytes/functional.py.
"""
from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, QuantizationError
from minilora.files import write_json
from minilora.layers.lora import LoRALinear
from minilora.layers.nf4_linear import NF4Linear
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.safetensors_file import Pending, TensorEntry, open_output, write_safetensors
from minilora.llama.strict_json import parse_object
from minilora.llama.weights import WeightFiles
from minilora.quant.blockwise import dequantize_blockwise
from minilora.quant.codebooks import DYNAMIC_8BIT, NF4_CODE
from minilora.quant.nf4 import NestedAbsmax, NF4Tensor, as_shape

STATE = ".quant_state.bitsandbytes__nf4"
PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
LARGEST_STATE = 1 << 16         # bytes of one linear's JSON; it takes 200
LARGEST_BLOCK = 1 << 30         # weights: above every layer, below what would overflow
TABLE_TOLERANCE = 1e-6          # tables were computed by different versions; a wrong table is off by far more


def check_quantization_config(config: dict[str, Any], source: str) -> None:
    """Refuse a folder that is quantized by another method.

    Args:
        config: config.json's content. source: its path.

    Raises: CheckpointError: gptq, awq, 8-bit, fp4 and the like.
    """
    found = config.get("quantization_config")
    if found is None:
        return
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}: quantization_config must be an object, found {type(found).__name__}")
    method = found.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        kind = str(method)[:60]
    elif found.get("load_in_8bit") or found.get("_load_in_8bit"):
        kind = "bitsandbytes 8-bit"
    elif found.get("bnb_4bit_quant_type", "nf4") != "nf4":
        kind = f"bitsandbytes {found['bnb_4bit_quant_type']!s:.60}"
    else:
        return
    raise CheckpointError(f"{source}: the weights are quantized as {kind}; only bitsandbytes nf4 is read: use the 16-bit model")


def quantized_linears(entries: dict[str, TensorEntry]) -> dict[str, list[str]]:
    """The 4-bit linears among a folder's tensors: module name -> its keys but the bias.

    Raises: CheckpointError: a linear in another 4-bit type.
    """
    states = [key for key in entries if key.endswith(".weight" + STATE)]
    groups: dict[str, list[str]] = {key.removesuffix(".weight" + STATE): [] for key in states}
    for key, entry in entries.items():
        name, _, part = key.partition(".weight")
        if name in groups and part in PARTS and key != name:
            groups[name].append(key)
        elif part.startswith(".quant_state."):
            raise CheckpointError(f"{entry.file}: {key}: only nf4 is read; use the 16-bit model")
    return groups


def _whole(state: dict[str, Any], key: str, place: str) -> int:
    value = state.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_BLOCK:
        raise CheckpointError(f"{place}: {key} must be a whole number from 1 to {LARGEST_BLOCK:,}, found {value!r:.60}")
    return value


def _dtype(state: dict[str, Any], key: str, place: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = state.get(key)
    if not isinstance(name, str) or name not in dtypes:
        raise CheckpointError(f"{place}: {key} must be one of {', '.join(dtypes)}, found {name!r:.60}")
    return dtypes[name]


def read_state(weights: WeightFiles, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Read and check what a 4-bit linear says of itself, before its weights are read.

    Args:
        weights: the folder. name: of the linear. shape: (out, in) as config.json has it.

    Raises: CheckpointError: names the file, the key, what was expected and found.
    """
    key = f"{name}.weight{STATE}"
    place = weights.place(key)
    if weights.entries[key].nbytes > LARGEST_STATE:
        raise CheckpointError(f"{place}: has {weights.entries[key].nbytes:,} bytes, more than a description takes; fetch it "
                              "again")
    state = parse_object(weights.read(key).contiguous().view(-1).view(torch.uint8).numpy().tobytes(), place)
    if state.get("quant_type") != "nf4":
        raise CheckpointError(f"{place}: quant_type must be nf4, found {state.get('quant_type')!r:.60}")
    try:
        found = tuple(as_shape(state.get("shape") or ()))
    except (QuantizationError, TypeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{place}: shape must be a list of whole numbers, found {state.get('shape')!r:.80}") from error
    if found != shape:
        raise CheckpointError(f"{place}: shape {found}, but config.json needs {shape}; fetch both from one upload")
    blocksize = _whole(state, "blocksize", place)
    _dtype(state, "dtype", place)
    needed = {"": (prod(shape) + 1) // 2, ".absmax": -(-prod(shape) // blocksize), ".quant_map": 16}
    nested = f"{name}.weight.nested_absmax" in weights.entries
    if nested:
        nested_blocks = -(-needed[".absmax"] // _whole(state, "nested_blocksize", place))
        needed |= {".nested_absmax": nested_blocks, ".nested_quant_map": 256}
        _dtype(state, "nested_dtype", place)
        offset = state.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not -1e30 < offset < 1e30:
            raise CheckpointError(f"{place}: nested_offset must be a number, found {offset!r:.60}")
    for part, count in needed.items():
        entry = weights.entries.get(f"{name}.weight{part}")
        if entry is None:
            raise CheckpointError(f"{weights.entries[key].file.parent}: {name}.weight{part} is missing, though {key} is there")
        # The codes may be stored as another type of the same bytes (bnb_4bit_quant_storage).
        kind = torch.uint8 if part == "" or (part == ".absmax" and nested) else torch.float32
        size = entry.nbytes if part == "" else prod(entry.shape)
        if size != count or (part != "" and entry.dtype != kind):
            raise CheckpointError(f"{weights.place(entry.key)}: expected {count} {'bytes' if part == '' else kind}, found "
                                  f"{size} of type {entry.dtype_name}")
    return state | {"nested": nested}


def read_nf4(weights: WeightFiles, name: str, shape: tuple[int, ...]) -> NF4Tensor:
    """Read one 4-bit linear's weight.

    Args:
        weights: the folder. name: of the linear. shape: (out, in).

    Raises: CheckpointError: as `read_state`, or a table that is not NF4's.
    Guarantee: dequantizes to bitsandbytes' values, bit for bit (tests/peers/test_bnb_checkpoint.py).
    """
    state = read_state(weights, name, shape)
    key = f"{name}.weight"

    def flat(part: str) -> Tensor:
        return weights.read(key + part).reshape(-1)

    for part, table in ((".quant_map", NF4_CODE), (".nested_quant_map", DYNAMIC_8BIT)):
        if (part == ".quant_map" or state["nested"]) and not torch.allclose(flat(part), table, rtol=0, atol=TABLE_TOLERANCE):
            raise CheckpointError(f"{weights.place(key + part)}: not the table of nf4; this loader knows no other")
    packed, constants, dtype = flat("").view(torch.uint8), flat(".absmax"), _dtype(state, "dtype", key)
    floats = {".nested_absmax": flat(".nested_absmax")} if state["nested"] else {".absmax": constants}
    for part, values in floats.items():
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"{weights.place(key + part)}: holds NaN or infinities; fetch the file again")
    if not state["nested"]:
        return NF4Tensor(packed, torch.Size(shape), dtype, state["blocksize"], stored_absmax=constants)
    rounded = _dtype(state, "nested_dtype", key)
    nested = NestedAbsmax(constants, flat(".nested_absmax"), float(state["nested_offset"]), state["nested_blocksize"])
    if rounded == torch.float32:
        return NF4Tensor(packed, torch.Size(shape), dtype, state["blocksize"], nested=nested)
    # Trap: bitsandbytes decodes the constants into nested_dtype and adds the offset in it: two roundings.
    decoded = dequantize_blockwise(nested.codes, nested.absmax, DYNAMIC_8BIT, nested.blocksize).to(rounded)
    return NF4Tensor(packed, torch.Size(shape), dtype, state["blocksize"], stored_absmax=(decoded + nested.offset).float())


def pending_nf4(name: str, weight: NF4Tensor) -> list[Pending]:
    """The tensors of one 4-bit linear, ready to be written."""
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": weight.blocksize,
                             "dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}
    constants = weight.stored_absmax
    parts: dict[str, Tensor] = {"": weight.packed.reshape(-1, 1), ".quant_map": NF4_CODE}
    if weight.nested is not None:
        state |= {"nested_blocksize": weight.nested.blocksize, "nested_dtype": "float32", "nested_offset": weight.nested.offset}
        constants = weight.nested.codes
        parts |= {".nested_absmax": weight.nested.absmax, ".nested_quant_map": DYNAMIC_8BIT}
    if constants is not None:
        parts[".absmax"] = constants
    parts[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu")
    return [Pending(f"{name}.weight{part}", value.dtype, tuple(value.shape), value.detach) for part, value in parts.items()]


def save_quantized(model: LlamaForCausalLM, folder: Path | str) -> None:
    """Write a 4-bit model as the Hugging Face bitsandbytes format: config.json and model.safetensors.

    Args:
        model: with 4-bit linears and no adapter. folder: made if need be; files of other names are left alone.

    Raises:
        CheckpointError: nothing is 4-bit, or an adapter is not merged yet. OutputError: the folder cannot be written.
    Guarantee: transformers loads it with the same weights (tests/peers/test_bnb_checkpoint.py), and so does
        `load_checkpoint`; a double-quantized model comes back with the same codes.
    """
    folder = Path(folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    refuse_adapters(model)
    if not layers:
        raise CheckpointError("the model has no 4-bit layers to save; load it with quantize='nf4'")
    tensors = [part for name, layer in layers.items() for part in pending_nf4(name, layer.quantized)]
    for name, parameter in model.named_parameters():
        tensors.append(Pending(name, model.dtype, tuple(parameter.shape), parameter.detach))
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    nested = all(layer.double_quant for layer in layers.values())
    dtype_name = str(model.dtype).removeprefix("torch.")
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": dtype_name,
                    "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": dense}
    open_output(folder, keep=("model.safetensors",))
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", {**plain_config(model, model.dtype), "quantization_config": quantization})


def plain_config(model: LlamaForCausalLM, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of weights saved in `dtype`: what the model was read with, less how its file was stored."""
    kept = {key: value for key, value in model.config.to_dict().items() if key not in ("quantization_config", "dtype")}
    # Trap: an adapter on a tied head, once merged, has made the head a matrix of its own.
    tied = getattr(model.lm_head, "weight", None) is model.model.embed_tokens.weight        # a 4-bit head has none
    if model.config.tie_word_embeddings and not tied:
        kept["tie_word_embeddings"] = False
    return {**kept, "torch_dtype": str(dtype).removeprefix("torch.")}


def refuse_adapters(model: nn.Module) -> None:
    """Raise CheckpointError if the model still has LoRA layers, which a plain checkpoint cannot hold."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            raise CheckpointError(f"{name} has an adapter that is not merged; merge it first (merge_lora), or save the adapter")
