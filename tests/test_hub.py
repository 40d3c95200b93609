"""What a user types after --model, and every way the hub can refuse; huggingface-hub's own exceptions, no network."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from minilora import load_model
from minilora.errors import CheckpointError, HubError
from minilora.hub import resolve_model
from tests.models import write_model

ID = "epfl-llm/meditron-7b"
SECRET = "hf_SECRETsecretSECRET"


class FakeResponse:
    """As much of an HTTP response as huggingface-hub's exceptions ask for."""

    def __init__(self, status: int) -> None:
        self.status_code, self.request = status, None
        self.headers: dict[str, str] = {}


def http(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    return kind(f"{status} Client Error\nBearer {SECRET}", response=FakeResponse(status))       # type: ignore[arg-type]


def raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.mark.parametrize(("error", "said"), [
    (http(errors.GatedRepoError, 401), [f"https://huggingface.co/{ID}", "HF_TOKEN", "gated"]),
    (http(errors.GatedRepoError, 403), [f"https://huggingface.co/{ID}", "HF_TOKEN", "gated"]),
    (http(errors.HfHubHTTPError, 401), [f"https://huggingface.co/{ID}", "HF_TOKEN", "401"]),
    (http(errors.HfHubHTTPError, 403), [f"https://huggingface.co/{ID}", "HF_TOKEN", "403"]),
    (http(errors.RepositoryNotFoundError, 404), ["no such repository", ID]),
    (http(errors.RevisionNotFoundError, 404), ["no revision 'main'", ID]),
    (http(errors.HfHubHTTPError, 503), ["HTTP 503"]),
    (errors.LocalEntryNotFoundError("no network"), ["cache", "cannot be reached", f"hf download {ID}"]),
    (errors.OfflineModeIsEnabled("offline"), ["cache", "cannot be reached"]),
    (errors.IncompleteSnapshotError("half", snapshot_path="x"), ["cache", "cannot be reached"]),
    (ConnectionError("no route"), ["cache", "cannot be reached"]),
    (errors.HFValidationError("bad id"), ["hub id"]),
    (OSError(28, "No space left on device"), ["cache", "No space left"]),
])
def test_each_refusal_of_the_hub_is_one_line_that_says_what_to_do(
        monkeypatch: pytest.MonkeyPatch, error: Exception, said: list[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    raising(monkeypatch, error)
    with pytest.raises(HubError) as caught:
        resolve_model(ID)
    text = str(caught.value)
    assert "\n" not in text and SECRET not in text, text
    for part in said:
        assert part in text, f"{part!r} is not in: {text}"


def test_without_a_token_the_gated_error_says_to_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    raising(monkeypatch, http(errors.GatedRepoError, 401))
    with pytest.raises(HubError, match="set HF_TOKEN"):
        resolve_model(ID)


def test_a_revision_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, http(errors.RevisionNotFoundError, 404))
    with pytest.raises(HubError, match="'v9'"):
        resolve_model(ID, revision="v9")


class FakeHub:
    """snapshot_download over a dictionary of file names, recording what it was asked for."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files, self.calls = folder, files, []     # type: tuple[Path, list[str], list[dict[str, Any]]]

    def __call__(self, repo: str, dry_run: bool = False, **options: Any) -> str:
        from fnmatch import fnmatch
        if dry_run:
            raise errors.DryRunError("offline")         # tests/test_hub_download.py has the hub that answers
        self.calls.append({"repo": repo, **options})
        for name in self.files:
            if any(fnmatch(name, pattern) for pattern in options["allow_patterns"]):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text("{}")
        return str(self.folder)


@pytest.mark.parametrize(("files", "fetched"), [
    (["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
      "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "consolidated.safetensors",
      "original/consolidated.00.pth"],
     {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}),
    (["config.json", "tokenizer.model", "pytorch_model.bin", "tf_model.h5"],
     {"config.json", "tokenizer.model", "pytorch_model.bin"}),
])
def test_only_the_files_that_are_needed_are_fetched(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], fetched: set[str]) -> None:
    hub = FakeHub(tmp_path / "snapshot", files)
    hub.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_model(ID, revision="abc", progress=False) == hub.folder
    assert {str(path.relative_to(hub.folder)) for path in hub.folder.rglob("*") if path.is_file()} == fetched
    assert all(call["repo"] == ID and call["revision"] == "abc" for call in hub.calls)


def test_a_repository_without_weights_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub(tmp_path, ["config.json", "README.md"]))
    with pytest.raises(HubError, match="neither"):
        resolve_model(ID)


def test_the_real_library_offline_ends_with_the_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="cannot be reached"):
        resolve_model("nobody/nothing-of-this-name")


@pytest.mark.parametrize("present", ["all", "no weights", "nothing"])
def test_the_real_librarys_cache_is_read_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, present: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached, revision = tmp_path / "models--some--model", "a" * 40
    snapshot = cached / "snapshots" / revision
    if present != "nothing":
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(revision)
        write_model(snapshot)
        if present == "no weights":
            (snapshot / "model.safetensors").unlink()
        for number, file in enumerate(sorted(snapshot.iterdir())):
            (cached / "blobs").mkdir(exist_ok=True)
            file.rename(cached / "blobs" / f"{number:040x}")
            file.symlink_to(f"../../blobs/{number:040x}")
    if present == "all":
        assert resolve_model("some/model") == snapshot
        assert load_model("some/model", revision=revision)(torch.tensor([[1, 2]])).shape == (1, 2, 259)
        return
    with pytest.raises(HubError, match="hf download some/model") as caught:
        load_model("some/model")
    assert "\n" not in str(caught.value)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(tmp_path) == tmp_path


def test_a_folder_without_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--adapter"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "~/no-such-folder-here", "models\\x", "x/", ""])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    raising(monkeypatch, AssertionError("asked the hub"))
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["a b/c", "-x/y", "é/x", "org/..\n"])
def test_a_malformed_id_is_refused_before_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    raising(monkeypatch, AssertionError("asked the hub"))
    with pytest.raises(HubError, match="hub id") as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(tmp_path / "model.safetensors"))
