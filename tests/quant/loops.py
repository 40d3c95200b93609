"""Quantization as slow loops over Python floats: what the tests hold the tensor code to."""
from __future__ import annotations

import numpy as np


def quantize_loop(values: np.ndarray, code: np.ndarray, blocksize: int) -> tuple[list[int], list[float]]:
    """Codes and absmax by the definition, in float32 arithmetic, the midpoint going to the lower index."""
    codes, absmaxes = [], []
    for start in range(0, len(values), blocksize):
        block = values[start : start + blocksize].astype(np.float32)
        absmax = np.float32(max(abs(float(x)) for x in block))
        inverse = np.float32(1) / np.maximum(absmax, np.float32(1e-38))
        for x in block:
            scaled = np.float32(x * inverse)
            index = 0
            while index < len(code) - 1 and scaled > (code[index] + code[index + 1]) / np.float32(2):
                index += 1
            codes.append(index)
        absmaxes.append(float(absmax))
    return codes, absmaxes


def dequantize_loop(codes: list[int], absmaxes: list[float], code: np.ndarray, blocksize: int) -> list[float]:
    """code[index] * absmax, rounded to float32 once."""
    return [float(np.float32(code[index]) * np.float32(absmaxes[i // blocksize])) for i, index in enumerate(codes)]
