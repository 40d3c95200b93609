"""One token a sequence through all blocks of a Llama in one call: `block_token.h`, which says what for, called with tensors."""
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora.kernels import block, block_calls, cpu


@dataclass(frozen=True)
class Linear:
    """A linear layer over 4-bit weights: y = x Ŵᵀ + b, and with an update + scaling · (x Aᵀ) Bᵀ.

    Attributes:
        packed, constants, code, blocksize: Ŵ, as `cpu.Kernel.product` takes it. shape: (out, in).
        bias: (out,) float32, or None. update: A (r, in) and B (out, r) in bfloat16, and the scaling; or None.
    """

    packed: Tensor
    constants: cpu.Constants
    code: Tensor
    blocksize: int
    shape: tuple[int, int]
    bias: Tensor | None = None
    update: tuple[Tensor, Tensor, float] | None = None


@dataclass(frozen=True)
class Block:
    """A block's norms, (hidden,) bfloat16, and its linears."""

    input_norm: Tensor
    post_attention_norm: Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear

    @property
    def linears(self) -> dict[str, Linear]:
        """By the names that block_token.h has for them."""
        return {name: getattr(self, name) for name in ("q", "k", "v", "o", "gate", "up", "down")}


class TokenStep:
    """All blocks of a model over one cache; the tensors are held, and read where they lie.

    Args:
        kernel, products: the two libraries.
        keys, values: (blocks, B, Hkv, room, d) bfloat16, contiguous: the cache. heads: H. eps: of the norms.

    Raises: ValueError: shapes or types don't fit.
    """

    def __init__(self, kernel: block.Kernel, products: cpu.Kernel, blocks: Sequence[Block], keys: Tensor, values: Tensor,
                 heads: int, eps: float) -> None:
        count, batch, kv_heads, room, head_dim = keys.shape
        (hidden,), (inner, _) = blocks[0].input_norm.shape, blocks[0].gate.shape
        shapes = {"q": (heads * head_dim, hidden), "k": (kv_heads * head_dim, hidden), "v": (kv_heads * head_dim, hidden),
                  "o": (hidden, heads * head_dim), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        updates = [linear.update for each in blocks for linear in each.linears.values() if linear.update is not None]
        if (count != len(blocks) or head_dim not in block.HEAD_DIMS or heads % kv_heads or hidden % 16 or inner % 16
                or any(each.linears[name].shape != shape for each in blocks for name, shape in shapes.items())
                or (updates and batch > products.dense_rows)):
            raise ValueError(f"the kernel takes blocks of one shape, rows of a multiple of 16, heads of {block.HEAD_DIMS}, and "
                             f"updates for at most {products.dense_rows} sequences, not {len(blocks)} of {hidden} and {inner} "
                             f"with heads of {head_dim}, over a cache of {tuple(keys.shape)}")
        self._kernel, self._held = kernel, (products, tuple(blocks), keys, values)
        self._packed = [_packed(products, linear) for each in blocks for linear in each.linears.values()]
        packed = iter(self._packed)
        self._layers = (block_calls.Layer * count)(*(block_calls.Layer(
            block_calls.address(each.input_norm, (hidden,)), block_calls.address(each.post_attention_norm, (hidden,)),
            *(_linear(linear, next(packed)) for linear in each.linears.values()),
            block_calls.address(keys[index], tuple(keys.shape[1:])), block_calls.address(values[index], tuple(keys.shape[1:])))
            for index, each in enumerate(blocks)))
        self._token = block_calls.Token(
            batch=batch, hidden=hidden, inner=inner, heads=heads, kv_heads=kv_heads, head_dim=head_dim, room=room, layers=count,
            widest=max((len(b) for _, b, _ in updates), default=0), rank=max((len(a) for a, _, _ in updates), default=0),
            eps=eps, scale=head_dim ** -0.5, product=products.product_address, dense_product=products.dense_address)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, masks: Sequence[Tensor | None], past: int) -> Tensor:
        """What the blocks make of x; its keys and values are stored behind the cache's first `past` tokens.

        Args:
            x: (B, 1, hidden) bfloat16. cos, sin: (B or 1, 1, 1, d) bfloat16.
            masks: for each block bool (B or 1, 1, 1, past + 1), True = may attend, or None for all.

        Returns: (B, 1, hidden).
        Guarantee: the bits of the operations one by one (tests/llama/test_decoding.py).
        """
        token, room = self._token, self._token.room
        if len(masks) != token.layers or not 0 <= past < room or cos.shape[0] not in (1, token.batch):
            raise ValueError(f"the kernel takes {token.layers} masks, cosines of {token.batch} sequences, or of all, and a "
                             f"token behind fewer than {room}, not {len(masks)}, {tuple(cos.shape)} and {past}")
        y, angles = x.clone(memory_format=torch.contiguous_format), (cos.shape[0], 1, 1, token.head_dim)
        token.x = block_calls.address(y, (token.batch, 1, token.hidden))
        cos, sin = cos.contiguous(), sin.contiguous()           # held until the call is over, as are the masks
        token.cos, token.sin = block_calls.address(cos, angles), block_calls.address(sin, angles)
        token.same, token.past = cos.shape[0] == 1, past
        whole = [None if mask is None else mask.contiguous() for mask in masks]
        for layer, mask in zip(self._layers, whole, strict=True):
            each = mask is not None and len(mask) == token.batch
            layer.mask = None if mask is None else block_calls.address(
                mask, (token.batch if each else 1, 1, 1, past + 1), torch.bool)
            layer.mask_row = past + 1 if each else 0
        self._kernel.token(token, self._layers)
        return y


def _packed(products: cpu.Kernel, linear: Linear) -> Any:
    return products.weight(linear.packed, linear.constants, linear.code, linear.blocksize, linear.shape[0] * linear.shape[1])


def _linear(linear: Linear, packed: Any) -> block_calls.Linear:
    out, in_features = linear.shape
    made = block_calls.Linear(ctypes.addressof(packed), out, in_features)
    if linear.bias is not None:
        made.bias = block_calls.address(linear.bias, (out,), torch.float32)
    if linear.update is not None:
        a, b, made.scaling = linear.update
        made.r = len(a)
        made.a, made.b = block_calls.address(a, (made.r, in_features)), block_calls.address(b, (out, made.r))
    return made
