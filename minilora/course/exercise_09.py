"""Exercise 09: the header of a safetensors file, and the memory that reading and quantizing tensor by tensor takes."""
from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from minilora.course.grading import Mistake, Task
from minilora.llama.safetensors_file import read_header

Places = dict[str, tuple[int, int]]
BITS = 4.127


def _package(file: bytes) -> Places:
    """The package reads from a path: the bytes go into one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(file)
        return {key: (entry.start, entry.start + entry.nbytes) for key, entry in read_header(path).items()}


def _places(answer: Callable[[bytes], Any], file: bytes) -> dict[str, Any]:
    """Places by key in one order, with what does not belong there."""
    found = answer(file)
    return {"keys": sorted(found), **{key: [int(end) for end in found[key]] for key in sorted(found) if key != "__metadata__"}}


def _shifted(by: Callable[[int], int], metadata: bool = False) -> Callable[[bytes], Any]:
    def read(file: bytes) -> dict[str, Any]:
        length = int.from_bytes(file[:8], "little")
        header = json.loads(file[8 : 8 + length])
        return {key: (0, 0) if key == "__metadata__" else tuple(by(length) + at for at in value["data_offsets"])
                for key, value in header.items() if metadata or key != "__metadata__"}
    return read


def _lengths(file: bytes) -> Places:
    return {key: (start, stop - start) for key, (start, stop) in _package(file).items()}


def _draw(generator: torch.Generator) -> tuple[bytes]:
    sizes = torch.randint(1, 9, (3, 2), generator=generator).tolist()
    tensors = {f"layers.{index}.weight": torch.zeros(size) for index, size in enumerate(sizes)}
    return (save(tensors, metadata={"format": "pt"}),)


def _peak(sizes: Sequence[int]) -> float:
    """16-bit bytes of the tensor in hand, its 4-bit form, and those made before."""
    return max(sizes[at] + sum(sizes[: at + 1]) * BITS / 16 for at in range(len(sizes)))


def _draw_sizes(generator: torch.Generator) -> tuple[list[int]]:
    return (torch.randint(100, 1000, (6,), generator=generator).tolist(),)


TASKS = (
    Task("tensor_places", _package, fixed=(), random=_draw, probe=_places, mistakes=(
        Mistake("offsets count from the end of the header: add 8 bytes of length and the header itself",
                _shifted(lambda length: 0)),
        Mistake("you added the header, but not the 8 bytes in front of it", _shifted(lambda length: length)),
        Mistake("you added the 8 bytes, but not the header that follows them", _shifted(lambda length: 8)),
        Mistake("__metadata__ is no tensor", _shifted(lambda length: 8 + length, metadata=True)),
        Mistake("the second number is the tensor's length: return where it stops", _lengths))),
    Task("streaming_peak", _peak, fixed=(([100, 100, 100],), ([800, 100],)), random=_draw_sizes, mistakes=(
        Mistake("that is the whole model in 16 bits: one tensor at a time is in hand", lambda sizes: float(sum(sizes))),
        Mistake("that is the result alone: while a tensor is quantized, its 16-bit form is there too",
                lambda sizes: sum(sizes) * BITS / 16),
        Mistake("that is the largest tensor alone: what was quantized before stays in memory", lambda sizes: float(max(sizes))),
        Mistake("the largest tensor need not come last: take the maximum over all moments, not the sum of both maxima",
                lambda sizes: max(sizes) + sum(sizes) * BITS / 16),
        Mistake("a tensor's 4-bit form is made while its 16-bit form is there: count both",
                lambda sizes: max(sizes[at] + sum(sizes[:at]) * BITS / 16 for at in range(len(sizes)))))),
)
