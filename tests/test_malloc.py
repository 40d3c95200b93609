"""What is freed stays in the process, for the next tensor."""
from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from minilora.malloc import keep_freed_memory
if KEEP:
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def tensors():
    for tensor in [torch.ones(1 << 20) for _ in range(8)]:
        del tensor
tensors()
before = faults()
for _ in range(20):
    tensors()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is asked")
def test_tensors_made_again_take_no_new_pages() -> None:
    kept, given_back = (int(subprocess.run([sys.executable, "-c", CODE.replace("KEEP", keep)], capture_output=True, text=True,
                                           check=True).stdout) for keep in ("True", "False"))
    # Of 20 times 8 tensors of 4 MiB, each 1,024 pages.
    assert kept < 2_000 < given_back
