"""Exercise 05: the sixteen levels of NF4, and two codes in a byte."""
from __future__ import annotations

from functools import partial
from statistics import NormalDist

import torch
from torch import Tensor

from minilora.course.grading import Mistake, Task
from minilora.kernels.reference import pack_nibbles, unpack_nibbles
from minilora.quant.codebooks import NF4_CODE, NF4_ZERO, derive_nf4

POSTED = [0.0, 0.076, 0.18, 0.284, 0.394, 0.525, 0.6962, 1.0]      # in a public thread, as the upper half of a table


def _quantiles(probabilities: Tensor) -> Tensor:
    return torch.tensor([NormalDist().inv_cdf(float(p)) for p in probabilities])


def _nf4(offset: float) -> Tensor:
    return torch.from_numpy(derive_nf4(offset)).float()


def _equal_shares() -> Tensor:
    levels = _quantiles((torch.arange(16, dtype=torch.float64) + 0.5) / 16)
    return levels / levels.max()


def _undivided() -> Tensor:
    upper = _quantiles(torch.linspace(0.9677083, 0.5, 9)[:-1])
    lower = _quantiles(torch.linspace(0.9677083, 0.5, 8)[:-1])
    return torch.cat([upper, torch.zeros(1), -lower]).sort().values


def _posted() -> Tensor:
    return torch.tensor([*(-level for level in POSTED[:0:-1]), *POSTED])


def _codes(generator: torch.Generator) -> tuple[Tensor]:
    n = int(torch.randint(3, 20, (), generator=generator))
    return (torch.randint(0, 16, (n,), generator=generator, dtype=torch.uint8),)


def _packed(generator: torch.Generator) -> tuple[Tensor, int]:
    codes, = _codes(generator)
    return pack_nibbles(codes, NF4_ZERO), len(codes)


def _swapped(codes: Tensor) -> Tensor:
    packed = pack_nibbles(codes, NF4_ZERO)
    return packed >> 4 | packed << 4


def _halves(codes: Tensor) -> Tensor:
    codes = torch.cat([codes, codes.new_full((len(codes) % 2,), NF4_ZERO)])
    half = len(codes) // 2
    return codes[:half] << 4 | codes[half:]


def _added(codes: Tensor) -> Tensor:
    codes = torch.cat([codes, codes.new_full((len(codes) % 2,), NF4_ZERO)])
    return codes[0::2] + codes[1::2]


def _swapped_back(packed: Tensor, n: int) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), 1).flatten()[:n]


def _unshifted(packed: Tensor, n: int) -> Tensor:
    return torch.stack((packed & 0xF0, packed & 15), 1).flatten()[:n]


def _blocks_of_nibbles(packed: Tensor, n: int) -> Tensor:
    return torch.cat((packed >> 4, packed & 15))[:n]


TASKS = (
    Task("nf4_levels", lambda: NF4_CODE.clone(), fixed=((),), tolerance=1e-6, mistakes=(
        Mistake("those are the quantiles at (i + 1/2) / 16: they have no zero, and NF4's two halves are made apart",
                _equal_shares),
        Mistake("divide by the largest: the levels must end at -1 and 1, or the largest weight of a block isn't exact",
                _undivided),
        Mistake("the outermost probability is the mean of both half-margins, 1 - (1/30 + 1/32) / 2; you took that of 16 levels",
                lambda: _nf4(1 - 1 / 32)),
        Mistake("the outermost probability is the mean of both half-margins, 1 - (1/30 + 1/32) / 2; you took that of 15 levels",
                lambda: _nf4(1 - 1 / 30)),
        Mistake("you mirrored it: 8 levels lie above zero and 7 below", lambda: (-NF4_CODE).flip(0)),
        Mistake("that is the symmetric table of fifteen that was once posted: NF4 has sixteen, 8 of them above zero", _posted),
        Mistake("those are evenly spaced: NF4's levels are quantiles of the normal distribution",
                lambda: torch.linspace(-1, 1, 16)))),
    Task("pack", partial(pack_nibbles, padding=NF4_ZERO), random=_codes,
         fixed=((torch.tensor([15, 0], dtype=torch.uint8),), (torch.tensor([1, 2, 3], dtype=torch.uint8),)), mistakes=(
        Mistake("your nibbles are swapped: the first code of a pair goes into the high four bits", _swapped),
        Mistake("an odd count is filled up with code 7, which stands for zero; code 0 stands for -1",
                partial(pack_nibbles, padding=0)),
        Mistake("a byte holds two neighbours; you paired the first half with the second", _halves),
        Mistake("you added the two codes: shift the first one by four bits", _added))),
    Task("unpack", unpack_nibbles, random=_packed,
         fixed=((torch.tensor([0xF0], dtype=torch.uint8), 2), (torch.tensor([0x12, 0x37], dtype=torch.uint8), 3)), mistakes=(
        Mistake("you read the low nibble first: the first code of a pair is in the high four bits", _swapped_back),
        Mistake("the high nibble has to be shifted down by four bits", _unshifted),
        Mistake("all high nibbles, then all low ones: they alternate, two neighbours a byte", _blocks_of_nibbles),
        Mistake("cut the result to n: of an odd count the last nibble is only filling",
                lambda packed, n: unpack_nibbles(packed, 2 * len(packed))))),
)
