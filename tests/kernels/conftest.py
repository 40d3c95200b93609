"""The kernel in each of its forms: as this machine takes it, and compiled for less."""
from __future__ import annotations

import platform
from pathlib import Path

import pytest

from minilora.kernels import build, cpu

X86 = {"AVX-512": ("-mavx512f", "-mfma"), "AVX2": ("-mavx2", "-mfma"), "plain C++": ("-march=x86-64",)}
NEEDS = {"AVX-512": "avx512f", "AVX2": "avx2", "plain C++": ""}
FORMS = ("native", *(X86 if platform.machine() in ("x86_64", "AMD64") else ()))


def make(form: str) -> cpu.Kernel:
    """The kernel in one form, or a skip that says what is missing."""
    if form != "native" and NEEDS[form] not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {form}")
    try:
        made = cpu.Kernel() if form == "native" else cpu.Kernel(X86[form])
    except build.BuildError as error:
        pytest.skip(str(error))
    assert form in ("native", made.machine)
    return made


@pytest.fixture(scope="session", params=FORMS)
def kernel(request: pytest.FixtureRequest) -> cpu.Kernel:
    return make(request.param)
