"""Writing without losing anything: temporary name, fsync, rename.

``os.replace`` is atomic within one file system: a reader sees the old file or the whole new one, and a kill at any
instant leaves at worst a ``.tmp-…`` sibling, which counts as nothing and is cleared away by the next run.  The data is synced
before the rename and the folder after it, so a power cut cannot leave the new name with old blocks.  A folder cannot be renamed
over another one that holds something: the two change names, in one step where the system has it (Linux).
"""
from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from minilora.errors import OutputError

# Trap: safetensors says a full disk in an exception of its own, which is no OSError.
DISK_ERRORS = (OSError, SafetensorError)
TEMPORARY = ".tmp-"         # how the name of everything begins that is not finished yet


def disk_reason(error: Exception) -> str:
    """What the disk said, in one line."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def sync_folder(path: Path) -> None:
    """Sync a directory's entries to disk (the rename itself, not the files' contents)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Sync a file's contents to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, as sha256sum gives it, in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_path(path: str | os.PathLike[str], mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, else removed.

    Args:
        path: the final file; its folder must exist.
        mode: permission bits of the result, set before any byte is written (0o600 for notes and predictions).

    Raises:
        OutputError: the folder is missing, read-only or full.
    """
    final = Path(path)
    temporary = final.with_name(f"{TEMPORARY}{os.getpid()}-{final.name}")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, mode)
        os.close(descriptor)
        os.chmod(temporary, mode)
        yield temporary
        # Trap: a library may have replaced the file instead of writing into it, with its own default mode.
        os.chmod(temporary, mode)
        sync_file(temporary)
        os.replace(temporary, final)
        sync_folder(final.parent)
    except DISK_ERRORS as error:
        raise OutputError(f"cannot write {final}: {disk_reason(error)}; check the folder, its free space and "
                          "permissions") from error
    finally:
        with suppress(OSError):         # a disk that refuses everything: the error above says so
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, mode: int = 0o644) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], value: Any, mode: int = 0o644) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", mode)


class Kind(NamedTuple):
    """A kind of folder that is written.

    Attributes: marker: a file that each of them holds. own: patterns of the names of all that may be in one.
    """

    marker: str
    own: tuple[str, ...] = ("*",)


ANY = Kind("")
NOBODYS = (".DS_Store", "Thumbs.db", "desktop.ini")        # what file managers leave in every folder that somebody looks at
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "minilora.json",
               "labels.txt", "README.md", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def check_output(path: str | os.PathLike[str], overwrite: bool, kind: Kind = ANY,
                 reads: Iterable[str | os.PathLike[str] | None] = ()) -> None:
    """Refuse an output that exists, unless it may be overwritten.

    Args:
        kind: of a folder.  One without the marker is somebody else's, and one with other files as well is also: neither is
            ever replaced.
        reads: what the command reads; names that are no paths, as those of a hub, don't matter.

    Raises:
        OutputError: `path` exists (a folder with nothing in it but leftovers doesn't count) and `overwrite` is False, or it is
            no folder of this kind alone, or holds what is read, or its parent is a file.
    """
    final = Path(path)
    for parent in final.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise OutputError(f"cannot write {final}: {parent} is a file, not a folder")
            break
    in_use = any(not is_leftover(path) for path in final.iterdir()) if final.is_dir() else final.exists()
    if in_use and not overwrite:
        raise OutputError(f"{final} exists already; choose another output or pass --overwrite")
    if in_use and kind.marker and not (final / kind.marker).is_file():
        raise OutputError(f"{final} exists and holds no {kind.marker}, so it is no earlier output of this kind; choose another "
                          "output")
    for inner in sorted(final.iterdir()) if in_use and final.is_dir() else ():
        if not is_leftover(inner) and not any(fnmatchcase(inner.name, pattern) for pattern in (*kind.own, *NOBODYS)):
            raise OutputError(f"{final} holds {inner.name}, which no earlier output of this kind would, and which would be "
                              "gone with it; move it away, or choose another output")
    place = final.resolve()
    for read in (Path(read) for read in reads if read is not None and os.path.exists(read)) if in_use else ():
        if place in (read.resolve(), *read.resolve().parents):
            raise OutputError(f"{final} is or holds {read}, which is read here and would be gone; choose another output")


def check_output_file(path: str | os.PathLike[str], overwrite: bool,
                      reads: Iterable[str | os.PathLike[str] | None] = ()) -> None:
    """Refuse a file that could not be written in the end, before hours of work; arguments as of `check_output`.

    Raises: OutputError: as `check_output`; or it is a folder, or its own is not there or lets nobody write.
    """
    check_output(path, overwrite, reads=reads)
    final, folder = Path(path), Path(path).parent
    if final.is_dir():
        raise OutputError(f"{final} is a folder; name a file")
    if not folder.is_dir():
        raise OutputError(f"cannot write {final}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {final}: the folder {folder} may not be written to; choose another output")


def is_leftover(path: Path) -> bool:
    """Whether this is what a killed write left: its name says that it was never finished."""
    return path.name.startswith(TEMPORARY)


def clear_leftovers(folder: Path, keep: str = "") -> None:
    """Remove what killed writes left in a folder, files and folders, but for the one named `keep`.

    Raises: OSError: the disk refuses.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.name != keep:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change names in one step; False, and nothing done, where the system or the file system has no such step."""
    here, exchange = -100, 2                        # AT_FDCWD, RENAME_EXCHANGE
    try:
        step = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):    # not Linux
        return False
    return bool(step(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _take_place(temporary: Path, final: Path) -> Path:
    """Give `temporary` the name of what is at `final`, and return where that is now."""
    if _exchange(temporary, final):
        return temporary
    retired = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{final.name}-old-", dir=final.parent))
    os.replace(final, retired / final.name)
    try:
        os.replace(temporary, final)
    except OSError:
        os.replace(retired / final.name, final)
        retired.rmdir()
        raise
    return retired


@contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool = False, kind: Kind = ANY, mode: int = 0o755) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its name on success and is removed on failure.

    Args: mode: permission bits of the result (0o700 for what was made from notes); until then it is its owner's alone.

    Raises:
        OutputError: as `check_output`; or the disk refuses.
    """
    final = Path(path).absolute()
    check_output(final, overwrite, kind)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{final.name}-", dir=final.parent))
    except OSError as error:
        raise OutputError(f"cannot create {final}: {error.strerror or error}") from error
    try:
        yield temporary
        os.chmod(temporary, mode)
        for inner in (*temporary.rglob("*"), temporary):     # Trap: a folder's entries are data as well
            sync_folder(inner) if inner.is_dir() else sync_file(inner)
        if final.exists():
            old = _take_place(temporary, final)
            sync_folder(final.parent)
            with suppress(OSError):         # the new one is in its place; what can't be removed is a leftover
                _remove(old)
        else:
            os.replace(temporary, final)
            sync_folder(final.parent)
    except DISK_ERRORS as error:
        raise OutputError(f"cannot write {final}: {disk_reason(error)}; check free space and permissions") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
