"""One run a folder: a lock that ends with its process, however that ends.

    RUN/.tmp-lock      locked with flock(2) by the process that trains into RUN, which stands in it; removed when it is done

The system lets go of a lock when its process ends, so a killed run leaves no lock behind that somebody would have to remove.
The file is named like what a killed write leaves: a folder that holds nothing else counts as empty.

The lock is also how a run knows its folder: one that was deleted, or replaced by another of its name, holds another file.
"""
from __future__ import annotations

import errno
import fcntl
import os
import platform
from contextlib import suppress
from pathlib import Path

from minilora.errors import OutputError

LOCK_FILE = ".tmp-lock"
BUSY = (errno.EWOULDBLOCK, errno.EACCES)


class FolderLock:
    """The right to write into a folder, until `release`.

    Args: folder: exists.

    Raises: OutputError: another process has it, or the disk refuses.
    Guarantee: of two processes one gets it (tests/test_safety.py).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._path = folder, folder / LOCK_FILE
        while True:
            try:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise OutputError(f"cannot write {folder}: {error.strerror or error}; check the path and its permissions"
                                  ) from error
            if not locked(self._descriptor):
                os.close(self._descriptor)
                raise OutputError(in_use(folder))
            # Trap: whoever held the lock may have removed the file between the two calls; the lock is then on a file that
            # nobody else will ever open.
            if self._is_there():
                break
            os.close(self._descriptor)
        with suppress(OSError):         # only tells others whom to ask; a full disk is told where it matters
            os.truncate(self._descriptor, 0)
            os.write(self._descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())

    def check(self) -> None:
        """Make sure that the folder is still the one that was locked.

        Raises: OutputError: it was deleted, moved or replaced.
        """
        if not self._is_there():
            raise OutputError(f"{self.folder} was deleted or replaced while the run wrote to it; nothing more was written "
                              "there: start the run anew")

    def release(self) -> None:
        """Remove the file, while it is still locked, and let go."""
        with suppress(OSError):         # on a disk that refuses it stays, and means nothing
            if self._is_there():
                self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except OSError:
            return False


class Unlocked:
    """In place of the lock, for processes that write nothing."""

    def check(self) -> None:
        """Nothing to make sure of."""

    def __enter__(self) -> Unlocked:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def refuse_if_locked(folder: Path) -> None:
    """Say early that a run has the folder; changes nothing.

    Raises: OutputError: a process holds the lock.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR)
    except OSError:
        return
    try:
        if not locked(descriptor):
            raise OutputError(in_use(folder))
    finally:
        os.close(descriptor)


def in_use(folder: Path) -> str:
    """Who has the folder, and what to do."""
    try:
        holder = (folder / LOCK_FILE).read_text(encoding="utf-8", errors="replace").strip()[:100]
    except OSError:
        holder = ""
    return (f"{folder} is in use by another run ({holder or 'which has just begun'}); wait for it, stop it, or choose another "
            "output")


def locked(descriptor: int) -> bool:
    """Lock the file, until its process ends or it is closed; False if another process has it locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in BUSY      # some network disks have no locks: nothing keeps two runs apart there
    return True
