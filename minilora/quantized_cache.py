"""A 4-bit copy of a model beside it, so that the next run reads 4 GB where the first read and quantized 13.5.

    models/llama/                                      models/llama.nf4-64-double-bfloat16/
    (hub) models--a--b/snapshots/COMMIT/               models--a--b/minilora/COMMIT.nf4-64-double-bfloat16/

The copy is a 4-bit checkpoint like any other, and gives the bits of quantizing anew.  Its `source.json` says what it was made
from (name, size and time of each file): where that has changed, it is made again.  In the hub's cache it lies in the folder of
the repository, so that removing the repository removes it.
"""
from __future__ import annotations

import warnings
from pathlib import Path

import torch

from minilora.errors import CheckpointError, OutputError
from minilora.files import Kind, new_folder, write_json
from minilora.llama.bnb_format import save_quantized
from minilora.llama.checkpoint import load_checkpoint
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.strict_json import read_object

SOURCE_FILE = "source.json"
MADE_FROM = ("config.json", "generation_config.json", "*.safetensors", "*.bin", "*.index.json")


def cache_folder(folder: Path, double_quant: bool, blocksize: int, dtype: torch.dtype, pad_vocab: bool) -> Path:
    """Where the 4-bit copy of a model folder lies; what makes its bits differ is in its name."""
    name = f"{folder.name}.nf4-{blocksize}{'-double' if double_quant else ''}-{str(dtype).removeprefix('torch.')}"
    beside = folder.parent.parent / "minilora" if folder.parent.name == "snapshots" else folder.parent
    return beside / (name + ("-padded" if pad_vocab else ""))


def made_from(folder: Path) -> dict[str, list[int]]:
    """Size and time of last change of every file that the weights depend on."""
    files = {path.name: path.stat() for pattern in MADE_FROM for path in sorted(folder.glob(pattern))}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in files.items()}


def load_through_cache(folder: Path, double_quant: bool, blocksize: int, dtype: torch.dtype, device: torch.device,
                       pad_vocab: bool, progress: bool) -> LlamaForCausalLM:
    """Load a model in 4 bits: from its copy, or from its weights, leaving a copy for the next time.

    Args: as of `load_checkpoint`.

    Raises: CheckpointError: see `load_checkpoint`. A copy that cannot be written is a warning: the model is there.
    Guarantee: the same bits with and without the copy (tests/test_quantized_cache.py).
    """
    folder = folder.absolute()
    copy = cache_folder(folder, double_quant, blocksize, dtype, pad_vocab)
    if _is_current(copy, folder):
        try:
            return load_checkpoint(copy, dtype=dtype, device=device, progress=progress)
        except CheckpointError as error:
            warnings.warn(f"--cache: the 4-bit copy is damaged and made anew ({error})", stacklevel=2)
    model = load_checkpoint(folder, double_quant=double_quant, blocksize=blocksize, dtype=dtype, device=device,
                            pad_vocab=pad_vocab, progress=progress)
    if read_object(folder / "config.json").get("quantization_config"):
        return model            # is 4-bit itself
    try:
        with new_folder(copy, overwrite=True, kind=Kind(SOURCE_FILE)) as temporary:
            save_quantized(model, temporary)
            write_json(temporary / SOURCE_FILE, made_from(folder))
    except OutputError as error:
        warnings.warn(f"--cache: the 4-bit copy was not kept, the run goes on without it ({error})", stacklevel=2)
    return model


def _is_current(copy: Path, folder: Path) -> bool:
    try:
        return read_object(copy / SOURCE_FILE) == made_from(folder)
    except (CheckpointError, OSError):
        return False
