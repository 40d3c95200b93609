"""What the vector code for blocks takes, as ctypes: its structures, and where tensors lie."""
from __future__ import annotations

import ctypes

import torch
from torch import Tensor


class View(ctypes.Structure):
    """`struct View` of block_rows.h."""

    _fields_ = (("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64))


class Attention(ctypes.Structure):
    """`struct Attention` of block_attention.cpp."""

    _fields_ = (*((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "length")), ("scale", ctypes.c_float),
                *((name, View) for name in ("q", "k", "v", "o", "d_o", "d_q", "d_k", "d_v")), ("log_sum", ctypes.c_void_p))


class SwiGLU(ctypes.Structure):
    """`struct SwiGLU` of block_rows.h."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("gate", "up", "d_y", "y", "d_gate", "d_up")),
                ("stepwise", ctypes.c_int64))


class Norm(ctypes.Structure):
    """`struct Norm` of block_rows.h."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("x", "weight", "d_y", "y", "d_x", "inverse")),
                *((name, ctypes.c_int64) for name in ("rows", "size", "stepwise")), ("eps", ctypes.c_float))


class Rotation(ctypes.Structure):
    """`struct Rotation` of block_rows.h."""

    _fields_ = (("x", View), ("y", View), ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p),
                *((name, ctypes.c_int64) for name in ("heads", "length", "head_dim", "same", "stepwise")))


class Query(ctypes.Structure):
    """`struct Query` of block_query.h."""

    _fields_ = (*((name, View) for name in "qkvo"), ("mask", ctypes.c_void_p),
                *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "length", "head_dim", "mask_row")),
                ("scale", ctypes.c_float))


class Trees(ctypes.Structure):
    """`struct Trees` of block_trees.h."""

    _fields_ = (*((name, View) for name in "qkvo"),
                *((name, ctypes.c_void_p) for name in ("keys", "starts", "asking", "positions", "visible")),
                *((name, ctypes.c_int64) for name in ("groups", "heads", "kv_heads", "nodes", "head_dim")),
                ("scale", ctypes.c_float))


class Linear(ctypes.Structure):
    """`struct Linear` of block_token.h."""

    _fields_ = (("weight", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("out", "in_", "r")),
                *((name, ctypes.c_void_p) for name in ("bias", "a", "b")), ("scaling", ctypes.c_float))


class Layer(ctypes.Structure):
    """`struct Layer` of block_token.h."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("input_norm", "post_attention_norm")),
                *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
                *((name, ctypes.c_void_p) for name in ("keys", "values", "mask")), ("mask_row", ctypes.c_int64))


class Token(ctypes.Structure):
    """`struct Token` of block_token.h."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("x", "cos", "sin")),
                *((name, ctypes.c_int64) for name in ("batch", "hidden", "inner", "heads", "kv_heads", "head_dim", "past",
                                                      "room", "same", "layers", "widest", "rank")),
                *((name, ctypes.c_float) for name in ("eps", "scale")),
                *((name, ctypes.c_void_p) for name in ("product", "dense_product")))


def address(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> int:
    """Where the elements of a contiguous tensor lie; C code believes what it is told, so what it can't read stops here."""
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(f"the kernel takes contiguous {dtype} {shape} on the CPU, not {x.dtype} {tuple(x.shape)} with strides "
                         f"{x.stride()} on {x.device}")
    return x.data_ptr()


def view(x: Tensor, shape: tuple[int, ...]) -> View:
    """Where the elements of a tensor with adjacent columns lie, and its other strides."""
    if x.dtype != torch.bfloat16 or x.shape != shape or x.stride(-1) != 1 or x.device.type != "cpu":
        raise ValueError(f"the kernel takes bfloat16 {shape} with adjacent columns on the CPU, not {x.dtype} {tuple(x.shape)} "
                         f"with strides {x.stride()} on {x.device}")
    return View(x.data_ptr(), *x.stride()[:3])


def empty(batch: int, heads: int, length: int, head_dim: int) -> Tensor:
    """(B, H, T, d) that lies as (B, T, H, d), as projections want it."""
    return torch.empty(batch, length, heads, head_dim, dtype=torch.bfloat16, device="cpu").transpose(1, 2)
