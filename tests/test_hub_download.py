"""The real huggingface-hub against a server on loopback: fetched, broken off and gone on with, refused, wrong, pinned."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from minilora.errors import HubError
from minilora.hub import _check_hashes, resolve_model
from tests.hub_server import Repository, files_of, serving
from tests.models import write_model

ID = "some-lab/model-7b"
TOKEN, OTHER = "hf_rightRIGHTright", "hf_otherOTHERother"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    files = files_of(write_model(tmp_path / "source"))
    files |= {"pytorch_model.bin": b"the same, a second time", "consolidated.safetensors": b"and a third"}
    with serving(Repository(ID, files)) as repository:
        use(repository, monkeypatch, tmp_path / "cache")
        yield repository


def use(repository: Repository, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HOME set when huggingface-hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", repository.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        repository.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def refused(revision: str | None = None) -> str:
    with pytest.raises(HubError) as caught:
        resolve_model(ID, revision=revision, progress=False)
    text = str(caught.value)
    assert "\n" not in text and TOKEN not in text and OTHER not in text, text
    return text


def test_what_is_needed_is_fetched_once_and_nothing_else(hub: Repository) -> None:
    folder = resolve_model(ID, progress=False)
    present = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert present == {name: content for name, content in hub.files.items()
                       if name not in ("pytorch_model.bin", "consolidated.safetensors")}
    assert all(hub.gets(name) == [0] for name in present)
    assert resolve_model(ID, progress=False) == folder
    assert all(hub.gets(name) == [0] for name in present)


def test_bin_files_are_fetched_where_there_are_no_safetensors(hub: Repository) -> None:
    del hub.files[WEIGHTS]
    folder = resolve_model(ID, progress=False)
    assert (folder / "pytorch_model.bin").read_bytes() == hub.files["pytorch_model.bin"]
    assert not list(folder.glob("*.safetensors"))


def test_a_connection_that_breaks_goes_on_where_it_broke(hub: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 400)      # what is kept is whole chunks, else of 10 MB
    hub.breaks[WEIGHTS] = 1000
    folder = resolve_model(ID, progress=False)
    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert hub.gets(WEIGHTS) == [0, 800]


def test_a_download_that_was_stopped_keeps_the_files_that_had_come(hub: Repository) -> None:
    content = hub.files.pop(WEIGHTS)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    hub.files |= {first: content[:5000], second: content[5000:]}
    hub.fails.add(second)
    text = refused()
    assert "503" in text and "try again" in text
    hub.fails.clear()
    already = {name for name in hub.files if len(hub.gets(name)) == 1 and name != second}
    folder = resolve_model(ID, progress=False)
    assert b"".join((folder / name).read_bytes() for name in (first, second)) == content
    assert first in already and hub.gets(first) == [0] and hub.gets(second) == [0, 0]


def test_a_gated_repository_says_where_access_is_asked_for(hub: Repository) -> None:
    hub.token = TOKEN
    text = refused()
    assert "gated" in text and f"https://huggingface.co/{ID}" in text and "set HF_TOKEN" in text


def test_a_token_without_access_is_told_from_none(hub: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token, hub.denied = TOKEN, OTHER
    monkeypatch.setenv("HF_TOKEN", OTHER)
    text = refused()
    assert "gated" in text and "granted access" in text and f"https://huggingface.co/{ID}" in text


def test_a_token_that_the_hub_does_not_know_says_so(hub: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", OTHER)
    assert "does not know the token" in refused()


def test_the_right_token_opens_a_gated_repository(hub: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (resolve_model(ID, progress=False) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_a_repository_that_is_not_there_says_so(hub: Repository) -> None:
    hub.id = "some-lab/another"
    assert "no such repository" in refused()


def test_a_revision_is_pinned_or_said_to_be_missing(hub: Repository) -> None:
    hub.commits["v1"] = "b" * 40
    assert resolve_model(ID, revision="v1", progress=False).name == "b" * 40
    assert resolve_model(ID, revision="a" * 40, progress=False).name == "a" * 40
    assert "no revision 'v2'" in refused("v2")
    assert resolve_model(f"{ID}@v1", progress=False).name == "b" * 40
    with pytest.raises(HubError, match="give one of them"):
        resolve_model(f"{ID}@v1", revision="main")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_file_whose_hash_is_wrong_is_refused_removed_and_fetched_again(hub: Repository, name: str) -> None:
    hub.spoiled.add(name)
    text = refused()
    assert name in text and "hash" in text and "again" in text
    assert (resolve_model(ID, progress=False) / name).read_bytes() == hub.files[name]
    assert hub.gets(name) == [0, 0]


def test_a_blob_that_lies_in_a_store_shared_by_repositories_is_checked_by_its_own_name(tmp_path: Path) -> None:
    content = b"weights"
    stored = tmp_path / "shared" / ("e" * 64)                                   # there, files are named by another hash
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    link = tmp_path / "snapshots" / WEIGHTS
    for path in (stored, blob, link):
        path.parent.mkdir()
    stored.write_bytes(content)
    blob.symlink_to(stored)
    link.symlink_to(Path("..") / "blobs" / blob.name)
    _check_hashes(ID, link.parent, [WEIGHTS], progress=False)
    stored.write_bytes(b"Weights")
    with pytest.raises(HubError, match="hash differs"):
        _check_hashes(ID, link.parent, [WEIGHTS], progress=False)
    assert not link.is_symlink() and not blob.is_symlink()


def test_a_disk_without_room_is_told_before_anything_is_fetched(hub: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 5, len(hub.files[WEIGHTS])))
    text = refused()
    assert "GB free" in text and "HF_HOME" in text
    assert not [asked for asked in hub.asked if asked[0] == "GET"]


def test_what_was_fetched_is_found_without_the_hub(hub: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model(ID, progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(ID, progress=False) == folder
    (folder / WEIGHTS).unlink()
    assert f"hf download {ID}" in refused()


def test_the_command_does_everything(tmp_path: Path, hub: Repository) -> None:
    notes = tmp_path / "notes.csv"
    notes.write_text("input,label\n" + "".join(f"note {n},{'AB'[n % 2]}\n" for n in range(4)))
    hub.token = TOKEN
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "minilora", "train", "--model", f"{ID}@main", "--data", str(notes),
               "--out", str(tmp_path / "run"), "--max-steps", "1", "--max-length", "64", "--batch-size", "2", "--cache"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (ID, "main")        # as PEFT reads them
    said = done.stdout + done.stderr
    assert "load" in said and TOKEN not in said
    kept = list((tmp_path / "home" / "hub").glob("models--*/minilora/*/model.safetensors"))
    assert len(kept) == 1
    assert huggingface_hub.scan_cache_dir(tmp_path / "home" / "hub").warnings == []
