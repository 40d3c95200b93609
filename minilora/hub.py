"""From what a user types after --model to a folder on disk: the model that ships, a folder, or a Hugging Face hub id.

Only what is needed is fetched: config, tokenizer, and the safetensors, or the .bin files where a repository has no
safetensors.  huggingface-hub does the work (its cache, its resume, its token); this file asks first whether the disk has
room, compares the hash of what came, and turns errors into one line that says what to do.  The token itself is never printed.

What is resumed: within a command a connection that breaks goes on less than 10 MB before where it broke; a command that was
killed starts the file again that was under way, and no other.
"""
from __future__ import annotations

import hashlib
import importlib.resources
import os
import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from minilora.errors import CheckpointError, HubError

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "README.md", "LICENSE*")
# Trap: "*.safetensors" would also fetch Mistral's consolidated.safetensors, the same 14 GB a second time.
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
BIN = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
REVISION = re.compile(r"[A-Za-z0-9_][\w.-]*")


def resolve_model(name: str | os.PathLike[str], revision: str | None = None, progress: bool = True, weights: bool = True
                  ) -> Path:
    """The folder of a model.

    Args:
        name: "tiny" (ships with the package), a folder, or a hub id such as "epfl-llm/meditron-7b"; behind an @ may stand
            which branch, tag or commit.
        revision: the same, named apart.
        progress: show huggingface-hub's bars. weights: False fetches config.json alone.

    Returns: a folder that holds config.json.
    Raises: CheckpointError: no such folder, or not a model's. HubError: the hub id is malformed, unknown, gated or cannot
        be reached.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise CheckpointError(f"a model is named by a text or a path, not by {name!r:.60}; name a model folder, 'tiny', or a "
                              "hub id such as epfl-llm/meditron-7b")
    text = os.fspath(name)
    if text == "tiny":
        tiny = Path(str(importlib.resources.files("minilora") / "assets" / "tiny"))
        if not (tiny / "config.json").is_file():
            raise CheckpointError(f"{tiny}: the model that ships is missing; reinstall minilora")
        return tiny
    path = Path(text).expanduser()
    if text and path.is_dir():
        return _checked(path)
    if text and path.exists():
        raise CheckpointError(f"{path}: is a file; name the folder that holds config.json and the weights")
    looks_like_a_path = text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1 or "\\" in text
    if not text or looks_like_a_path or not isinstance(name, str):
        raise CheckpointError(f"{text or repr(text)}: no such folder; name a model folder, 'tiny', or a hub id such as "
                              "epfl-llm/meditron-7b")
    repo, pinned = split_revision(text)
    if not HUB_ID.fullmatch(repo):
        raise HubError(f"{text!r} is no folder and no hub id; a hub id looks like epfl-llm/meditron-7b, or with a revision "
                       "like epfl-llm/meditron-7b@main")
    if pinned and revision and pinned != revision:
        raise HubError(f"{text!r} names one revision, and {revision!r} is asked for beside it; give one of them")
    return _download(repo, revision or pinned, progress, weights)


def split_revision(name: str) -> tuple[str, str | None]:
    """A hub id and the revision behind its @; any other name, and None."""
    repo, at, revision = name.partition("@")
    if at and HUB_ID.fullmatch(repo) and REVISION.fullmatch(revision) and not Path(name).expanduser().exists():
        return repo, revision
    return name, None


def _checked(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: holds an adapter and no model; pass it with --adapter and its base with --model")
    raise CheckpointError(f"{folder}: no config.json; a model folder holds config.json, weights and a tokenizer")


def _download(repo: str, revision: str | None, progress: bool, weights: bool) -> Path:
    """Fetch what is needed of a repository, or find it in the cache."""
    # Imported here: it takes a moment, and only hub ids need it.
    import huggingface_hub
    from huggingface_hub import utils

    silenced = not progress and not utils.are_progress_bars_disabled()
    if silenced:
        utils.disable_progress_bars()
    try:
        wanted, missing = _plan(repo, revision, weights)
        _check_space(repo, sum(file.file_size or 0 for file in missing))
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
        if weights and not missing and not any(folder.glob("model*.safetensors")):      # no plan was made: from the cache
            folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=[*SMALL_FILES, *BIN]))
        _check_hashes(repo, folder, [file.filename for file in missing], progress)
    except HubError:
        raise
    except Exception as error:
        raise _explained(error, repo, revision) from error
    finally:
        if silenced:
            utils.enable_progress_bars()
    if not (folder / "config.json").is_file():
        raise HubError(f"{repo}: the repository has no config.json, so it is not a model in the Hugging Face layout")
    if weights and not any(folder.glob("model*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise HubError(f"{repo}: neither model*.safetensors nor pytorch_model*.bin in the repository, or in what the cache "
                       f"{huggingface_hub.constants.HF_HUB_CACHE} holds of it; if the hub cannot be reached here, run on a "
                       f"machine that can: hf download {repo} --local-dir DIR, copy DIR here and name it instead")
    return folder


def _plan(repo: str, revision: str | None, weights: bool) -> tuple[list[str], list[DryRunFileInfo]]:
    """What to ask for, as patterns, and the files of it that are to come; none where the hub does not answer."""
    import huggingface_hub
    from huggingface_hub import errors

    if not weights:
        return ["config.json"], []
    try:
        files = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=[*SMALL_FILES, *SAFETENSORS, *BIN],
                                                  dry_run=True)
    except errors.DryRunError:      # what is wrong, the download itself will say, if the cache cannot help
        return [*SMALL_FILES, *SAFETENSORS], []
    kind = SAFETENSORS if any(fnmatch(file.filename, "model*.safetensors") for file in files) else BIN
    wanted = [*SMALL_FILES, *kind]
    return wanted, [file for file in files if file.will_download and any(fnmatch(file.filename, each) for each in wanted)]


def _check_space(repo: str, needed: int) -> None:
    """Refuse a download of `needed` bytes that the cache's disk has no room for."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.is_dir())).free
    if needed > free:
        raise HubError(f"{repo}: {needed / 1e9:.1f} GB are to be fetched, and the cache {cache} has {free / 1e9:.1f} GB free; "
                       "free some space or point HF_HOME to another disk")


def _check_hashes(repo: str, folder: Path, names: Sequence[str], progress: bool) -> None:
    """Compare files that have just come with the hash that the hub lists for each; one that differs is removed.

    Why: huggingface-hub compares sizes alone (2.4).  Its cache names a file's content by that hash: SHA-256 of a large file,
    git's SHA-1 of a small one.
    """
    total = sum((folder / name).stat().st_size for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc="check", disable=not progress) as bar:
        for name in names:
            link = folder / name
            # Trap: one link alone is followed. What it leads to may be a link as well, to a file named by another hash (Xet's).
            path = link.parent / os.readlink(link) if link.is_symlink() else link
            if re.fullmatch(r"[0-9a-f]{64}", path.name):
                found = hashlib.sha256()
            elif re.fullmatch(r"[0-9a-f]{40}", path.name):
                found = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
            else:
                continue            # a disk without links: a name that says nothing
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    found.update(block)
                    bar.update(len(block))
            if found.hexdigest() != path.name:
                link.unlink()
                path.unlink(missing_ok=True)
                raise HubError(f"{repo}: {name} is not what the hub lists (its hash differs), and was removed; run the command "
                               "again to fetch it once more")


def _explained(error: Exception, repo: str, revision: str | None) -> HubError:
    """The one line that tells a user what to do about an error of huggingface-hub."""
    from huggingface_hub import constants, errors, get_token

    # Trap: that the hub refused or failed is wrapped in "not in the cache", if it was no 401 (huggingface-hub 2.4).
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__
    at = f"{repo} (revision {revision})" if revision else repo
    page = f"https://huggingface.co/{repo}"
    response = getattr(error, "response", None)
    status, said = getattr(response, "status_code", None), getattr(response, "headers", {}).get("X-Error-Message", "")
    token = "then try again: a token is set (HF_TOKEN): is its account one that was granted access?" if get_token() else \
        "then set HF_TOKEN to a token of that account"
    # The order matters: GatedRepoError is a RepositoryNotFoundError, and most are HfHubHTTPError.
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{repo!r} is no folder and no hub id; a hub id looks like epfl-llm/meditron-7b")
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{repo} is gated: ask for access at {page} and {token}")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo}: no revision {revision or 'main'!r}; its branches and tags are listed at {page}/tree/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(f"{repo}: no such folder here and no such repository on the hub; check the spelling at {page}, and if "
                        "it is private set HF_TOKEN to a token that may read it")
    if status == 401 and "Invalid credentials" in said:
        return HubError(f"{repo}: the hub does not know the token that is set; make one at "
                        "https://huggingface.co/settings/tokens and set HF_TOKEN to it")
    if status in (401, 403):
        return HubError(f"{repo}: the hub refuses (HTTP {status}): ask for access at {page} and {token}")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return HubError(f"{repo}: needs a token: set HF_TOKEN to one that may read {page}")
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        return HubError(f"{at}: the hub answered HTTP {status}; try again later")
    if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError):
        return HubError(f"{at}: cannot write to the cache {constants.HF_HUB_CACHE} ({getattr(error, 'strerror', '')}); free "
                        "some space or point HF_HOME elsewhere")
    return HubError(f"{at}: no such folder here, not (wholly) in the cache {constants.HF_HUB_CACHE}, and the hub cannot be "
                    f"reached; on a machine that can, run: hf download {repo} --local-dir DIR, copy DIR here and name it "
                    f"instead ({type(error).__name__})")
