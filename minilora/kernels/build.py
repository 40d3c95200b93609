"""Compile C++ files once per user and machine, and load them: no build system, no binaries in the package.

    library = load(*sources)        a second or two the first time, milliseconds after that

The compiled file lies in ``$XDG_CACHE_HOME/minilora/kernels`` (else ``~/.cache/...``) under a hash of all that decides what it
holds: source with what it includes, flags, compiler, processor, OpenMP library.  Another of any is another file.

It is machine code that this process will run, so it is loaded only from a folder that belongs to the user and that nobody
else may write to, and only if the SHA-256 at its end is that of the rest (loading half a file would kill the process).  It
is written under a temporary name and renamed, so any number of processes may start at once.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

FLAGS = ("-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-Wno-psabi")       # why no contraction: see nf4_blocks.h
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
# The vector instructions of the machine that compiles, which is the one that runs; on ARM the other spelling is the one that
# every compiler knows.
NATIVE = ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)
OPENMP = ("-Xclang", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)     # Apple's compiler has it, and hides it
DIGEST = 32                         # bytes of SHA-256
T = TypeVar("T")
_first = threading.Lock()


class BuildError(Exception):
    """No library could be made; the text says why in one line."""


def cache_folder() -> Path:
    """Where compiled kernels lie: made if need be, the user's own, and writable by nobody else.

    Raises: BuildError: it cannot be made or written, or is somebody else's to write.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "minilora" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be made ({error.strerror})") from error
    if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"the cache folder {folder} can be written by others; make it yours alone (chmod 700)")
    return folder


def openmp_library() -> str | None:
    """The file of the OpenMP library that torch has loaded, or None.

    Trap: a second OpenMP library, or a second team of threads, beside torch's makes every torch operation about twice as
    slow on two cores: threads of either sleep between operations as soon as there are more of them than cores.  So the
    kernel is linked to this very file; its threads are torch's.
    """
    own = Path(torch.__file__).parent / "lib"
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:                 # not Linux
        return next((str(own / name) for name in ("libomp.dylib", "libiomp5.dylib") if (own / name).is_file()), None)
    paths = sorted({line.split(maxsplit=5)[5] for line in mapped.splitlines() if line.count("/")})
    known = [path for path in paths if Path(path).name.startswith(("libgomp", "libiomp5", "libomp.", "libomp5"))]
    beside_torch = [path for path in known if Path(path).parent == own]
    return next(iter(beside_torch + known), None)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {line for line in lines if line.lower().startswith(("flags", "features", "model name", "cpu part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(found)])


def _text(source: Path) -> str:
    """The file, and behind it the files beside it that it includes, and those that they include."""
    text = source.read_text(encoding="utf-8")
    return "\0".join([text, *(_text(source.with_name(name)) for name in INCLUDE.findall(text))])


def load(*sources: Path, machine: tuple[str, ...] = NATIVE) -> ctypes.CDLL:
    """The one library made of `sources`, from the cache or compiled now, each file beside the others.

    Args:
        sources: C++ files, the first of which names the library; what they include in quotes lies beside them.
        machine: flags that choose the instruction set.

    Raises: BuildError: no compiler, it fails, or the cache folder is not to be used.
    """
    compiler, other = shutil.which("c++"), shutil.which("g++")
    if compiler is None:
        raise BuildError("no C++ compiler is installed (c++)")
    openmp = openmp_library()
    try:
        return _load(compiler, sources, machine, openmp)
    except BuildError:
        if openmp is None:
            raise
    # Such as Clang's, where torch brings GCC's OpenMP library: it asks for functions that are not there.
    if other is not None and Path(other).resolve() != Path(compiler).resolve():
        with suppress(BuildError):
            return _load(other, sources, machine, openmp)
    library = _load(compiler, sources, machine, None)
    _say_one_thread(compiler, Path(openmp).name)
    return library


@cache
def _say_one_thread(compiler: str, openmp: str) -> None:
    warnings.warn(f"compiled code for 4-bit weights and blocks runs on one thread: {compiler} and torch's {openmp} do not go "
                  "together; with GCC (g++) it would take as many as torch", RuntimeWarning, stacklevel=2)


def _load(compiler: str, sources: tuple[Path, ...], machine: tuple[str, ...], openmp: str | None) -> ctypes.CDLL:
    """The library, of as many threads as torch's where there is an OpenMP library to link to, else of one."""
    compiler_state = Path(compiler).resolve().stat()
    parts = [*map(_text, sources), *FLAGS, *machine, _processor(), str(openmp), torch.__version__,
             f"{compiler} {compiler_state.st_size} {compiler_state.st_mtime_ns}"]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = cache_folder() / f"{sources[0].stem}-{key}.so"
    if not _is_whole(path):
        _compile(compiler, sources, machine, openmp, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled kernel cannot be loaded ({error})") from error


def _is_whole(path: Path) -> bool:
    """Whether the file is there, the user's own, and as it was written."""
    try:
        with path.open("rb") as file:
            state, content = os.fstat(file.fileno()), file.read()
    except OSError:
        return False
    own = state.st_uid == os.getuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return own and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _compile(compiler: str, sources: tuple[Path, ...], machine: tuple[str, ...], openmp: str | None, path: Path) -> None:
    """Compile to a temporary name beside `path`, append the digest, rename."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor(len(sources)) as at_once:
            library, parts = Path(folder) / "library.so", [str(Path(folder) / f"{source.stem}.o") for source in sources]
            # Two steps: linking with -fopenmp would add the compiler's own OpenMP library beside torch's.
            compile_one = [compiler, *FLAGS, *machine, *(OPENMP if openmp else ()), "-c"]
            list(at_once.map(lambda source, part: _run([*compile_one, str(source), "-o", part]), sources, parts))
            to_link = [openmp, "-Xlinker", "-rpath", "-Xlinker", str(Path(openmp).parent)] if openmp else []
            _run([compiler, "-shared", *parts, *to_link, "-o", str(library)])
            content = library.read_bytes()
            library.write_bytes(content + hashlib.sha256(content).digest())
            library.chmod(0o700)
            library.replace(path)
    except OSError as error:
        raise BuildError(f"the cache folder {path.parent} cannot be written ({error.strerror})") from error


def _run(command: list[str]) -> None:
    """One step of the compiler."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise BuildError(f"the C++ compiler fails: {reason.strip():.200}")


def at_first_call(tried: list[T | None], make: Callable[[], T | None], otherwise: str) -> T | None:
    """What `make` gives, made by the first caller and kept in `tried` for all others; None where it can't be made.

    Then a warning says so once, with what happens `otherwise`; with ``MINILORA_KERNELS=reference`` nothing is made, or said.
    """
    if not tried:
        with _first:
            if not tried:
                made = None
                if os.environ.get("MINILORA_KERNELS") != "reference":
                    try:
                        made = make()
                    except BuildError as error:
                        warnings.warn(f"{otherwise}: {error}", RuntimeWarning, stacklevel=4)
                tried.append(made)
    return tried[0]
