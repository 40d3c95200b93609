"""Models by their shape alone: for planning a run before anything is downloaded, and for measuring one without weights.

    110m     a Llama of 12 blocks of 768, tied head (as in llama2.c)           1.1b    TinyLlama's
    7b       Llama 2 7B's, which is Meditron-7B's but for 17 rows              8b      Llama 3.1 8B's
    70b      Llama 2 70B's, which is Meditron-70B's but for 17 rows
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minilora.files import write_json
from minilora.hub import resolve_model
from minilora.layers.lora import ALL_LINEARS
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import replace_module
from minilora.llama.blank import blank_model
from minilora.llama.config import LlamaConfig
from minilora.llama.model import LlamaForCausalLM, RMSNorm
from minilora.quant.codebooks import NF4_CODE
from minilora.quant.nf4 import NESTED_BLOCKSIZE, NestedAbsmax, NF4Tensor

STD = 0.02                      # of random weights, as models start
CODE_STD = float(NF4_CODE.std(correction=0))        # of NF4 values whose codes are drawn evenly


def _shape(hidden: int, layers: int, heads: int, key_value_heads: int, inner: int, vocabulary: int, positions: int,
           **rest: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads, "intermediate_size": inner, "vocab_size": vocabulary,
            "max_position_embeddings": positions, "rms_norm_eps": 1e-5, **rest}


SHAPES: dict[str, dict[str, Any]] = {
    "110m": _shape(768, 12, 12, 12, 2048, 32000, 1024, tie_word_embeddings=True),
    "1.1b": _shape(2048, 22, 32, 4, 5632, 32000, 2048),
    "7b": _shape(4096, 32, 32, 32, 11008, 32000, 2048),
    "8b": _shape(4096, 32, 32, 8, 14336, 128256, 131072, rope_theta=500000.0),
    "70b": _shape(8192, 80, 64, 8, 28672, 32000, 4096),
}


def shape_of(model: str) -> LlamaConfig:
    """The shape that a name stands for: one of `SHAPES`, tiny, a folder, or a hub id, of which config.json alone is fetched.

    Raises: CheckpointError, HubError: see `resolve_model`.
    """
    if model in SHAPES:
        return LlamaConfig.from_dict(SHAPES[model])
    return LlamaConfig.from_json(resolve_model(model, weights=False))


def random_nf4(shape: tuple[int, int], generator: torch.Generator, blocksize: int = 64, double_quant: bool = True,
               dtype: torch.dtype = torch.bfloat16) -> NF4Tensor:
    """A 4-bit matrix of random codes under one constant, on the generator's device: made at once, without the weights that it
    would have come from."""
    n, on = shape[0] * shape[1], generator.device
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator, device=on)
    absmax = torch.full((-(-n // blocksize),), STD / CODE_STD, device=on)
    if not double_quant:
        return NF4Tensor(packed, torch.Size(shape), dtype, blocksize, stored_absmax=absmax)
    codes = torch.full((len(absmax),), 127, dtype=torch.uint8, device=on)       # index of 0: the offset alone
    nested = NestedAbsmax(codes, torch.ones(-(-len(codes) // NESTED_BLOCKSIZE), device=on), STD / CODE_STD)
    return NF4Tensor(packed, torch.Size(shape), dtype, blocksize, nested=nested)


def random_model(config: LlamaConfig, quantize: Literal["nf4"] | None = "nf4", dtype: torch.dtype = torch.bfloat16,
                 device: str | torch.device = "cpu", blocksize: int = 64, double_quant: bool = True, seed: int = 0
                 ) -> LlamaForCausalLM:
    """A model of random weights: what it computes means nothing, what it takes is what a real one takes.

    Args: as in `load_model`. seed: same seed, same weights, on the same kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    model = blank_model(config)
    for name, module in list(model.named_modules()):
        if quantize and isinstance(module, nn.Linear) and name.rpartition(".")[2] in ALL_LINEARS:
            weight = random_nf4((module.out_features, module.in_features), generator, blocksize, double_quant, dtype)
            bias = None if module.bias is None else torch.zeros(module.out_features, dtype=dtype)
            replace_module(model, name, NF4Linear(weight, bias).to(device))
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = torch.ones if isinstance(module, RMSNorm) else torch.empty
            filled = value(parameter.shape, dtype=dtype, device=device)
            if not isinstance(module, RMSNorm):
                filled.normal_(0.0, STD, generator=generator)
            setattr(module, key, nn.Parameter(filled))
    model.tie_weights()
    return model


def write_random_checkpoint(config: LlamaConfig, folder: Path, kind: Literal["safetensors", "bin"] = "safetensors",
                            shard_bytes: int = 1 << 30, seed: int = 0) -> int:
    """A 16-bit checkpoint of random weights in Hugging Face's layout, written shard by shard: config, index, weights.

    All weights are pieces of one list of 2²⁴ normal numbers: quantizing one takes what it takes with any others.

    Returns: bytes of the weights.
    """
    shapes = {name: parameter.shape for name, parameter in blank_model(config).named_parameters()}      # a tied head once
    pool = torch.empty(1 << 24).normal_(0.0, STD, generator=torch.Generator().manual_seed(seed)).bfloat16()
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, shape in shapes.items():
        if shards[-1] and 2 * math.prod(shape) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= 2 * math.prod(shape)
    folder.mkdir(parents=True, exist_ok=True)
    where = {}
    for number, names in enumerate(shards):
        count = f"{number + 1:05d}-of-{len(shards):05d}"
        tensors = {name: _piece(pool, shapes[name], 7919 * number + index) for index, name in enumerate(names)}
        if kind == "safetensors":
            file = f"model-{count}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
        else:
            file = f"pytorch_model-{count}.bin"
            torch.save(tensors, folder / file)
        where.update(dict.fromkeys(names, file))
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": where})
    write_json(folder / "config.json", {**config.raw, "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"})
    return total


def _piece(pool: Tensor, shape: torch.Size, offset: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=pool.dtype)
    numbers = math.prod(shape)
    start = offset * 4099 % len(pool)
    return pool.repeat(-(-(start + numbers) // len(pool)))[start : start + numbers].reshape(shape).clone()
