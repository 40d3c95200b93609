"""The safetensors format, read and written one tensor at a time.

    8 bytes      length of the header, little-endian
    header       JSON: {"key": {"dtype": "BF16", "shape": [out, in], "data_offsets": [from, to]}, ...}, padded with spaces
    data         the tensors' bytes

The library checks the header (sizes, overlaps, a file cut short).  Data that is kept is read into memory of its own; data that
is only looked at once, to be quantized or converted, is mapped, a tensor at a time: a map of the whole file would count every
page it touched as this process's memory, and a 13 GB checkpoint must pass through a few MB.  Writing is streamed for the same
reason: the library's `save_file` wants all tensors at once.

Source: the format's description at github.com/huggingface/safetensors.

Lesson 09 explains it.
"""
from __future__ import annotations

import errno
import json
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.errors import CheckpointError, OutputError
from minilora.files import atomic_path
from minilora.llama.mapped import read_early
from minilora.llama.strict_json import parse_object

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 16 << 20       # bytes: 150,000 tensors in one file; the library would read 100 MB into a gigabyte
LONGEST_KEY = 512               # characters of a tensor's name, which messages quote


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` is its first byte in `file`; `dtype` is None for a type torch has no name for here."""

    key: str
    file: Path
    dtype_name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file, in no promised order; no tensor data is read.

    Raises: CheckpointError: unreadable, not safetensors, cut short, or with a header that no model has.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is no regular file; fetch it again")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise CheckpointError(f"{path}: not a safetensors file, or not a model's: its header would take {length:,} bytes; "
                                  "fetch it again")
        with safe_open(path, framework="pt"):       # the library's checks, all of them, on the header and the file's size
            pass
        with path.open("rb") as file:
            file.seek(8)
            header = parse_object(file.read(length), str(path))
    except SafetensorError as error:
        detail = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: not a whole safetensors file, probably a download cut short ({detail}); fetch it "
                              "again") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    entries = {}
    for key, value in header.items():
        if len(key) > LONGEST_KEY:
            raise CheckpointError(f"{path}: a tensor's name has {len(key):,} characters; fetch the file again")
        if key != "__metadata__":
            if not isinstance(value["dtype"], str):     # Trap: the library also takes {"F32": null}
                raise CheckpointError(f"{path}: {key} has the type {value['dtype']!r:.60}, which is none; fetch the file again")
            start, end = value["data_offsets"]
            entries[key] = TensorEntry(key, path, value["dtype"], DTYPES.get(value["dtype"]), tuple(value["shape"]),
                                       8 + length + start, end - start)
    return entries


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read one tensor into memory of its own.

    Args: entry: from `read_header`.
    Returns: a tensor of the entry's shape and dtype.
    Raises: CheckpointError: a type this loader cannot read, or the file shrank since its header was read.
    """
    dtype = _known_type(entry)
    raw = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
    view = raw.numpy().data
    try:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < entry.nbytes:              # Trap: one read call returns 2 GiB at most
                count = file.readinto(view[done:])
                if not count:
                    raise _cut_short(entry)
                done += count
    except OSError as error:
        raise _unreadable(entry.file, error) from error
    return raw.view(dtype).view(entry.shape)


def map_tensor(entry: TensorEntry) -> Tensor:
    """One tensor as it lies in its file, mapped; its bytes are on their way into memory (`mapped` says why).

    Returns: a tensor of the entry's shape and dtype; its pages are let go with it, and writing to it leaves the file alone.
    Raises: CheckpointError: as `read_tensor`.  Trap: behind that, a disk that fails ends the process.
    """
    dtype = _known_type(entry)
    if not entry.nbytes or entry.start % dtype.itemsize:            # nothing, or numbers that would lie across words
        return read_tensor(entry)
    before = entry.start % mmap.ALLOCATIONGRANULARITY               # where a map may start
    try:
        with entry.file.open("rb") as file:
            pages = mmap.mmap(file.fileno(), before + entry.nbytes, access=mmap.ACCESS_COPY, offset=entry.start - before)
        raw = torch.frombuffer(pages, dtype=torch.uint8, offset=before)
    except ValueError as error:                                     # mmap: longer than the file
        raise _cut_short(entry) from error
    except OSError as error:
        if error.errno == errno.ENODEV:                             # a file system without maps
            return read_tensor(entry)
        raise _unreadable(entry.file, error) from error
    read_early(raw)
    return raw.view(dtype).view(entry.shape)


def _known_type(entry: TensorEntry) -> torch.dtype:
    if entry.dtype is None:
        raise CheckpointError(f"{entry.file}: {entry.key} has type {entry.dtype_name}, which this loader cannot read")
    return entry.dtype


def _cut_short(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(f"{entry.file}: ends inside {entry.key}; it changed while it was read")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror or error})")


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: its description, and how to make it when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of data in the file."""
        return prod(self.shape) * self.dtype.itemsize


def open_output(folder: Path, keep: tuple[str, ...]) -> None:
    """Make `folder`, and remove weights of an earlier save that a loader would prefer to the ones about to be written.

    Args:
        keep: file names that are about to be replaced.

    Raises: OutputError: the folder cannot be made or changed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in {"model.safetensors", "model.safetensors.index.json"} - set(keep):
            (folder / stale).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; check the path and its permissions") from error


def write_safetensors(path: Path, tensors: Iterable[Pending], done: Callable[[int], object] | None = None) -> None:
    """Write a safetensors file, atomically, making and releasing one tensor at a time.

    Args:
        path: the file. tensors: what to write; keys are distinct. done: called with the bytes of each tensor written.

    Guarantee: the same tensors give the same bytes, and the library reads them (tests/llama/test_checkpoint.py).
    Raises: OutputError: the folder is missing, read-only or full.
    """
    # Widest type first, as the library does: every tensor then starts on a multiple of its item size.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.key))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        header[tensor.key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                              "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            value = tensor.make().detach().to(device="cpu", dtype=tensor.dtype).contiguous()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
            if done is not None:
                done(tensor.nbytes)
