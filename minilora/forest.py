"""Prompts and a tree of labels behind each, as one forward call without padding.

A padded batch computes its padding, and what prompts have in common once for each.  Here prompts stand sorted, one behind the
other, and one that begins as the one before it brings only what differs; the blocks' products and norms are those of rows, and
attention is told which rows belong together (`llama.trees`).  Of 200 synthetic notes and 30 labels the rows are 13,458, padded
in batches of like length 16,884.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minilora.kernels import block
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.trees import Queries, Trees


@dataclass(frozen=True)
class TreeChunk:
    """Some of a trie's nodes, to be computed in one forward call behind the prompt.

    Attributes:
        tokens, depths: (K,) int64; a label's first token has depth 0.
        visible: (K, K) bool, True = the row's node may attend to the column's: its ancestors and itself.
        readers: (slot in this chunk, node) whose scores are read; the root has slot -1.
    """

    tokens: Tensor
    depths: Tensor
    visible: Tensor
    readers: list[tuple[int, int]]


@dataclass(frozen=True)
class Forest:
    """One forward call: ``model.hidden(input_ids, trees, position_ids, at=at)`` -> (1, prompts · readers, hidden).

    Attributes:
        prompts: indices of those that are in it, in the order of the results.
        input_ids, position_ids: (1, N) int64. at: (1, prompts · readers) int64, rows. trees: who sees whom.
    """

    prompts: list[int]
    input_ids: Tensor
    position_ids: Tensor
    at: Tensor
    trees: Trees


def grows_on(model: LlamaForCausalLM) -> bool:
    """Whether a forest is the fast form for this model: a kernel takes it, and no layer counts a window in columns."""
    return (all(window is None for window in model.config.sliding_windows)
            and block.takes_trees(model.config.head_dim, model.dtype, model.device) and block.kernel() is not None)


def forests(prompts: Sequence[Sequence[int]], tree: TreeChunk, rows: int) -> Iterator[Forest]:
    """All prompts, in calls of up to `rows` rows, or of one prompt that needs more.

    Args: prompts: token ids, at least one each. rows: tokens of prompts and trees, at least 1.
    """
    order = sorted(range(len(prompts)), key=lambda index: list(prompts[index]))
    start = used = 0
    shared = list[int]()                # tokens of each prompt that the one before it brings
    for stop, index in enumerate(order):
        shared.append(_same(prompts[order[stop - 1]], prompts[index]) if shared else 0)
        used += len(prompts[index]) - shared[-1] + len(tree.tokens)
        if used > rows and stop > start:
            yield plant(prompts, order[start:stop], shared[:-1], tree)
            start, used, shared = stop, len(prompts[index]) + len(tree.tokens), [0]
    if order:
        yield plant(prompts, order[start:], shared, tree)


def _same(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
                min(len(first), len(second)))


def plant(prompts: Sequence[Sequence[int]], order: list[int], shared: list[int], tree: TreeChunk) -> Forest:
    """Lay out the prompts of `order`, each without its first `shared` tokens, which the one before it begins with as well."""
    nodes, readers = len(tree.tokens), np.array([slot for slot, _ in tree.readers], dtype=np.int64)
    tokens, depths = tree.tokens.cpu().numpy(), tree.depths.cpu().numpy()
    ids, at, keys, asking, wanted, positions = ([np.zeros(0, dtype=np.int64)] for _ in range(6))
    rows, total = np.zeros(0, dtype=np.int64), 0        # of the prompt before, and of all
    for index, same in zip(order, shared, strict=True):
        length = len(prompts[index])
        own = np.arange(total, total + length - same + nodes)
        rows, total = np.concatenate((rows[:same], own)), total + len(own)
        keys.append(rows)
        ids += [np.array(prompts[index][same:], dtype=np.int64), tokens]
        positions += [np.arange(same, length), length + depths]
        asking.append(np.arange(same, length + nodes))
        wanted.append(length + readers)
        at.append(rows[length + readers])

    def queries(each: list[np.ndarray]) -> Queries:
        return Queries(_starts(each), _joined(each).int())

    trees = Trees(_joined(keys).int(), _starts(keys), tree.visible.cpu(), queries(asking), queries(wanted))
    return Forest(order, _joined(ids)[None], _joined(positions)[None], _joined(at)[None], trees)


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _starts(parts: list[np.ndarray]) -> Tensor:
    """Where each part starts, and the last ends; the first part is the empty one that the lists begin with."""
    return torch.from_numpy(np.cumsum([len(part) for part in parts]))
