"""From what a user types after --model to a folder on disk: the model that ships, a folder, or a Hugging Face hub id.

Only what is needed is fetched: config, tokenizer, and the safetensors, or the .bin files where a repository has no
safetensors.  huggingface-hub does the work (its cache, its resume, its token); this file turns its errors into one line
that says what to do.  The token itself is never printed.
"""
from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from minilora.errors import CheckpointError, HubError

SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "README.md", "LICENSE*")
# Trap: "*.safetensors" would also fetch Mistral's consolidated.safetensors, the same 14 GB a second time.
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
BIN = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def resolve_model(name: str | os.PathLike[str], revision: str | None = None, progress: bool = True, weights: bool = True
                  ) -> Path:
    """The folder of a model.

    Args:
        name: "tiny" (ships with the package), a folder, or a hub id such as "epfl-llm/meditron-7b".
        revision: branch, tag or commit of a hub id.
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
    if not HUB_ID.fullmatch(text):
        raise HubError(f"{text!r} is no folder and no hub id; a hub id looks like epfl-llm/meditron-7b")
    return _download(text, revision, progress, weights)


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
    wanted = [*SMALL_FILES, *SAFETENSORS] if weights else ["config.json"]
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
        if weights and not any(folder.glob("model*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=[*SMALL_FILES, *BIN]))
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


def _explained(error: Exception, repo: str, revision: str | None) -> HubError:
    """The one line that tells a user what to do about an error of huggingface-hub."""
    from huggingface_hub import constants, errors

    at = f"{repo} (revision {revision})" if revision else repo
    page = f"https://huggingface.co/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    has_token = bool(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"))
    token = "HF_TOKEN is set: does it belong to an account that was granted access?" if has_token else \
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
