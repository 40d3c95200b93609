"""A block's parts besides its linears, each with a backward that keeps less than autograd would.

Autograd keeps whatever a formula's derivative mentions, in the type it was computed in: of a norm its input in float32, of
attention three float32 copies, of silu(gate) · up three tensors where two would do.  These functions keep their inputs as
they came and work out the rest again: bytes saved at the price of a few cheap passes.  Values and gradients are those of
autograd's own formulas, to the bit (tests/llama/test_frugal.py); but where `kernels.block` has vector code for them (bfloat16
on a CPU with AVX-512, wide rows, heads of 64 and 128) each is made in one pass, in float32, and rounded once.  Without
gradients that code serves narrow rows and heads of 32 too, to the bits of the formulas, attention of one position a sequence,
and attention over trees (`trees`).  On a GPU large SwiGLUs and rotations are made in one pass too (`kernels.block_gpu`).

    norm        x in 16 bits and 1/rms                              instead of x in 32
    SwiGLU      gate and up                                         silu(gate) is worked out again
    rotation    cosines and sines, which all layers share           its backward is the rotation back
    attention   q, k, v in 16 bits, what it gives, log Σ exp        instead of q, k, v in 32
                (what vector code gives is 16-bit too, and is what the projection behind it keeps anyway)

Lesson 08 explains it.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.kernels import block, block_gpu
from minilora.layers import dense
from minilora.llama.recompute import remembered
from minilora.llama.trees import Trees


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fast(*rows: Tensor, stepwise: bool = False) -> block.Kernel | None:
    """The vector code, where it takes such rows: wide ones, or stepwise narrow ones, which it makes to torch's bits."""
    return block.kernel() if block.takes_rows(*rows, stepwise=stepwise) else None


def _fast_swiglu(gate: Tensor, up: Tensor) -> block.Kernel | block_gpu.Kernel | None:
    """The code that makes SwiGLU in one pass, on the CPU or a GPU, where it takes such rows."""
    return block_gpu.kernel(gate.device) if block_gpu.takes_rows(gate, up) else _fast(gate, up)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + ε) in float32, rounded, · weight: (..., size) -> (..., size)."""
    x32 = _wide(x)
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps, ctx.fast = eps, _fast(x, weight)
        if ctx.fast is not None:
            y, inverse = ctx.fast.norm(x, weight, eps)
        else:
            x32 = _wide(x)
            inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)               # (..., 1)
            y = weight * (x32 * inverse).to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        """∂L/∂x = g/rms − x · mean(g · x)/rms³, g = ∂L/∂y · weight."""
        x, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *torch.autograd.grad(plain_rms_norm(x, weight, ctx.eps), x, grads, create_graph=True), None, None
        if ctx.fast is not None:
            return ctx.fast.norm_backward(grads[0], x, weight, inverse), None, None
        g, x32 = _wide(grads[0] * weight), _wide(x)
        # −½ · inverse³ · Σ g x / size, times d(x²)/dx = 2 x: halving and doubling round nothing.
        share = -(g * x32).sum(-1, keepdim=True) * inverse.pow(3) / x.shape[-1]            # (..., 1)
        return (g.mul_(inverse)).add_(share * x32).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`plain_rms_norm`, of which a 16-bit x is kept as it is, where the weight is frozen.

    On a GPU it is torch's own, one pass for each direction, which keeps as little; there the result is rounded once.
    """
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    wanted = torch.is_grad_enabled()
    if wanted and x.requires_grad and not weight.requires_grad:
        return _RMSNorm.apply(x, weight, eps)
    if not (wanted and weight.requires_grad):
        for stepwise in (False, True):
            if (fast := _fast(x, weight, stepwise=stepwise)) is not None:
                return fast.norm(x, weight, eps, stepwise)[0]
    return plain_rms_norm(x, weight, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.fast = _fast_swiglu(gate, up)
        return F.silu(gate).mul_(up) if ctx.fast is None else ctx.fast.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return torch.autograd.grad(F.silu(gate) * up, (gate, up), grads, create_graph=True)
        grad_y, = grads
        if ctx.fast is not None:
            return ctx.fast.swiglu_backward(grad_y, gate, up)
        return torch.ops.aten.silu_backward(grad_y * up, gate), F.silu(gate).mul_(grad_y)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, both (..., inner)."""
    if gate.requires_grad and up.requires_grad:
        return _SwiGLU.apply(gate, up)
    if not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)):
        if (fast := _fast_swiglu(gate, up)) is not None:
            return fast.swiglu(gate, up)
        if (narrow := _fast(gate, up, stepwise=True)) is not None:
            return narrow.swiglu(gate, up, True)
    return F.silu(gate) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    for stepwise in (False, True):
        if block.takes_rotation(x, cos, sin, stepwise) and (fast := block.kernel()) is not None:
            return fast.rotation(x, cos, sin, stepwise)
    if block_gpu.takes_rotation(x, cos, sin) and (on_gpu := block_gpu.kernel(x.device)) is not None:
        return on_gpu.rotation(x, cos, sin)
    half = x.shape[-1] // 2
    rotated = x * cos
    if x.is_cuda:           # two passes less, each element rounded twice and not three times
        rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return rotated
    rotated[..., :half].sub_(x[..., half:] * sin[..., :half])
    rotated[..., half:].add_(x[..., :half] * sin[..., half:])
    return rotated


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The inverse of a rotation is the one back."""
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grads[0], cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of x, (B, H, T, d), by angles whose cosines and sines, (B, 1, T, d), are the same in both
    halves."""
    return _Rotation.apply(x, cos, sin) if x.requires_grad else _rotate(x, cos, sin)


class _FastAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: block.Kernel) -> Tensor:
        y, log_sum = remembered(lambda: kernel.attention(q, k, v))
        ctx.save_for_backward(q, k, v, y, log_sum)
        ctx.kernel = kernel
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernel.attention_backward(grads[0], *ctx.saved_tensors), None


class _CausalAttention(torch.autograd.Function):
    """Trap: called by its name, torch's attention checks nothing; heads that share keys it takes since 2.9 (pyproject.toml)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, log_sum = remembered(lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.float(), k.float(), v.float(), 0.0, True))
        ctx.save_for_backward(q, k, v, y, log_sum)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, y, log_sum = ctx.saved_tensors
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[0], q.float(), k.float(), v.float(), y, log_sum, 0.0, True)
        return tuple(grad.to(q.dtype) for grad in found)


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attention` of one position a sequence, as in decoding: two small products, in float32.

    Heads that share keys are rows of one matrix.  Trap: torch's flash attention takes heads one by one, and unpacks 16-bit
    keys anew for each: thirteen times as long for 16 sequences and 8 heads a key (torch 2.13).
    """
    batch, heads, _, width = q.shape
    shared = q.float().view(batch, k.shape[1], -1, width)                                  # (B, Hkv, H / Hkv, d)
    scores = (shared @ k.float().transpose(-1, -2)) * width ** -0.5                        # (B, Hkv, H / Hkv, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype).view(batch, heads, 1, width)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Trees | None) -> Tensor:
    """softmax(q·kᵀ / √d)·v over the positions of the mask, or, without one, over those up to one's own.

    Args: q: (B, H, T, d). k, v: (B, Hkv, S, d), each read by H / Hkv heads of q. mask: bool (B, 1, T, S), trees, or None.
    Returns: (B, H, T, d); on a CPU where gradients are wanted in float32, but for heads that `kernels.block` takes.
    """
    if isinstance(mask, Trees):
        return mask.attention(q, k, v)
    if q.shape[2] == 1 and q.device.type == "cpu" and q.dtype != torch.float32 and not q.requires_grad:
        wanted = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        fast = block.kernel() if block.takes_query(q, k, v) and not wanted else None
        return _one_query(q, k, v, mask) if fast is None else fast.query(q, k, v, mask)
    causal, shared = mask is None and q.shape[2] > 1, q.shape[1] != k.shape[1]
    fast = block.kernel() if causal and block.takes_attention(q, k, v) else None
    if fast is not None:
        wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return _FastAttention.apply(q, k, v, fast) if wanted else fast.attention(q, k, v)[0]
    # Trap: on the CPU the backward of attention is four times slower in bfloat16 than in float32 (torch 2.13), also where it
    # is autocast that asks for bfloat16.
    if q.requires_grad and q.device.type == "cpu":
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            if causal and q.dtype != wide and q.dtype == k.dtype == v.dtype:
                return _CausalAttention.apply(q, k, v)
            return F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), attn_mask=mask, is_causal=causal,
                                                  enable_gqa=shared)
    return dense.attention(q, k, v, mask, causal)
