"""A tensor that lies in its file is the file's, whatever is done to it, and only a few lie in memory at a time."""
from __future__ import annotations

import errno
import gc
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minilora.errors import CheckpointError
from minilora.llama.mapped import let_go, read_early
from minilora.llama.safetensors_file import map_tensor, read_header, read_tensor
from minilora.llama.weights import WeightFiles
from tests.llama.model_folders import CONFIG, random_tensors, write_folder

PAGE = mmap.PAGESIZE


def some_file(folder: Path, rows: int = 3 * PAGE) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(7, generator=generator), "b": torch.randn(rows, 2, generator=generator).bfloat16(),
               "c": torch.randn(5, generator=generator).half(), "d": torch.randn(3, generator=generator).double()}
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors", tensors


def test_a_mapped_tensor_equals_the_one_that_is_read(tmp_path: Path) -> None:
    path, tensors = some_file(tmp_path)
    for key, entry in read_header(path).items():
        assert torch.equal(map_tensor(entry), tensors[key]) and torch.equal(read_tensor(entry), tensors[key]), key


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path, tensors = some_file(tmp_path)
    content = path.read_bytes()
    map_tensor(read_header(path)["b"]).zero_()
    assert path.read_bytes() == content
    assert torch.equal(map_tensor(read_header(path)["b"]), tensors["b"])


def test_numbers_that_begin_within_a_word_are_read(tmp_path: Path) -> None:
    path, tensors = some_file(tmp_path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    moved = tmp_path / "moved.safetensors"          # a header of an odd length: valid, though the library writes none
    moved.write_bytes((length + 1).to_bytes(8, "little") + path.read_bytes()[8 : 8 + length] + b" "
                      + path.read_bytes()[8 + length :])
    for key, entry in read_header(moved).items():
        found = map_tensor(entry)
        assert torch.equal(found, tensors[key]) and found.data_ptr() % found.dtype.itemsize == 0, key


def test_a_file_that_shrank_since_its_header_was_read_is_named(tmp_path: Path) -> None:
    path, _ = some_file(tmp_path)
    entry = read_header(path)["b"]
    with path.open("r+b") as file:
        file.truncate(entry.start + entry.nbytes - 1)
    for read in (map_tensor, read_tensor):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ends inside b"):
            read(entry)
    path.unlink()
    for read in (map_tensor, read_tensor):
        with pytest.raises(CheckpointError, match=r"cannot be read \(No such file"):
            read(entry)


def test_a_file_system_without_maps_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tensors = some_file(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert torch.equal(map_tensor(read_header(path)["b"]), tensors["b"])


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_what_is_borrowed_stays_whole_while_others_are(tmp_path: Path, layout: str) -> None:
    tensors = random_tensors(CONFIG)
    weights = WeightFiles(write_folder(tmp_path, CONFIG, tensors, layout))
    lent = {key: weights.borrow(key) for key in tensors}
    kept = {key: weights.read(key) for key in tensors}
    for key, tensor in tensors.items():
        assert torch.equal(lent[key], tensor) and torch.equal(kept[key], tensor), key
        assert kept[key].data_ptr() != lent[key].data_ptr(), key
    weights.close()


def resident(name: str) -> int:
    """Bytes of a mapped file that count as this process's memory."""
    found = 0
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if name in block.splitlines()[0]:
            found += 1024 * int(re.search(r"^Rss:\s+(\d+)", block, re.MULTILINE)[1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_that_were_let_go_are_not_this_processs_any_more(tmp_path: Path) -> None:
    path, tensors = some_file(tmp_path, 100 * PAGE)
    mapped = map_tensor(read_header(path)["b"])
    read_early(mapped)
    assert torch.equal(mapped, tensors["b"]) and resident(path.name) >= 390 * PAGE
    let_go(mapped)
    assert resident(path.name) <= 20 * PAGE
    assert torch.equal(mapped, tensors["b"])
    del mapped
    gc.collect()
    assert resident(path.name) <= 2 * PAGE, "what the library that checked the header may still hold"
