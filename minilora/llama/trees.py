"""Who sees whom where sequences lie one behind the other, without padding.

Sequences that begin alike share the rows of what they have in common, and behind each stands the same small tree of tokens
(`minilora.forest` lays them out).  So a sequence is a list of rows, its *keys*, in order of position, and a row may be a key of
many.  A row within a sequence sees the keys up to its own; one in the tree sees all of the sequence, its ancestors and itself.

    rows      a b c | t u | d | t u | e f | t u          sequences abc, abd, abef; the tree t, u
    keys      0 1 2   3 4
              0 1       5   6 7
              0 1               8 9   10 11

Source: tree attention is SpecInfer's (arXiv 2305.09781, section 4.2), the shared beginnings Hydragen's (2402.05099).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.kernels import block
from minilora.layers import dense


@dataclass(frozen=True)
class Queries:
    """Rows that ask, sequence after sequence.

    Attributes:
        starts: (G + 1,) int64, where a sequence's queries start. positions: (L,) int32, of each among its sequence's keys.
    """

    starts: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Trees:
    """The layout of G sequences in N rows.

    Attributes:
        keys: (S,) int32, the rows of each sequence in order of position, its tree's last. starts: (G + 1,) int64, where a
            sequence's keys start.
        visible: (K, K) bool, True = the row's node of the tree sees the column's.
        asking: the queries, all N rows, in order. wanted: those that the last block makes instead.
    """

    keys: Tensor
    starts: Tensor
    visible: Tensor
    asking: Queries
    wanted: Queries

    def reading(self) -> Trees:
        """The same with the queries of the last block."""
        return Trees(self.keys, self.starts, self.visible, self.wanted, self.wanted)

    def mask(self, rows: int) -> Tensor:
        """The definition, as a mask: bool (1, 1, L, rows), True = may attend."""
        mask = torch.zeros(len(self.asking.positions), rows, dtype=torch.bool, device=self.keys.device)
        for group, (start, stop) in enumerate(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)):
            keys = self.keys[start:stop].long()
            length = len(keys) - len(self.visible)
            for query in range(int(self.asking.starts[group]), int(self.asking.starts[group + 1])):
                node = int(self.asking.positions[query]) - length
                mask[query, keys[: length + min(node + 1, 0)]] = True
                if node >= 0:
                    mask[query, keys[length:][self.visible[node]]] = True
        return mask[None, None]

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q·kᵀ / √d)·v: q (1, H, L, d), k and v (1, Hkv, N, d) -> (1, H, L, d).

        Guarantee: what torch's attention gives with `mask` (tests/kernels/test_trees.py).
        """
        if not block.takes_trees(q.shape[-1], q.dtype, q.device) or (kernel := block.kernel()) is None:
            mask = self.mask(k.shape[2]).to(q.device)
            return dense.attention(q, k, v, mask)
        return kernel.trees(q, k, v, self.keys, self.starts, self.asking.starts, self.asking.positions, self.visible)
