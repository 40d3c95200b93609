"""From a model's name to a model that is ready to run or train."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from minilora.adapters import load_adapter, read_adapter_config
from minilora.errors import CheckpointError, ConfigError
from minilora.hub import resolve_model
from minilora.llama.bnb_format import LARGEST_BLOCK
from minilora.llama.checkpoint import load_checkpoint
from minilora.llama.config import LlamaConfig, linear_parameters, num_parameters
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.tokenizer import Tokenizer, read_tokenizer
from minilora.own_base import own_base
from minilora.quantized_cache import load_through_cache

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the GPU where there is one, else the CPU.

    Raises: ConfigError: an unknown device, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but no CUDA GPU is available here; use --device cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type; "auto" is bfloat16 where the hardware multiplies it, else float32.

    A CPU without AVX-512 has no 16-bit products: they are made in float32 there (`layers.dense`), and float32
    from the start is a tenth faster, and exact.

    Raises: ConfigError: an unknown name.
    """
    if name == "auto":
        fast = device.type == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def total_memory(device: torch.device) -> int:
    """Bytes of memory that there are for a process: the GPU's; the machine's with its swap, or what its container may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):
        return 1 << 62              # not told on this system: nothing is refused
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists():
        swap = next((line for line in meminfo.read_text().splitlines() if line.startswith("SwapTotal:")), "SwapTotal: 0 kB")
        found += int(swap.split()[1]) * 1024
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return min(found, int(allowed)) if allowed.isdigit() else found


def check_memory(folder: Path, quantize: Literal["nf4"] | None, double_quant: bool, blocksize: int, dtype: torch.dtype,
                 device: torch.device) -> None:
    """Refuse a model whose weights alone would not fit, by config.json, before any of them is read.

    Raises: CheckpointError: names what it needs and what there is.
    """
    config = LlamaConfig.from_json(folder / "config.json")
    linears = linear_parameters(config)
    bits = 4 + (8 + 32 / 256 if double_quant else 32) / blocksize if quantize else 8 * dtype.itemsize
    needed = linears * bits / 8 + (num_parameters(config) - linears) * dtype.itemsize
    total = total_memory(device)
    if needed > total:
        raise CheckpointError(f"{folder}: by its config.json the weights take {needed / 1e9:,.1f} GB, and there are "
                              f"{total / 1e9:,.1f} GB of memory here; {'' if quantize else 'quantize it (--quantize nf4), or '}"
                              "use a smaller model or a larger machine")


def load_model(path_or_hub_id: str | Path, quantize: Literal["nf4"] | None = "nf4", double_quant: bool = True,
               dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu", adapter: str | Path | None = None,
               blocksize: int = 64, pad_vocab: bool = False, revision: str | None = None, progress: bool = False,
               cache: bool = False) -> LlamaForCausalLM:
    """Load a Llama-family model, quantizing while reading, with or without an adapter.

    Args:
        path_or_hub_id: "tiny" (ships with the package), a folder in Hugging Face's layout, or a hub id.
        quantize: "nf4" keeps the linears of the blocks in 4 bits; None keeps all in `dtype`.
        double_quant, blocksize: how to quantize; a folder that is 4-bit already says so itself.
        dtype: of embeddings, norms and head, and of the arithmetic. device: where it goes, as `pick_device` reads it.
        adapter: folder of a PEFT adapter to attach; one that brings its own base (PiSSA, LoftQ) is put over that.
        pad_vocab: fill a table that has fewer rows than config.json says with its mean row.
        revision: branch, tag or commit on the hub.
        cache: keep a 4-bit copy beside the model, and read that the next time (`quantized_cache`).

    Returns: the model in eval mode; with an adapter, its LoRA parameters are trainable.
    Raises: CheckpointError, HubError, ConfigError: see the modules that do the work; ConfigError: an argument.
    """
    if quantize not in (None, "nf4"):
        raise ConfigError(f"quantize must be 'nf4' or None, not {quantize!r}")
    if dtype not in (*DTYPES.values(), torch.float64):
        raise ConfigError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, not {dtype!r}")
    if isinstance(blocksize, bool) or not isinstance(blocksize, int) or not 1 <= blocksize <= LARGEST_BLOCK:
        raise ConfigError(f"blocksize must be a positive whole number of weights, up to {LARGEST_BLOCK:,}, not {blocksize!r}")
    device = pick_device(str(device))
    if adapter is not None:
        read_adapter_config(adapter)        # a bad one is refused before gigabytes are read
    own = own_base(adapter) if adapter is not None else None
    folder = own or resolve_model(path_or_hub_id, revision=revision, progress=progress)
    check_memory(folder, quantize, double_quant, blocksize, dtype, device)
    if cache and quantize == "nf4" and own is None and folder != resolve_model("tiny"):
        model = load_through_cache(folder, double_quant, blocksize, dtype, device, pad_vocab, progress)
    else:
        model = load_checkpoint(folder, quantize=quantize, double_quant=double_quant, blocksize=blocksize, dtype=dtype,
                                device=device, pad_vocab=pad_vocab, progress=progress)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()


def load_tokenizer(path_or_hub_id: str | Path) -> Tokenizer:
    """Load the tokenizer of a model or of a run.

    Args:
        path_or_hub_id: "tiny", a folder, one tokenizer.json or tokenizer.model file, or a hub id.

    Raises: CheckpointError: no tokenizer there, or a broken one. HubError: the hub id cannot be turned into files.
    """
    path = Path(path_or_hub_id).expanduser()
    return read_tokenizer(path if path.exists() else resolve_model(path_or_hub_id))
