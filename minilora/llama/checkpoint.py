"""Hugging Face model folders, read and written one tensor at a time.

Loading needs the memory of the result plus two tensors: the model is built without memory ("meta"), every name and shape
is compared with what the files hold, and then each tensor is read, quantized or converted, put in its place and released,
while the next is being read.  A 7B model passes from 13.5 GB on disk into 3.9 GB of memory without ever lying there in 16 bits.

Quantized are the linears of the blocks (q, k, v, o, gate, up, down); embeddings, norms and the head stay 16-bit, as in
the paper's implementation.  The weights are quantized from the values in the file, not from a 16-bit rounding of them.

Lesson 09 explains it.
"""
from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minilora.errors import CheckpointError, ConfigError, QuantizationError
from minilora.files import write_json
from minilora.layers.lora import ALL_LINEARS
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import replace_module
from minilora.llama.ahead import read_ahead
from minilora.llama.blank import blank_model
from minilora.llama.bnb_format import (
    check_quantization_config,
    plain_config,
    quantized_linears,
    read_nf4,
    read_state,
    refuse_adapters,
)
from minilora.llama.config import LlamaConfig
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.safetensors_file import Pending, open_output, write_safetensors
from minilora.llama.strict_json import read_object
from minilora.llama.weights import WeightFiles
from minilora.quant.nf4 import NF4Tensor, quantize_nf4

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HARMLESS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")      # tables that the model derives itself
TRIM_BYTES = 1 << 30                                # of tensors read between two trims of the heap
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Step:
    """One parameter to fill, from the file's `key`; its rows are more than the file's where the vocabulary is padded."""

    name: str
    key: str
    shape: tuple[int, ...]
    four_bit: bool

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def is_block_linear(self) -> bool:
        return self.name.endswith(".weight") and self.module.rpartition(".")[2] in ALL_LINEARS


def _plan(model: LlamaForCausalLM, weights: WeightFiles, pad_vocab: bool, folder: Path) -> list[_Step]:
    """Match the model's parameters with the files' tensors, in file order; reads no weights.

    Raises: CheckpointError: missing, unexpected, of another shape or type, or too few rows in the vocabulary's tables.
    """
    tied = model.config.tie_word_embeddings
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if not (tied and name == HEAD)}
    groups = quantized_linears(weights.entries)
    steps = []
    for name, shape in wanted.items():
        key = HEAD if tied and name == EMBEDDING and EMBEDDING not in weights.entries else name
        entry = weights.entries.get(key)
        if entry is None:
            raise CheckpointError(f"{folder}: {name} {shape} is missing from {weights.source}; config.json needs it: fetch "
                                  "both from one upload")
        module = name.removesuffix(".weight")
        if module in groups:
            if not isinstance(model.get_submodule(module), nn.Linear):
                raise CheckpointError(f"{weights.place(key)}: is stored in 4 bits, which only linears may be")
            read_state(weights, module, shape)
        else:
            if entry.dtype not in FLOATS:
                raise CheckpointError(f"{weights.place(key)}: has type {entry.dtype_name}; expected a floating type")
            _check_shape(weights, key, shape, name in (EMBEDDING, HEAD), pad_vocab)
        steps.append(_Step(name, key, shape, module in groups))
    used = {step.key for step in steps} | {key for name, keys in groups.items() if f"{name}.weight" in wanted for key in keys}
    for key in weights.entries:
        if key not in used and not HARMLESS.search(key) and not (tied and key == HEAD):
            raise CheckpointError(f"{weights.place(key)} {weights.entries[key].shape}: unexpected, config.json has no place "
                                  "for it; fetch both from one upload")
    return sorted(steps, key=lambda step: (weights.entries[step.key].file, weights.entries[step.key].start))


def _check_shape(weights: WeightFiles, key: str, shape: tuple[int, ...], is_table: bool, pad_vocab: bool) -> None:
    found = weights.entries[key].shape
    if found == shape:
        return
    if is_table and len(found) == 2 and found[1:] == shape[1:] and 0 < found[0] < shape[0]:
        if pad_vocab:
            return
        raise CheckpointError(f"{weights.place(key)}: has {found[0]} rows, but config.json says vocab_size {shape[0]}; pass "
                              "--pad-vocab (pad_vocab=True) to fill the rest with the mean row, or fetch the other upload")
    raise CheckpointError(f"{weights.place(key)}: shape {found}, but config.json needs {shape}; fetch both from one upload")


def _pad_rows(table: Tensor, rows: int) -> Tensor:
    """`table` (n, hidden) with its mean row repeated below, up to `rows`."""
    padded = table.new_empty(rows, table.shape[1])
    padded[:table.shape[0]] = table
    padded[table.shape[0]:] = table.float().mean(0)
    return padded


def load_checkpoint(folder: Path | str, quantize: Literal["nf4"] | None = "nf4", double_quant: bool = True, blocksize: int = 64,
                    dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", pad_vocab: bool = False,
                    progress: bool = False) -> LlamaForCausalLM:
    """Load a Hugging Face folder (Llama, Mistral, Qwen2), streamed; 16-bit, 32-bit or already 4-bit.

    Args:
        folder: with config.json and the weights, as safetensors or .bin, single or sharded.
        quantize: "nf4", or None for dense linears. A folder in 4 bits keeps its own block size and nesting under "nf4",
            and is dequantized under None.
        double_quant, blocksize: of the linears quantized here.
        dtype: of everything that is not 4-bit, and the compute type.
        pad_vocab: fill tables that have fewer rows than config.json says with their mean row, instead of refusing.
        progress: show a bar with bytes, rate and time left.

    Returns: the model in eval mode.
    Raises: CheckpointError: files missing, cut short or not matching config.json; one line, before memory is taken where
        the headers tell. ConfigError: an argument.
    Guarantee: peak memory is that of the result and two tensors (tests/llama/test_checkpoint.py).
    """
    folder = Path(folder)
    if quantize not in ("nf4", None):
        raise ConfigError(f"quantize must be 'nf4' or None, found {quantize!r}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; a model folder holds config.json, weights and a tokenizer")
    config = LlamaConfig.from_json(folder / "config.json")
    check_quantization_config(read_object(folder / "config.json"), str(folder / "config.json"))
    model = blank_model(config)
    weights = WeightFiles(folder)
    steps = _plan(model, weights, pad_vocab, folder)
    # Linears that a 4-bit folder keeps dense were left out on purpose (llm_int8_skip_modules).
    quantize_dense = quantize is not None and not any(step.four_bit for step in steps)
    total = sum(weights.entries[step.key].nbytes for step in steps)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="load", disable=not progress)
    untrimmed = 0

    def reading(step: _Step) -> Callable[[], Tensor | NF4Tensor]:
        return partial(read_nf4, weights, step.module, step.shape) if step.four_bit else partial(weights.borrow, step.key)

    reads = [reading(step) for step in steps]
    with torch.no_grad(), bar, closing(read_ahead(reads)) as values:
        for step, value in zip(steps, values, strict=True):
            if quantize_dense and step.is_block_linear and isinstance(value, Tensor):
                value = _quantized(value.to(device), weights.place(step.key), double_quant, blocksize)
            if isinstance(value, Tensor):
                _put_dense(model, step, _converted(value, weights.place(step.key), dtype, device))
            elif quantize is None:
                _put_dense(model, step, value.to(device).dequantize(dtype))
            else:
                # Its dense weight is of this model's type, whatever the file says: what is merged is what was computed with.
                _put_nf4(model, step, replace(value.to(device), dtype=dtype))
            nbytes = weights.entries[step.key].nbytes
            bar.update(nbytes)
            untrimmed += nbytes
            if untrimmed >= TRIM_BYTES:
                _trim_heap()
                untrimmed = 0
    if config.tie_word_embeddings:
        _tie(model, weights)
    weights.close()
    _trim_heap()
    return model.eval()


def _quantized(value: Tensor, place: str, double_quant: bool, blocksize: int) -> NF4Tensor:
    try:
        return quantize_nf4(value, blocksize, double_quant)
    except QuantizationError as error:
        raise CheckpointError(f"{place}: {error}") from error


def _trim_heap() -> None:
    """Give the heap's free pages back to the system, where the C library has a call for it (glibc).

    Why: quantizing in plain torch makes many temporaries, and what outlives them lies scattered between; glibc returns memory
    from the heap's end only.  Without this, loading was seen to take four times the memory of its result; done for every 32 MB,
    a quarter of the time, since what was given back is handed out again page by page, filled with zeros; for every 256 MB, a
    twentieth, and no byte less at the peak than for every gigabyte.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _put_nf4(model: LlamaForCausalLM, step: _Step, quantized: NF4Tensor) -> None:
    bias = model.get_submodule(step.module).bias         # read already, or still to come
    replace_module(model, step.module, NF4Linear(quantized, bias if isinstance(bias, Tensor) else None))


def _converted(value: Tensor, place: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The file's tensor in the model's type; NaN and infinities are refused: every answer behind one would be NaN."""
    converted = value.to(device=device, dtype=dtype, copy=True)         # the value lies in its file
    if all(bool(end.isfinite()) for end in converted.aminmax()):        # one pass, and no memory; NaN comes through both ends
        return converted
    if all(bool(end.isfinite()) for end in value.aminmax()):
        raise CheckpointError(f"{place}: holds values too large for {dtype}; use bfloat16 or float32")
    raise CheckpointError(f"{place}: holds NaN or infinities; fetch the file again")


def _put_dense(model: LlamaForCausalLM, step: _Step, value: Tensor) -> None:
    padded = _pad_rows(value, step.shape[0]) if value.shape[0] < step.shape[0] else value
    setattr(model.get_submodule(step.module), step.name.rpartition(".")[2], nn.Parameter(padded))


def _tie(model: LlamaForCausalLM, weights: WeightFiles) -> None:
    """Share the embedding with the head, after making sure that the file has no other head."""
    head, embedding = weights.entries.get(HEAD), weights.entries.get(EMBEDDING)
    if head and embedding and (head.dtype != embedding.dtype or
                               not torch.equal(weights.borrow(HEAD), weights.read(EMBEDDING))):
        raise CheckpointError(f"{weights.place(HEAD)}: differs from {EMBEDDING}, though config.json says "
                              "tie_word_embeddings; set that to false if the head is its own")
    model.tie_weights()


def save_checkpoint(model: LlamaForCausalLM, folder: Path | str, dtype: torch.dtype | None = None,
                    max_shard_bytes: int = 5_000_000_000, progress: bool = False) -> None:
    """Write a plain Hugging Face folder: config.json and model.safetensors, or shards and their index.

    4-bit linears are written dequantized, one at a time.

    Args:
        model: without adapters. folder: made if need be; files of other names are left alone.
        dtype: of every tensor, default the model's.
        max_shard_bytes: a file holds at most this many bytes of weights, or one tensor.

    Raises: CheckpointError: an adapter is not merged. OutputError: the folder cannot be written.
    """
    folder, dtype = Path(folder), dtype or model.dtype
    refuse_adapters(model)
    tensors = []
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            tensors.append(Pending(f"{name}.weight", dtype, (module.out_features, module.in_features), _dense(module, dtype)))
    for name, parameter in model.named_parameters():        # a tied head is listed once, as the embedding
        tensors.append(Pending(name, dtype, tuple(parameter.shape), parameter.detach))
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
                                                            for i in range(len(shards))]
    total = sum(tensor.nbytes for tensor in tensors)
    open_output(folder, keep=("model.safetensors.index.json",) if len(shards) > 1 else ("model.safetensors",))
    with tqdm(total=total, unit="B", unit_scale=True, desc="save", disable=not progress) as bar:
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(folder / name, shard, bar.update)
    if len(shards) > 1:
        weight_map = {tensor.key: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", plain_config(model, dtype))


def _dense(layer: NF4Linear, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: layer.dense_weight(dtype)
