"""Exercise 17: unpacking a byte at a time, a product over weights that are never put in order, and codes out of words."""
from __future__ import annotations

import torch
from torch import Tensor

from minilora.course.grading import Mistake, Task
from minilora.kernels.reference import dequantize_packed, unpack_nibbles
from minilora.quant.codebooks import NF4_CODE
from minilora.quant.nf4 import quantize_nf4

BLOCKSIZE = 64


def _unpack(packed: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    return dequantize_packed(packed, absmax, NF4_CODE, blocksize, torch.empty(2 * len(packed)))


def _levels(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Of the high nibbles and of the low ones."""
    return NF4_CODE[(packed >> 4).long()], NF4_CODE[(packed & 15).long()]


def _side_by_side(first: Tensor, second: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    return (torch.stack((first, second), dim=1).view(-1, blocksize) * absmax[:, None]).view(-1)


def _numbers(packed: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    return _side_by_side((packed >> 4).float() / 15 * 2 - 1, (packed & 15).float() / 15 * 2 - 1, absmax, blocksize)


def _packed(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    q = quantize_nf4(torch.randn(384, generator=generator), blocksize=32, double_quant=False)
    return q.packed, q.absmax, 32


def _product(packed: Tensor, absmax: Tensor, x: Tensor) -> Tensor:
    return _unpack(packed.reshape(-1), absmax.reshape(-1), BLOCKSIZE).view(len(packed), -1) @ x


def _of_halves(packed: Tensor, absmax: Tensor, first: Tensor, second: Tensor, block_bytes: int = BLOCKSIZE // 2) -> Tensor:
    """High nibbles with `first`, low ones with `second`."""
    scale = absmax.repeat_interleave(block_bytes, dim=1)[:, : packed.shape[1]]
    high, low = _levels(packed)
    return (high * scale) @ first + (low * scale) @ second


def _layer(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    q = quantize_nf4(torch.randn(6, 256, generator=generator), BLOCKSIZE, double_quant=False)
    return q.packed.view(6, -1), q.absmax.view(6, -1), torch.randn(256, generator=generator)


def _codes(words: Tensor) -> Tensor:
    return unpack_nibbles(words.view(torch.uint8).view(-1, 8)[:, :4].reshape(-1), 8 * len(words)).long().view(-1, 8)


def _shifted(words: Tensor, shifts: list[int], mask: int = 15) -> Tensor:
    return torch.stack([words >> shift & mask for shift in shifts], dim=1)


def _words(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randint(0, 1 << 32, (5,), generator=generator),)


IN_ORDER = [4 * (element ^ 1) for element in range(8)]
TASKS = (
    Task("unpack_by_pairs", _unpack, fixed=(), random=_packed, tolerance=0.0, mistakes=(
        Mistake("your nibbles are swapped: the first weight of a byte is in its high nibble",
                lambda packed, absmax, blocksize: _side_by_side(_levels(packed)[1], _levels(packed)[0], absmax, blocksize)),
        Mistake("all high nibbles come first, then all low ones: the two weights of a byte are neighbours",
                lambda packed, absmax, blocksize: (torch.cat(_levels(packed)).view(-1, blocksize) * absmax[:, None]).view(-1)),
        Mistake("the constants are missing: the table's levels lie between -1 and 1",
                lambda packed, absmax, blocksize: torch.stack(_levels(packed), dim=1).view(-1)),
        Mistake("a block is blocksize weights, and that is half as many bytes: its constant serves too many of them",
                lambda packed, absmax, blocksize: _unpack(packed, absmax.repeat_interleave(2)[: len(absmax)], blocksize)),
        Mistake("you used the codes as numbers: they are indices into NF4_CODE", _numbers))),
    Task("even_odd_product", _product, fixed=(), random=_layer, tolerance=1e-4, mistakes=(
        Mistake("your halves are crossed: the high nibbles are weights 0, 2, 4, ..., so they meet the even elements of x",
                lambda packed, absmax, x: _of_halves(packed, absmax, x[1::2], x[0::2])),
        Mistake("x is to be split into even and odd elements, not into its first and its second half",
                lambda packed, absmax, x: _of_halves(packed, absmax, *x.chunk(2))),
        Mistake("a block of 64 weights is 32 bytes: the constant serves 32 high nibbles and 32 low ones",
                lambda packed, absmax, x: _of_halves(packed, absmax, x[0::2], x[1::2], BLOCKSIZE)),
        Mistake("the constants are missing: scale the levels, or each block's part of the sum",
                lambda packed, absmax, x: _of_halves(packed, torch.ones_like(absmax), x[0::2], x[1::2])),
        Mistake("that is one half of the sum: add the low nibbles' product with the odd elements",
                lambda packed, absmax, x: _of_halves(packed, absmax, x[0::2], torch.zeros_like(x[1::2]))))),
    Task("word_codes", _codes, fixed=((torch.tensor([0x12345678, 0xFEDCBA98]),),), random=_words, mistakes=(
        Mistake("your nibbles are swapped: the first weight of a byte is in its *high* nibble, so the shifts begin with 4, 0",
                lambda words: _shifted(words, list(range(0, 32, 4)))),
        Mistake("you began at the word's first bits: the first byte is in its *last* eight",
                lambda words: _shifted(words, list(range(28, -4, -4)))),
        Mistake("you began with the word's last byte, and swapped its nibbles as well: the shifts begin with 4, 0",
                lambda words: _shifted(words, [shift ^ 4 for shift in range(28, -4, -4)])),
        Mistake("what stands before the code is still there: keep the last four bits",
                lambda words: _shifted(words, IN_ORDER, 0xFFFFFFFF)),
        Mistake("a code has four bits: you kept eight", lambda words: _shifted(words, IN_ORDER, 255)))),
)
