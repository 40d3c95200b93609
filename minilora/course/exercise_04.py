"""Exercise 04: block-wise quantization against any table of levels, back again, and what it costs."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.course.grading import Mistake, Task
from minilora.kernels.reference import nearest_codes
from minilora.quant.blockwise import dequantize_blockwise, quantize_blockwise
from minilora.quant.nf4 import quantize_nf4

EVEN = torch.linspace(-1, 1, 5)


def _blocks(x: Tensor, blocksize: int) -> Tensor:
    flat = x.flatten()
    return F.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)


def _with_scale(x: Tensor, code: Tensor, blocksize: int, absmax: Tensor) -> tuple[Tensor, Tensor]:
    scaled = _blocks(x, blocksize) / absmax[:, None]
    return nearest_codes(scaled.flatten()[: x.numel()], code), absmax


def _without_abs(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return _with_scale(x, code, blocksize, _blocks(x, blocksize).amax(1))


def _one_constant(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return _with_scale(x, code, blocksize, x.abs().max().expand(-(-x.numel() // blocksize)))


def _ties_up(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    absmax = _blocks(x, blocksize).abs().amax(1)
    scaled = (_blocks(x, blocksize) / absmax[:, None]).flatten()[: x.numel()]
    return torch.bucketize(scaled, (code[1:] + code[:-1]) / 2, right=True).to(torch.uint8), absmax


def _level_below(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    absmax = _blocks(x, blocksize).abs().amax(1)
    scaled = (_blocks(x, blocksize) / absmax[:, None]).flatten()[: x.numel()]
    return (torch.searchsorted(code, scaled, right=True) - 1).to(torch.uint8), absmax


def _unscaled(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return nearest_codes(x.flatten(), code), _blocks(x, blocksize).abs().amax(1)


def _by_rows(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    parts = [quantize_blockwise(row, code, blocksize) for row in x.view(-1, x.shape[-1])]
    return torch.cat([codes for codes, _ in parts]), torch.cat([absmax for _, absmax in parts])


def _draw(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    width = int(torch.randint(3, 12, (), generator=generator))
    return torch.randn(4, width, generator=generator) * 3, EVEN, int(torch.randint(2, 9, (), generator=generator))


def _draw_codes(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    x, code, blocksize = _draw(generator)
    return *quantize_blockwise(x, code, blocksize), code.square() * code.sign(), blocksize


def _tiled(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    return code[codes.int()] * absmax.repeat(blocksize)[: len(codes)]


def _bits(blocksize: int) -> float:
    return quantize_nf4(torch.ones(blocksize * 16), blocksize, double_quant=False).bits_per_param


TASKS = (
    Task("quantize_blocks", quantize_blockwise, random=_draw,
         fixed=((torch.tensor([1.0, 0.25, -4.0, 2.0]), EVEN, 2), (torch.tensor([[8.0, 1.0, 0.5], [-2.0, -1.0, 4.0]]), EVEN, 2)),
         mistakes=(
        Mistake("you scaled by the largest value, not by the largest absolute one: -4 is larger than 2", _without_abs),
        Mistake("one constant for the whole tensor: each block of `blocksize` elements has its own", _one_constant),
        Mistake("a value half-way between two levels takes the lower one here (as in bitsandbytes); yours goes up", _ties_up),
        Mistake("you took the level below, not the nearest: compare with the midpoints between levels", _level_below),
        Mistake("you looked up unscaled values: divide each block by its constant first, the levels go from -1 to 1",
                _unscaled),
        Mistake("you began a new block in each row: blocks run over the flattened tensor, whatever its shape", _by_rows))),
    Task("dequantize_blocks", dequantize_blockwise, random=_draw_codes,
         fixed=((torch.tensor([0, 4, 2, 3], dtype=torch.uint8), torch.tensor([2.0, 10.0]), EVEN, 2),), mistakes=(
        Mistake("you divided by the constant: quantizing divides, going back multiplies",
                lambda codes, absmax, code, blocksize: code[codes.int()] / absmax.repeat_interleave(blocksize)[: len(codes)]),
        Mistake("you repeated the constants in turn (a b a b): a block is `blocksize` neighbours, so it is a a b b", _tiled),
        Mistake("the constants are missing: those are the levels between -1 and 1",
                lambda codes, absmax, code, blocksize: code[codes.int()]),
        Mistake("you used the code as a number: it is an index into the table",
                lambda codes, absmax, code, blocksize: codes.float() * absmax.repeat_interleave(blocksize)[: len(codes)]))),
    Task("bits_per_weight", _bits, fixed=((64,), (32,), (256,), (4096,)), mistakes=(
        Mistake("that counts the codes alone: each block has a float32 constant as well", lambda blocksize: 4.0),
        Mistake("the constant is shared by the block: divide its 32 bits by the block size", lambda blocksize: 36.0),
        Mistake("the constant is a float32: 32 bits, not 16", lambda blocksize: 4 + 16 / blocksize),
        Mistake("that is bytes and bits mixed: a float32 is 4 bytes, but 32 bits", lambda blocksize: 4 + 4 / blocksize))),
)
