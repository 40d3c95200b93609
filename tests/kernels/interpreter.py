"""Triton's kernels without a GPU: a process of its own runs them in Triton's interpreter, on NumPy.

Triton chooses interpreter or compiler while it is imported, for a whole process; so the tests keep `InterpretedKernel`, all of
`gpu.Kernel` but for the launch, and what is launched goes to the other process and comes back as bytes.

Trap: the interpreter knows no bfloat16 arithmetic.  It cuts float32 to it where the hardware rounds to nearest even (the tests
look for that instruction in the machine code), errs on its subnormals, and multiplies matrices of the raw bits.  The process
is told better here.
"""
from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pytest
import torch

from minilora.kernels import block_gpu, gpu

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TRITON = "Triton is not installed: it comes with torch's CUDA builds on Linux, and with the extra [peers]"
RESULTS = {"swiglu_backward": 2}        # tensors that a kernel writes, where they are more than the first


class Interpreted:
    """A `gpu.Launcher` for tensors on the CPU. `launched` counts the launches by name."""

    def __init__(self) -> None:
        self.launched: dict[str, int] = {}
        self._process = subprocess.Popen([sys.executable, "-m", "tests.kernels.interpreter"], cwd=ROOT, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, env={**os.environ, "TRITON_INTERPRET": "1"})

    def _launch(self, name: str, grid: tuple[int, ...], out: torch.Tensor, *arguments: Any, **sizes: Any) -> None:
        self.launched[name] = self.launched.get(name, 0) + 1
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        pickle.dump((name, grid, out, arguments, {**sizes, **gpu.OPTIONS}), requests)
        requests.flush()
        answer = pickle.load(answers)
        if isinstance(answer, str):
            raise RuntimeError(f"{name} fails in the interpreter: {answer}")
        for tensor, content in zip((out, *arguments), answer, strict=False):
            tensor.copy_(content)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class InterpretedKernel(Interpreted, gpu.Kernel):
    """`gpu.Kernel` for tensors on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.shuffled = False
        self.fused_rows = {**gpu.FUSED_ROWS, torch.float32: 32}         # which is slow on a GPU, and as right


class InterpretedBlock(Interpreted, block_gpu.Kernel):
    """`block_gpu.Kernel` for tensors on the CPU."""


Kind = TypeVar("Kind", InterpretedKernel, InterpretedBlock)


def running(kind: type[Kind]) -> Iterator[Kind]:
    """What a fixture yields."""
    pytest.importorskip("triton", reason=WITHOUT_TRITON)
    kernel = kind()
    yield kernel
    kernel.close()


def teach_bfloat16() -> None:
    """Conversions and products as the hardware takes them."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    original_cast, original_dot = interpreter.InterpreterBuilder.cast_impl, interpreter.InterpreterBuilder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(rounded, target)
        if (source, target) == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widened(src.data), target)
        return original_cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widened(side.data), tl.float32) for side in (a, b))
        return original_dot(self, a, b, d, *rest)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.InterpreterBuilder.create_dot = create_dot


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Launch what is asked for, until there is nothing more."""
    from minilora.kernels import block_triton, product_triton

    teach_bfloat16()
    while True:
        try:
            name, grid, out, arguments, sizes = pickle.load(requests)
        except EOFError:
            return
        try:
            function = getattr(block_triton, name) if hasattr(block_triton, name) else getattr(product_triton, name)
            function[grid](out, *arguments, **sizes)
            answer = (out, *arguments)[:RESULTS.get(name, 1)]
        except Exception as error:      # the test that asked shows it
            answer = repr(error)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    answers_to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)                       # whatever is printed must not stand between the answers
    torch.set_num_threads(1)
    serve(sys.stdin.buffer, answers_to)
