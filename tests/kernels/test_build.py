"""Compiling at first use: the cache, two processes at once, and all the ways in which there is no library."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.kernels import build

SOURCE = 'extern "C" int answer() { return 42; }\n'
# Warnings are counted, and the result is that of the reference whatever happens to the compiler.
USE_TWICE = """
import warnings
import torch
from minilora import quantize_nf4
from minilora.kernels import cpu, reference
from minilora.quant.codebooks import NF4_CODE
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    q = quantize_nf4(w, double_quant=False)
    assert torch.equal(q.dequantize(), q.dequantize())
    codes, absmax = reference.quantize_blocks(w, NF4_CODE, 64)
    assert torch.equal(q.packed, reference.pack_nibbles(codes, 7)) and torch.equal(q.absmax, absmax)
said = [str(w.message) for w in caught if "slow path" in str(w.message) or "one thread" in str(w.message)]
print(len(said), cpu.kernel() is not None, *said)
"""

pytestmark = pytest.mark.skipif(build.shutil.which("c++") is None, reason="no C++ compiler is installed (c++)")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def compiled() -> list[Path]:
    return sorted(build.cache_folder().iterdir())


def use(**environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", USE_TWICE], env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def forbid(*_: object, **__: object) -> None:
    raise AssertionError("compiled again")


def test_a_second_use_takes_the_file_of_the_first(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.load(source).answer() == 42
    file, = compiled()
    assert file.stat().st_mode & 0o777 == 0o700 and build.cache_folder().stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(build.subprocess, "run", forbid)
    assert build.load(source).answer() == 42


def test_another_source_or_instruction_set_is_another_file(source: Path) -> None:
    build.load(source)
    build.load(source, machine=("-O1",))
    source.write_text(SOURCE.replace("42", "43"))
    assert build.load(source).answer() == 43 and len(compiled()) == 3


def test_a_change_in_an_included_file_is_another_file(source: Path) -> None:
    source.write_text('#include "first.h"\n' + SOURCE.replace("42", "NUMBER"))
    source.with_name("first.h").write_text('#include <cstdint>\n#include "second.h"\n')
    for number in (42, 43):
        source.with_name("second.h").write_text(f"#define NUMBER {number}\n")
        assert build.load(source).answer() == number
    assert len(compiled()) == 2


def test_a_library_of_several_files_has_what_each_of_them_defines(source: Path) -> None:
    other = source.with_name("other.cpp")
    other.write_text('extern "C" int question() { return 6 * 7; }\n')
    library = build.load(source, other)
    assert library.answer() == library.question() == 42 and len(compiled()) == 1
    other.write_text("int question( {\n")
    with pytest.raises(build.BuildError, match=r"the C\+\+ compiler fails: .*error"):
        build.load(source, other)
    assert len(compiled()) == 1, "temporary files are left"


def test_every_file_the_kernel_includes_is_shipped() -> None:
    """Its name ends as package-data says, and what it includes lies beside it."""
    kernels = Path(build.__file__).parent
    rules = re.findall(r'"kernels/\*(\.\w+)"', (kernels.parents[1] / "pyproject.toml").read_text())
    for file in (*kernels.glob("*.cpp"), *kernels.glob("*.h")):
        assert file.suffix in rules
        assert [name for name in build.INCLUDE.findall(file.read_text()) if not (kernels / name).is_file()] == []


@pytest.mark.parametrize("damage", ["empty", "cut", "one byte", "text"])
def test_a_damaged_file_is_made_anew(source: Path, damage: str) -> None:
    build.load(source)
    file, = compiled()
    whole = file.read_bytes()
    # A new file in its place: this process still has the old one mapped.
    file.unlink()
    file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no library\n" * 99,
                      "one byte": whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]}[damage])
    file.chmod(0o700)
    assert build.load(source).answer() == 42 and file.read_bytes() != b"" and build._is_whole(file)


def test_processes_that_start_at_once_all_get_the_library(source: Path) -> None:
    call = f"from pathlib import Path; from minilora.kernels import build; print(build.load(Path({str(source)!r})).answer())"
    started = [subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0].strip() for process in started] == ["42"] * 4
    assert len(compiled()) == 1, "temporary files are left"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_is_not_trusted(source: Path, mode: int) -> None:
    build.load(source)
    folder = build.cache_folder()
    folder.chmod(mode)
    with pytest.raises(build.BuildError, match="written by others"):
        build.load(source)


def test_a_file_that_others_may_write_is_made_anew(source: Path) -> None:
    build.load(source)
    file, = compiled()
    file.chmod(0o777)
    assert not build._is_whole(file)
    build.load(source)
    assert file.stat().st_mode & 0o777 == 0o700


def test_the_compilers_error_is_one_line(source: Path) -> None:
    source.write_text("int answer( {\n")
    with pytest.raises(build.BuildError, match=r"the C\+\+ compiler fails: .*error") as caught:
        build.load(source)
    assert "\n" not in str(caught.value) and compiled() == []


def test_without_compiler_the_reference_is_used_and_said_once(tmp_path: Path) -> None:
    said = use(PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert said.startswith("1 False 4-bit weights take the slow path in plain torch: no C++ compiler")


def test_a_cache_that_cannot_be_written_means_the_reference_and_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = use(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert said.startswith("1 False 4-bit weights take the slow path in plain torch: the cache folder")


def test_a_compiler_that_fails_means_the_reference_and_is_said_once(tmp_path: Path) -> None:
    for name in ("c++", "g++"):
        fake = tmp_path / name
        fake.write_text("#!/bin/sh\necho 'fatal error: it is broken' >&2\nexit 1\n")
        fake.chmod(0o755)
    said = use(PATH=f"{tmp_path}:{os.environ['PATH']}", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert said.startswith("1 False") and "it is broken" in said


def test_the_reference_can_be_asked_for_and_then_nothing_is_said(tmp_path: Path) -> None:
    assert use(MINILORA_KERNELS="reference", XDG_CACHE_HOME=str(tmp_path)) == "0 False" and list(tmp_path.iterdir()) == []


def test_with_a_compiler_nothing_is_said() -> None:
    assert use() == "0 True"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_kernel_runs_on_torchs_own_openmp_threads() -> None:
    """One OpenMP library before and after, and no thread more than torch had."""
    call = """
import os, re, torch
from pathlib import Path
from minilora.kernels import cpu
from minilora.quant.codebooks import NF4_CODE       # scipy, which this needs, starts threads of its own
def libraries():
    return set(re.findall(r"/\\S*lib(?:gomp|iomp|omp)\\S*", Path("/proc/self/maps").read_text()))
torch.set_num_threads(2)
(torch.randn(600, 600) @ torch.randn(600, 600)).relu_()
before, threads = libraries(), len(os.listdir("/proc/self/task"))
x = torch.randn(1 << 20)
packed, absmax = cpu.kernel().quantize(x, NF4_CODE, 64, 7)
cpu.kernel().dequantize(packed, cpu.Constants(absmax), NF4_CODE, 64, x)
print(before == libraries(), len(before), len(os.listdir("/proc/self/task")) - threads)
"""
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "1", "0"], done.stdout + done.stderr


def other_compiler(folder: Path, name: str, refuses: str = "nothing") -> None:
    """A compiler that compiles, but with the option that it refuses."""
    file = folder / name
    file.write_text(f'#!/bin/sh\ncase " $* " in *" {refuses} "*) echo "error: it knows no {refuses}" >&2; exit 1;; esac\n'
                    f'exec {build.shutil.which("c++")} "$@"\n')
    file.chmod(0o755)


@pytest.mark.skipif(build.openmp_library() is None, reason="torch's OpenMP library is not known")
def test_where_one_compiler_cannot_use_torchs_openmp_the_other_is_asked(tmp_path: Path) -> None:
    other_compiler(tmp_path, "c++", refuses="-fopenmp")
    other_compiler(tmp_path, "g++")
    assert use(PATH=f"{tmp_path}:{os.environ['PATH']}", XDG_CACHE_HOME=str(tmp_path / "cache")) == "0 True"


@pytest.mark.skipif(build.openmp_library() is None, reason="torch's OpenMP library is not known")
def test_where_no_compiler_can_the_kernel_has_one_thread_and_it_is_said_once(tmp_path: Path) -> None:
    for name in ("c++", "g++"):
        other_compiler(tmp_path, name, refuses="-fopenmp")
    call = USE_TWICE + "\nfrom minilora.kernels import block; block.kernel()"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("1 True compiled code for 4-bit weights and blocks runs on one thread: ")
    assert "one thread" not in done.stderr, "the second library says it once more"
