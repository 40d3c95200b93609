"""Exercise 08: RMSNorm, the rotation of positions, shared key/value heads, and SwiGLU."""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.course.grading import Mistake, Task
from minilora.llama.frugal import attention, plain_rms_norm, rotate, swiglu

EPS = 1e-5


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return plain_rms_norm(x, weight, EPS)


def _eps_outside(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + EPS) * weight


def _layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, eps=EPS)


def _unit_length(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS) * weight


def _draw_norm(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 8, generator=generator) * 0.01 + 0.005, torch.randn(8, generator=generator)


def _angles(x: Tensor, base: float = 10_000.0) -> Tensor:
    d = x.shape[-1]
    frequencies = base ** (-torch.arange(0, d, 2) / d)
    return torch.arange(x.shape[-2])[:, None] * frequencies                                # (T, d/2)


def _rotate(x: Tensor) -> Tensor:
    angles = torch.cat((_angles(x), _angles(x)), -1)
    return rotate(x[None, None], angles.cos()[None, None], angles.sin()[None, None])[0, 0]


def _neighbours(x: Tensor) -> Tensor:
    angles, first, second = _angles(x), x[:, 0::2], x[:, 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(1)


def _backwards(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = _angles(x).cos(), _angles(x).sin()
    return torch.cat((first * cos + second * sin, second * cos - first * sin), -1)


def _one_frequency(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    angle = torch.arange(len(x))[:, None].float()
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def _from_one(x: Tensor) -> Tensor:
    return _rotate(torch.cat((x[:1], x)))[1:]


def _shared_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q[None], k[None], v[None], None)[0].to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def _repeated(k: Tensor, q: Tensor) -> Tensor:
    return k.repeat_interleave(len(q) // len(k), 0)


def _read(head: Callable[[int, int, int], int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention in which query head h reads the key/value head that is given for h, H and Hkv."""
    def answer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of = [head(h, len(q), len(k)) for h in range(len(q))]
        return _attend(q, k[of], v[of])
    return answer


def _heads(generator: torch.Generator, heads: int, shared: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(count, 5, 8, generator=generator) for count in (heads, shared, shared))
    return q, k, v


def _draw_heads(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return _heads(generator, *HEADS[int(torch.randint(len(HEADS), (), generator=generator))])


def _draw_pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 6, generator=generator) * 2, torch.randn(3, 6, generator=generator)


# Heads of queries, and of keys and values.  First those where a wrong head is there: to read one that is not there only raises.
HEADS = ((6, 3), (4, 4), (4, 2), (6, 2), (8, 2), (4, 1))
TASKS = (
    Task("rms_norm", _norm, fixed=((torch.tensor([[3.0, -1.0, 2.0]]), torch.ones(3)),), random=_draw_norm, mistakes=(
        Mistake("you subtracted the mean: that is LayerNorm; RMSNorm only divides", _layer_norm),
        Mistake("you divided by the length: it is the root of the *mean* square, not of the sum", _unit_length),
        Mistake("eps belongs under the root, beside the mean square", _eps_outside),
        Mistake("the weight is missing: each entry is multiplied by its own at the end",
                lambda x, weight: _norm(x, torch.ones_like(weight))))),
    Task("rotate", _rotate, fixed=(), tolerance=1e-4, random=lambda generator: (torch.randn(4, 8, generator=generator),),
         mistakes=(
        Mistake("you paired neighbours: Hugging Face's checkpoints pair entry i with entry i + d/2", _neighbours),
        Mistake("you turned the other way: (x1 cos - x2 sin, x2 cos + x1 sin)", _backwards),
        Mistake("all pairs turn at the same speed: pair i has the frequency 10000^(-2i/d)", _one_frequency),
        Mistake("positions begin at 0: the first token is not turned at all", _from_one))),
    Task("shared_heads", _shared_heads, random=_draw_heads, tolerance=1e-4,
         fixed=tuple(_heads(torch.Generator().manual_seed(0), *counts) for counts in HEADS), mistakes=(
        Mistake("query head h reads key head h // (H // Hkv), not h % Hkv: neighbours share",
                _read(lambda h, heads, shared: h % shared)),
        Mistake("you divided h by the number of key heads: H // Hkv query heads share one, so divide by that",
                _read(lambda h, heads, shared: h // shared)),
        Mistake("you wrote down that two query heads share a key head: it is H // Hkv of them",
                _read(lambda h, heads, shared: h // 2)),
        Mistake("a position may not see the ones after it: the mask is missing",
                lambda q, k, v: _attend(q, _repeated(k, q), _repeated(v, q), causal=False)),
        Mistake("scores are divided by the root of the head's size",
                lambda q, k, v: _attend(q, _repeated(k, q), _repeated(v, q), scale=1.0)),
        Mistake("scores are divided by the *root* of the head's size, not by the size",
                lambda q, k, v: _attend(q, _repeated(k, q), _repeated(v, q), scale=1 / q.shape[-1])))),
    Task("swiglu", swiglu, fixed=((torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])),), random=_draw_pair, mistakes=(
        Mistake("silu goes over the gate, not over `up`", lambda gate, up: gate * F.silu(up)),
        Mistake("that is sigmoid: silu(x) is x times it", lambda gate, up: torch.sigmoid(gate) * up),
        Mistake("that is GELU: Llama has silu", lambda gate, up: F.gelu(gate) * up),
        Mistake("the gate multiplies, it is not added", lambda gate, up: F.silu(gate) + up))),
)
