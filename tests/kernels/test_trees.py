"""Attention over trees (`block_trees.h`) against its formula in float64, and against torch's attention with a mask."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.kernels import block
from minilora.llama.trees import Queries, Trees
from tests.kernels.test_block import heads, kernel, threads

__all__ = ["kernel", "threads"]      # fixtures


def layout(sequences: int, nodes: int, longest: int, seed: int, every: bool = True) -> tuple[Trees, int]:
    """Random sequences, each beginning with some keys of the one before, a random tree behind each; and the number of rows.

    Not `every`: only some of a sequence's rows ask, as in the last block of a model.
    """
    draw = torch.Generator().manual_seed(seed)

    def below(stop: int) -> int:
        return int(torch.randint(stop, (), generator=draw))

    visible = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        if above := below(node + 1):
            visible[node] |= visible[above - 1]
    keys, asking, before, rows = list[Tensor](), list[Tensor](), torch.zeros(0, dtype=torch.int32), 0
    for _ in range(sequences):
        shared = before[: below(len(before) - nodes + 1)] if len(before) else before
        own = int(not len(shared)) + below(longest)
        before = torch.cat((shared, torch.arange(rows, rows + own + nodes, dtype=torch.int32)))
        rows += own + nodes
        keys.append(before)
        positions = torch.arange(len(shared), len(before), dtype=torch.int32)
        asking.append(positions if every else positions[torch.rand(len(positions), generator=draw) < 0.3])

    def starts(parts: list[Tensor]) -> Tensor:
        return torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)

    queries = Queries(starts(asking), torch.cat(asking))
    return Trees(torch.cat(keys), starts(keys), visible, queries, queries), rows


def attend(kernel: block.Kernel, q: Tensor, k: Tensor, v: Tensor, trees: Trees) -> Tensor:
    return kernel.trees(q, k, v, trees.keys, trees.starts, trees.asking.starts, trees.asking.positions, trees.visible)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in float64, and the same of |v|, by which errors of the weights are bounded."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights @ v, weights @ v.abs()


@settings(max_examples=60, deadline=None)
@given(sequences=st.integers(1, 6), nodes=st.integers(0, 40), longest=st.integers(1, 70), shared=st.integers(1, 2),
       group=st.integers(1, 3), dim=st.sampled_from([16, 32, 48, 64, 128]), seed=st.integers(0, 999), every=st.booleans())
def test_every_row_sees_its_own_keys_and_no_other(kernel: block.Kernel, sequences: int, nodes: int, longest: int, shared: int,
                                                 group: int, dim: int, seed: int, every: bool) -> None:
    trees, rows = layout(sequences, nodes, longest, seed, every)
    asking = len(trees.asking.positions)
    q, k, v = (heads(1, count, length, dim, seed + at) for at, (count, length) in
               enumerate(((shared * group, asking), (shared, rows), (shared, rows))))
    if not asking:
        return
    found = attend(kernel, q, k, v, trees)
    right, size = exact(q, k, v, trees.mask(rows))
    # The weights are off by 10⁻⁴ and then rounded to bfloat16, and so is the result.
    assert ((found.double() - right).abs() <= (2 ** -8 + 3e-4) * size + 2 ** -8 * right.abs() + 1e-6).all()
    assert found.shape == q.shape and found.transpose(1, 2).is_contiguous(), "as projections want it"


def test_errors_are_those_of_torchs_attention(kernel: block.Kernel) -> None:
    trees, rows = layout(6, 12, 90, seed=3)
    q, k, v = heads(1, 8, rows, 32, 0), heads(1, 4, rows, 32, 1), heads(1, 4, rows, 32, 2)
    mask = trees.mask(rows)
    right, _ = exact(q, k, v, mask)
    mine, torchs = (float((found.double() - right).norm()) for found in (
        attend(kernel, q, k, v, trees), F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)))
    assert mine < 1.05 * torchs


def test_a_sequence_alone_has_the_bits_it_has_among_others(kernel: block.Kernel, threads: Callable[[int], None]) -> None:
    trees, rows = layout(5, 7, 60, seed=5)
    q, k, v = heads(1, 6, rows, 32, 0), heads(1, 2, rows, 32, 1), heads(1, 2, rows, 32, 2)
    together = attend(kernel, q, k, v, trees)
    for count in (1, 2, 5):
        threads(count)
        assert torch.equal(attend(kernel, q, k, v, trees), together)
    for at in range(5):
        key, row = slice(*trees.starts[at : at + 2].tolist()), slice(*trees.asking.starts[at : at + 2].tolist())
        asking = Queries(torch.tensor([0, row.stop - row.start]), trees.asking.positions[row])
        alone = Trees(trees.keys[key], torch.tensor([0, key.stop - key.start]), trees.visible, asking, asking)
        assert torch.equal(attend(kernel, q[:, :, row], k, v, alone), together[:, :, row])


def test_scores_of_any_size_are_met_and_nan_comes_through(kernel: block.Kernel) -> None:
    trees, rows = layout(2, 3, 40, seed=8)
    q, k, v = (heads(1, 1, rows, 32, seed) for seed in range(3))
    for scale in (0.0, 1e-3, 30.0, 3e4):
        large = (q * scale).bfloat16()
        right, size = exact(large, k, v, trees.mask(rows))
        assert ((attend(kernel, large, k, v, trees).double() - right).abs() <= 0.0045 * size + 2 ** -8 * right.abs()).all()
    for at, which in enumerate((q, k, v)):
        bad = which.clone()
        bad[0, 0, rows - 1, 5] = torch.nan
        inputs = [bad if at == other else x for other, x in enumerate((q, k, v))]
        assert attend(kernel, *inputs, trees)[0, 0, -1].isnan().any()


def test_layouts_that_the_kernel_cannot_read_are_refused(kernel: block.Kernel) -> None:
    trees, rows = layout(2, 3, 40, seed=8)
    q, k, v = (heads(1, 2, rows, 32, seed) for seed in range(3))
    parts = [q, k, v, trees.keys, trees.starts, trees.asking.starts, trees.asking.positions, trees.visible]
    odd = torch.zeros(1, rows, 2, 33).bfloat16()[..., :32].transpose(1, 2)
    for at, bad in ((0, q.float()), (0, q[:, :1]), (0, q[:, :, 1:]), (1, k[:, :, 1:]), (1, odd), (2, v[..., :16]),
                    (3, trees.keys.long()), (3, trees.keys + 1), (3, trees.keys - 1), (3, trees.keys[1:]),
                    (4, trees.starts + 1), (4, trees.starts[:-1]), (4, torch.tensor([0, 3, len(trees.keys)])),
                    (5, trees.asking.starts.int()), (5, trees.asking.starts.flip(0)), (6, trees.asking.positions + 1),
                    (6, trees.asking.positions - 1), (7, torch.ones(3, 2, dtype=torch.bool)), (7, trees.visible.int())):
        with pytest.raises(ValueError, match="the kernel takes"):
            kernel.trees(*parts[:at], bad, *parts[at + 1 :])
