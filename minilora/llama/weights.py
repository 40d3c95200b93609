"""The tensors of a model folder, whatever files they lie in, read one at a time.

    model.safetensors | model.safetensors.index.json + shards      preferred where both kinds exist
    pytorch_model.bin | pytorch_model.bin.index.json + shards      pickled; read with weights_only, so no code runs

`WeightFiles` knows every key, shape and type before any data is read, so a folder that does not fit is refused before it
takes memory.  The order of an index file means nothing: tensors are found by key.

Lesson 09 explains it.
"""
from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.errors import CheckpointError
from minilora.llama.mapped import let_go, read_early
from minilora.llama.safetensors_file import LONGEST_KEY, TensorEntry, map_tensor, read_header, read_tensor
from minilora.llama.strict_json import read_object

KINDS = (("model.safetensors", "model.safetensors.index.json", "model*-of-*.safetensors"),
         ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*-of-*.bin"))


def shard_path(folder: Path, name: object, named_by: str) -> Path:
    """A shard's path, kept inside the folder.

    Args:
        folder: of the model. name: as the index gives it. named_by: the index, for the error.

    Raises: CheckpointError: not a plain file name, a link that leaves the folder, or no such file.
    Note: the Hugging Face cache's links (snapshots/<revision>/file -> ../../blobs/<hash>) are followed, no others.
    """
    if not isinstance(name, str) or not 0 < len(name) < 256 or name in (".", "..") or re.search(r"[/\\\x00]", name):
        raise CheckpointError(f"{named_by}: shard {name!r:.80} is not a plain file name; shards must lie beside their index")
    path = folder / name
    try:
        there = path.exists()
    except (OSError, ValueError):           # a name that the disk cannot have: too long, or no text
        there = False
    if not there:
        raise CheckpointError(f"{path}: missing, though {named_by} names it; fetch the shard and put it there")
    if path.is_symlink():
        root = folder.resolve()
        target = Path(os.path.normpath(root / os.readlink(path)))
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
        if target.parent != blobs and not path.resolve().is_relative_to(root):
            raise CheckpointError(f"{path}: is a link that leaves the model's folder; copy the file here instead")
    if not path.is_file():                  # a pipe would keep its reader waiting
        raise CheckpointError(f"{path}: is no regular file; fetch it again")
    return path


def _shards(folder: Path, index: str) -> tuple[list[Path], dict[str, Path]]:
    """The files an index names, and its key -> file."""
    weight_map = read_object(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index}: no weight_map; fetch the index again")
    files: dict[str, Path] = {}
    longest = max(weight_map, key=len)
    if len(longest) > LONGEST_KEY:
        raise CheckpointError(f"{folder / index}: a tensor's name has {len(longest):,} characters; fetch the index again")
    for name in weight_map.values():
        if not isinstance(name, str) or name not in files:
            files[name] = shard_path(folder, name, str(folder / index))
    return sorted(files.values()), {key: files[name] for key, name in weight_map.items()}


def find_weights(folder: Path) -> tuple[str, list[Path], dict[str, Path] | None]:
    """Which files hold the weights: (the file that says so, weight files, the index's key -> file or None).

    Raises: CheckpointError: none, an index that is missing or wrong, or a shard that is missing.
    """
    for single, index, _ in KINDS:
        if (folder / single).exists() or (folder / single).is_symlink():
            return single, [shard_path(folder, single, "a broken link")], None
        if (folder / index).exists():
            return index, *_shards(folder, index)
    for _, index, pattern in KINDS:
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            raise CheckpointError(f"{folder}: has shards ({found[0]} …) but no {index}; fetch the index as well")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: holds an adapter and no model; pass it with --adapter and its base with --model")
    raise CheckpointError(f"{folder}: no weights: neither model.safetensors nor pytorch_model.bin, nor an index of shards")


def _load_bin(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Unpickle a .bin file's tensors: (key -> tensor, whether they are mapped from the file)."""
    try:
        mapped = zipfile.is_zipfile(path)       # the format since torch 1.6; older files cannot be mapped
        if mapped:
            _refuse_compressed(path)
        if not mapped and path.open("rb").read(4) == b"PK\x03\x04":
            raise CheckpointError(f"{path}: cut short (its table of contents, which stands last, is missing); fetch it again")
        content: Any = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise CheckpointError(f"{path}: refused: it holds Python code ({code[1]:.80}), not only tensors, and none of it "
                                  "was run; use a safetensors copy from a source you trust") from error
        raise CheckpointError(f"{path}: not a file of tensors, or cut short; fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError, MemoryError, OverflowError,
            AssertionError, NotImplementedError, zipfile.BadZipFile, struct.error, RecursionError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{path}: not a whole .bin file ({detail}); fetch it again") from error
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise CheckpointError(f"{path}: must hold a flat dictionary of tensors, as Hugging Face writes it; found another form")
    for key, value in content.items():
        if len(key) > LONGEST_KEY:
            raise CheckpointError(f"{path}: a tensor's name has {len(key):,} characters; fetch the file again")
        if not _is_plain(value):
            raise CheckpointError(f"{path}: {key}: is no plain tensor, or has more elements than the file has bytes for; save "
                                  "it again as contiguous")
    return {key: value.detach() for key, value in content.items()}, mapped


def _refuse_compressed(path: Path) -> None:
    """torch stores its records as they are; a compressed one may grow a thousandfold when it is read."""
    with zipfile.ZipFile(path) as archive:
        packed = next((entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise CheckpointError(f"{path}: refused: its record {packed.filename!r:.80} is compressed, which torch never does; "
                              "fetch it again from a source you trust")


def _is_plain(tensor: Tensor) -> bool:
    """Whether each element has its own bytes in the file.

    Trap: a pickle may also make tensors that are sparse, quantized or without memory, and with a stride of 0 one of a
    terabyte out of four bytes.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    if tensor.is_nested or tensor.is_quantized or tensor.is_complex() or tensor.is_neg():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


class WeightFiles:
    """Every tensor of a model folder, by key.

    Args:
        folder: of the model.

    Attributes:
        entries: key -> `TensorEntry` (shape, type, file), complete before any data is read.

    Raises: CheckpointError: as `find_weights`; a file cut short; a key in two files, or not where the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.source, files, index = find_weights(folder)
        self.entries: dict[str, TensorEntry] = {}
        self._bin: tuple[Path, dict[str, Tensor], bool] | None = None
        self._lent: deque[Tensor] = deque()
        for file in files:
            for key, entry in (self._bin_header(file) if file.suffix == ".bin" else read_header(file)).items():
                if key in self.entries:
                    raise CheckpointError(f"{key}: stands in {self.entries[key].file.name} and in {file.name} of {folder}; "
                                          "remove one of them")
                self.entries[key] = entry
        for key, file in (index or {}).items():
            if key not in self.entries or self.entries[key].file != file:
                raise CheckpointError(f"{folder / self.source}: says that {key} is in {file.name}, but it is not; fetch the "
                                      "index and the shard of one upload")

    def _bin_header(self, file: Path) -> dict[str, TensorEntry]:
        tensors = self._open_bin(file)
        return {key: TensorEntry(key, file, str(tensor.dtype).removeprefix("torch."), tensor.dtype, tuple(tensor.shape), order,
                                 tensor.numel() * tensor.dtype.itemsize)
                for order, (key, tensor) in enumerate(tensors.items())}

    def _open_bin(self, file: Path) -> dict[str, Tensor]:
        if self._bin is None or self._bin[0] != file:
            self._bin = None                # one shard at a time
            self._bin = (file, *_load_bin(file))
        return self._bin[1]

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own."""
        entry = self.entries[key]
        if entry.file.suffix != ".bin":
            return read_tensor(entry)
        lent = self.borrow(key)
        kept = lent.new_empty(entry.nbytes, dtype=torch.uint8).view(lent.dtype).view(lent.shape)
        if lent.is_contiguous():
            # NumPy copies in this thread alone, and lets others run; torch's copy would take a team (see `ahead`).
            kept.view(-1).view(torch.uint8).numpy()[:] = lent.view(-1).view(torch.uint8).numpy()
        else:
            kept.copy_(lent)
        return kept

    def borrow(self, key: str) -> Tensor:
        """One tensor as it lies in its file: for what is quantized or converted, and not kept.

        It stays whole, but of a .bin file the pages of the last two alone are kept in memory.
        """
        entry = self.entries[key]
        if entry.file.suffix != ".bin":
            return map_tensor(entry)
        tensor = self._open_bin(entry.file)[key]
        if self._bin is not None and self._bin[2]:
            if len(self._lent) == 2:
                let_go(self._lent.popleft())
            self._lent.append(tensor)
            read_early(tensor)
        return tensor

    def place(self, key: str) -> str:
        """`key` and its file, for an error message."""
        return f"{self.entries[key].file}: {key}"

    def close(self) -> None:
        """Release the open shard."""
        self._bin = None
        self._lent.clear()
