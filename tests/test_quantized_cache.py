"""The 4-bit copy beside a model: the same bits, read instead of the weights, made again when these have changed."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minilora import load_model
from minilora.hub import resolve_model
from minilora.llama import checkpoint
from minilora.llama.model import LlamaForCausalLM
from minilora.quantized_cache import cache_folder
from tests.models import write_model


def bits(model: LlamaForCausalLM) -> dict[str, bytes]:
    found = {name: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
             for name, tensor in model.state_dict().items()}
    assert any("absmax" in name for name in found), sorted(found)
    return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that weights were read from."""
    folders: list[Path] = []
    files = checkpoint.WeightFiles

    class Noting(files):            # type: ignore[valid-type, misc]
        def __init__(self, folder: Path) -> None:
            folders.append(folder)
            super().__init__(folder)

    monkeypatch.setattr(checkpoint, "WeightFiles", Noting)
    return folders


@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"blocksize": 128}, {"dtype": torch.float32}])
def test_the_copy_has_the_bits_of_quantizing_anew(tmp_path: Path, read: list[Path], options: dict[str, object]) -> None:
    folder = write_model(tmp_path / "model")
    plain = bits(load_model(folder, **options))         # type: ignore[arg-type]
    first = bits(load_model(folder, cache=True, **options))         # type: ignore[arg-type]
    second = bits(load_model(folder, cache=True, **options))        # type: ignore[arg-type]
    assert plain == first == second
    assert read[:2] == [folder, folder] and read[2].parent == tmp_path and read[2].name.startswith("model.nf4-")


def test_settings_that_change_the_bits_have_copies_of_their_own(tmp_path: Path) -> None:
    named = {cache_folder(tmp_path / "model", double, blocksize, dtype, pad) for double in (True, False)
             for blocksize in (64, 128) for dtype in (torch.bfloat16, torch.float16) for pad in (True, False)}
    assert len(named) == 16


def test_changed_weights_make_the_copy_anew(tmp_path: Path, read: list[Path]) -> None:
    folder = write_model(tmp_path / "model", seed=0)
    before = bits(load_model(folder, cache=True))
    write_model(folder, seed=1)
    after = bits(load_model(folder, cache=True))
    assert before != after == bits(load_model(folder))
    assert bits(load_model(folder, cache=True)) == after
    assert read[1] == folder and read[-1] != folder


def test_a_copy_has_the_end_tokens_that_came_later(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    load_model(folder, cache=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    for _ in range(2):
        assert 7 in load_model(folder, cache=True).config.raw["eos_token_id"]


def test_in_the_hubs_cache_the_copy_lies_in_the_repositorys_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "models--a--b" / "snapshots" / ("c" * 40))
    load_model(folder, cache=True)
    copy, = (tmp_path / "models--a--b" / "minilora").iterdir()
    assert copy.name.startswith("c" * 40 + ".nf4-")
    assert [path.name for path in (tmp_path / "models--a--b" / "snapshots").iterdir()] == ["c" * 40]


def test_a_copy_that_was_cut_off_is_no_copy(tmp_path: Path, read: list[Path]) -> None:
    folder = write_model(tmp_path / "model")
    load_model(folder, cache=True)
    copy, = tmp_path.glob("model.nf4-*")
    (copy / "source.json").write_text('{"config.json": [1')
    load_model(folder, cache=True)
    load_model(folder, cache=True)
    assert read == [folder, folder, copy]


def test_a_copy_that_was_damaged_is_made_anew(tmp_path: Path, read: list[Path]) -> None:
    folder = write_model(tmp_path / "model")
    first = bits(load_model(folder, cache=True))
    copy, = (path for path in tmp_path.iterdir() if path != folder)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="copy is damaged and made anew"):
        assert bits(load_model(folder, cache=True)) == first
    read.clear()
    assert bits(load_model(folder, cache=True)) == first and read == [copy]


def test_a_copy_that_cannot_be_kept_is_a_warning(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "models--a--b" / "snapshots" / ("c" * 40))
    (tmp_path / "models--a--b" / "minilora").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="not kept"):
        model = load_model(folder, cache=True)
    assert bits(model) == bits(load_model(folder))


def test_the_model_that_ships_gets_no_copy_in_the_package() -> None:
    load_model("tiny", cache=True)
    load_model(resolve_model("tiny"), cache=True)
    assert [path.name for path in resolve_model("tiny").parent.iterdir() if ".nf4-" in path.name] == []


def test_dense_loading_keeps_no_copy(tmp_path: Path) -> None:
    load_model(write_model(tmp_path / "model"), quantize=None, cache=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
