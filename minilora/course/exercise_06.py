"""Exercise 06: double quantization of the block constants, back again, and what it saves."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minilora.course.grading import Mistake, Task
from minilora.quant.blockwise import quantize_blockwise
from minilora.quant.codebooks import DYNAMIC_8BIT
from minilora.quant.nf4 import NestedAbsmax, quantize_nf4

Encoded = tuple[Tensor, Tensor, float]


def _encode(absmax: Tensor) -> Encoded:
    nested = NestedAbsmax.encode(absmax)
    return nested.codes, nested.absmax, nested.offset


def _but_for_an_edge(answer: Callable[[Tensor], Encoded], absmax: Tensor) -> Encoded:
    """A mean in float64 is right as well: a constant or two then lie beyond the edge between two codes, which is let pass."""
    codes, nested, offset = answer(absmax)
    right = _encode(absmax)[0]
    if isinstance(codes, Tensor) and (codes.dtype, codes.shape) == (right.dtype, right.shape):
        off = (codes.int() - right.int()).abs()
        codes = right if off.max() <= 1 and off.sum() <= 2 else codes
    return codes, nested, offset


def _around(absmax: Tensor, offset: float, blocksize: int = 256) -> Encoded:
    return *quantize_blockwise(absmax - offset, DYNAMIC_8BIT, blocksize), offset


def _linear(absmax: Tensor) -> Encoded:
    offset = float(absmax.mean())
    return *quantize_blockwise(absmax - offset, torch.arange(-127, 128) / 127, 256), offset


def _decode(codes: Tensor, nested_absmax: Tensor, offset: float) -> Tensor:
    return NestedAbsmax(codes, nested_absmax, offset).decode()


def _spread(nested_absmax: Tensor, codes: Tensor) -> Tensor:
    return nested_absmax.repeat_interleave(256)[: len(codes)]


def _bits(blocksize: int, nested_blocksize: int) -> float:
    if nested_blocksize == 256:
        return quantize_nf4(torch.ones(blocksize * nested_blocksize), blocksize).bits_per_param
    return 4 + (8 + 32 / nested_blocksize) / blocksize


def _constants(generator: torch.Generator) -> tuple[Tensor]:
    return ((2.5 + 0.4 * torch.randn(600, generator=generator)).abs(),)


def _encoded(generator: torch.Generator) -> Encoded:
    return _encode(*_constants(generator))


TASKS = (
    Task("encode_absmax", _encode, fixed=((torch.tensor([1.0, 2.0, 3.0, 2.5]),),), random=_constants,
         probe=_but_for_an_edge, mistakes=(
        Mistake("the mean is not subtracted: all constants are positive, so half of a signed table would never be used",
                lambda absmax: _around(absmax, 0.0)),
        Mistake("you subtracted the smallest constant: it is their mean", lambda absmax: _around(absmax, float(absmax.min()))),
        Mistake("one nested constant for all: every 256 block constants have their own",
                lambda absmax: _around(absmax, float(absmax.mean()), 1 << 30)),
        Mistake("that is the block size of the weights: 256 constants share a nested one",
                lambda absmax: _around(absmax, float(absmax.mean()), 64)),
        Mistake("those are evenly spaced 8-bit levels: the table is the signed dynamic map, DYNAMIC_8BIT", _linear))),
    Task("decode_absmax", _decode, fixed=(_encode(torch.tensor([1.0, 2.0, 3.0, 2.5])),), random=_encoded, mistakes=(
        Mistake("the mean that was subtracted has to be added again",
                lambda codes, nested, offset: DYNAMIC_8BIT[codes.int()] * _spread(nested, codes)),
        Mistake("you added the offset before scaling: decode first, then add",
                lambda codes, nested, offset: (DYNAMIC_8BIT[codes.int()] + offset) * _spread(nested, codes)),
        Mistake("the nested constants are missing: the map's levels lie between -1 and 1",
                lambda codes, nested, offset: DYNAMIC_8BIT[codes.int()] + offset),
        Mistake("you used the codes as numbers: they are indices into DYNAMIC_8BIT",
                lambda codes, nested, offset: (codes.float() - 127) / 128 * _spread(nested, codes) + offset))),
    Task("bits_per_weight", _bits, fixed=((64, 256), (32, 256), (128, 64)), mistakes=(
        Mistake("you left out the float32 constants of the constants: 32 bits for every blocksize * nested_blocksize weights",
                lambda b, n: 4 + 8 / b),
        Mistake("a nested constant serves nested_blocksize blocks, which is blocksize times as many weights",
                lambda b, n: 4 + 8 / b + 32 / n),
        Mistake("that is what it costs without double quantization", lambda b, n: 4 + 32 / b),
        Mistake("the float32 constants are replaced by 8-bit codes, not kept beside them",
                lambda b, n: 4 + (32 + 8 + 32 / n) / b),
        Mistake("the weights stay 4-bit codes: it is their constants that go into 8 bits", lambda b, n: 8 + 32 / b))),
)
