"""SwiGLU and rotations in Triton: each number is read once, taken in float32, rounded once and written once.

torch takes two operations for SwiGLU and four for its gradients, three for a rotation, and each reads and writes all of it.  A
GPU is bound by just that.  `block_gpu.py` launches these, and imports them where it needs them alone.

Shapes: N elements of a tile; H heads of a position, D pairs (i, i + d/2) of a head.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu(y: tl.tensor, gate: tl.tensor, up: tl.tensor, n: tl.tensor, TILE: tl.constexpr) -> None:
    """y = gate σ(gate) up, TILE of n elements a program."""
    element_N = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    gate_N = tl.load(gate + element_N, mask=element_N < n, other=0.0).to(tl.float32)
    up_N = tl.load(up + element_N, mask=element_N < n, other=0.0).to(tl.float32)
    y_N = gate_N * _sigmoid(gate_N) * up_N
    tl.store(y + element_N, y_N.to(y.dtype.element_ty), mask=element_N < n)


@triton.jit
def swiglu_backward(by_gate: tl.tensor, by_up: tl.tensor, grad: tl.tensor, gate: tl.tensor, up: tl.tensor, n: tl.tensor,
                    TILE: tl.constexpr) -> None:
    """∂L/∂gate = g up σ (1 + gate (1 − σ)) and ∂L/∂up = g gate σ, with g = ∂L/∂y and σ of gate."""
    element_N = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    grad_N = tl.load(grad + element_N, mask=element_N < n, other=0.0).to(tl.float32)
    gate_N = tl.load(gate + element_N, mask=element_N < n, other=0.0).to(tl.float32)
    up_N = tl.load(up + element_N, mask=element_N < n, other=0.0).to(tl.float32)
    sigmoid_N = _sigmoid(gate_N)
    by_gate_N = grad_N * up_N * sigmoid_N * (1.0 + gate_N * (1.0 - sigmoid_N))
    tl.store(by_gate + element_N, by_gate_N.to(by_gate.dtype.element_ty), mask=element_N < n)
    tl.store(by_up + element_N, (grad_N * gate_N * sigmoid_N).to(by_up.dtype.element_ty), mask=element_N < n)


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + e⁻ˣ), by the side on which the power is at most 1: no infinity comes of a finite number."""
    power = tl.exp(-tl.abs(x))
    return tl.where(x < 0, power, 1.0) / (1.0 + power)


@triton.jit
def rotation(y: tl.tensor, x: tl.tensor, cos: tl.tensor, sin: tl.tensor, heads: tl.tensor, length: tl.tensor,
             x_batch: tl.tensor, x_head: tl.tensor, x_row: tl.tensor, SAME: tl.constexpr, HEADS: tl.constexpr,
             HALF: tl.constexpr) -> None:
    """y₁ = x₁ cos₁ − x₂ sin₁ and y₂ = x₂ cos₂ + x₁ sin₂ for the halves 1 and 2 of each head, a position a program.

    x: (B, H, T, d) with strides, d side by side. y: (B, T, H, d). cos, sin: (B, T, d), or where SAME (T, d) for all sequences.
    """
    place = tl.program_id(0).to(tl.int64)
    batch, row = place // length, place % length
    head_H = tl.arange(0, HEADS).to(tl.int64)
    pair_D = tl.arange(0, HALF)
    valid_HD = (head_H < heads)[:, None] & (pair_D >= 0)[None, :]
    from_HD = x + batch * x_batch + row * x_row + head_H[:, None] * x_head + pair_D[None, :]
    first_HD = tl.load(from_HD, mask=valid_HD, other=0.0).to(tl.float32)
    second_HD = tl.load(from_HD + HALF, mask=valid_HD, other=0.0).to(tl.float32)
    angle_D = (row if SAME else place) * (2 * HALF) + pair_D
    cos_1, sin_1 = tl.load(cos + angle_D).to(tl.float32), tl.load(sin + angle_D).to(tl.float32)
    cos_2, sin_2 = tl.load(cos + angle_D + HALF).to(tl.float32), tl.load(sin + angle_D + HALF).to(tl.float32)
    to_HD = y + (place * heads + head_H[:, None]) * (2 * HALF) + pair_D[None, :]
    tl.store(to_HD, (first_HD * cos_1[None, :] - second_HD * sin_1[None, :]).to(y.dtype.element_ty), mask=valid_HD)
    tl.store(to_HD + HALF, (second_HD * cos_2[None, :] + first_HD * sin_2[None, :]).to(y.dtype.element_ty), mask=valid_HD)
