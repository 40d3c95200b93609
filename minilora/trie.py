"""A label set as a trie of tokens, and the exact probability of every label in one forward call.

Labels that begin alike share the nodes of their common tokens; each ends with the end token.  The probability of a label
is that of the choices on its path, each a softmax over the node's children v ∈ C(u) and nothing else:

    p(label | prompt) = Π over nodes u on the path  exp z_v(u) / Σ_{w ∈ C(u)} exp z_w(u)         normalize="trie"

Every node hands out what it got, so the labels' probabilities sum to 1.  A node with one child costs nothing: a label is
not punished for its length or its spelling.  The alternative takes the softmax over the whole vocabulary, i.e. the
model's own probability of writing the label, and divides by the sum over the label set:

    p(label | prompt) ∝ Π over tokens v of the label  softmax(z)_v                               normalize="full"

It asks for every node's logits over the whole vocabulary, and a rare word's spelling counts against its label.  Both are
exact for all labels at once; greedy descent is not: the branch with the larger sum need not hold the best label.

Tree attention (SpecInfer, arXiv 2305.09781, section 4.2) makes it one call: the trie's nodes stand behind the prompt as
extra tokens; a node sees the prompt, its ancestors and itself, and its position is prompt length + depth.  Only nodes
whose scores are read, and their ancestors, are computed.  Where vector code takes such a layout, all prompts of a call lie in
it without padding, and what they begin with alike once (`forest`); else they are padded.  A large trie goes through in chunks,
with the prompt in the key/value cache and the few ancestors that a chunk lacks computed again.

Sliding windows: exact where all layers have the same one, or where the sequence fits in all; a model whose layers differ
and whose window is exceeded scores each label as a sequence of its own.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.data.prompts import check_ids, encode_label
from minilora.data.tables import MAX_LABELS
from minilora.errors import ConfigError, DataError
from minilora.forest import TreeChunk, forests, grows_on
from minilora.generate import NOT_FINITE, cache_for, check_prompts, evaluation_mode, shared_beginning
from minilora.llama.head import logits as head_logits
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.tokenizer import Tokenizer
from minilora.metrics import normalize_label

Normalization: TypeAlias = Literal["trie", "full"]
ROOT = 0
CHUNK_NODES = 512       # of a trie in one forward call
BATCH_TOKENS = 4096     # of prompts and trie in one forward call
WIDE = 1024             # of a narrower model a call holds as many times more, or it were short beside what each costs


class LabelTrie:
    """The tokens of a label set; node 0 is the root, which stands for the prompt's last token.

    Attributes:
        labels: as given, stripped. longest: tokens of the longest label, end token included.
        tokens, parents, children: of each node; parents stand before their children, in depth-first order.
        paths: of each label, its nodes from the first token to the end token.

    Raises:
        DataError: no label, more than 10,000, an empty one, two that differ only by case or spacing, or by nothing that
            the tokenizer sees.
        CheckpointError: the tokenizer has no end token.
    """

    def __init__(self, labels: Sequence[str], tokenizer: Tokenizer) -> None:
        if not labels or len(labels) > MAX_LABELS:
            raise DataError(f"a label set has 1 to {MAX_LABELS:,} labels, this one {len(labels):,}")
        self.labels = [label.strip() for label in labels]
        spelled: dict[str, str] = {}
        written: dict[tuple[int, ...], str] = {}
        for label in self.labels:
            ids = tuple(encode_label(tokenizer, label))
            for twin, difference in ((spelled.get(normalize_label(label)), "case or spacing"),
                                     (written.get(ids), "characters that the tokenizer does not know")):
                if twin is not None:
                    how = "are the same" if twin == label else f"differ only by {difference}"
                    raise DataError(f"labels {twin!r} and {label!r} {how}; keep one of them")
            spelled[normalize_label(label)] = written[ids] = label
        self.longest = max(map(len, written))
        self.tokens, self.parents, self.depths, self.children = [-1], [-1], [-1], [list[int]()]
        by_label = dict[str, list[int]]()
        stack: list[int] = []                       # nodes of the sequence before
        for ids in sorted(written):                 # sorted: a depth-first walk, the same for any order of the labels
            shared = next((i for i, node in enumerate(stack[: len(ids)]) if self.tokens[node] != ids[i]), len(stack))
            del stack[shared:]
            for token in ids[shared:]:
                stack.append(self._add(stack[-1] if stack else ROOT, token))
            by_label[written[ids]] = list(stack)
        self.paths = [by_label[label] for label in self.labels]
        self.leaves = [path[-1] for path in self.paths]

    def _add(self, parent: int, token: int) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.children.append([])
        self.children[parent].append(node)
        return node

    def __len__(self) -> int:
        return len(self.labels)

    def readers(self, normalize: Normalization) -> list[int]:
        """Nodes whose scores are needed: where paths part ("trie"), or every node that has a next token ("full")."""
        least = 2 if normalize == "trie" else 1
        return [node for node, children in enumerate(self.children) if len(children) >= least]


def tree_chunks(trie: LabelTrie, normalize: Normalization, size: int = CHUNK_NODES,
                device: torch.device | str = "cpu") -> list[TreeChunk]:
    """Cut the nodes that are needed into chunks of `size`, each with its first node's ancestors in front."""
    readers = set(trie.readers(normalize))
    needed = set[int]()
    for node in readers:
        while node != ROOT and node not in needed:
            needed.add(node)
            node = trie.parents[node]
    order, chunks = sorted(needed), list[TreeChunk]()
    for start in range(0, max(len(order), 1), size):
        new = order[start : start + size]
        nodes, above = list(new), trie.parents[new[0]] if new else ROOT
        while above != ROOT:        # depth-first order: what else a node of `new` descends from is in `new`
            nodes.insert(0, above)
            above = trie.parents[above]
        slots = {node: slot for slot, node in enumerate(nodes)}
        visible = torch.eye(len(nodes), dtype=torch.bool, device="cpu")
        for slot, node in enumerate(nodes):
            if trie.parents[node] != ROOT:
                visible[slot] |= visible[slots[trie.parents[node]]]
        read = [(-1, ROOT)] if start == 0 and ROOT in readers else []
        read += [(slots[node], node) for node in new if node in readers]
        chunks.append(TreeChunk(torch.tensor([trie.tokens[node] for node in nodes], dtype=torch.int64, device=device),
                                torch.tensor([trie.depths[node] for node in nodes], dtype=torch.int64, device=device),
                                visible.to(device), read))
    return chunks


def score_labels(model: LlamaForCausalLM, trie: LabelTrie, prompt_ids: Sequence[Sequence[int]],
                 batch_tokens: int | None = None, normalize: Normalization = "trie",
                 on_progress: Callable[[int], object] | None = None) -> Tensor:
    """The log-probability of every label after every prompt.

    Args:
        prompt_ids: token ids of n prompts. batch_tokens: prompt and trie tokens a forward call, padding included; default
            `BATCH_TOKENS`, more for a forest of a narrow model.
        normalize: "trie" or "full", see the module docstring.
        on_progress: called after each batch with its number of prompts (tqdm's ``update`` fits).

    Returns: (n, labels) float32 on the CPU; ``exp`` of a row sums to 1.
    Raises:
        ConfigError: a setting out of range, a prompt and the longest label exceed the model's positions, or logits that
            are not finite.
        CheckpointError: a token id outside the embedding table. DataError: a prompt without tokens.
    Guarantee: equal to scoring each label as a sequence of its own (test_scores_equal_each_label_as_its_own_sequence).
    """
    if normalize not in ("trie", "full") or (batch_tokens is not None and batch_tokens < 1):
        raise ConfigError(f"normalize is 'trie' or 'full' and batch_tokens at least 1, not {normalize!r} and {batch_tokens}")
    check_prompts(prompt_ids, model, trie.longest)
    check_ids(trie.tokens[1:], model.model.embed_tokens.num_embeddings)
    scores = torch.empty(len(prompt_ids), len(trie), dtype=torch.float32, device="cpu")
    chunks = tree_chunks(trie, normalize, CHUNK_NODES, model.device)
    calls = _in_forests if len(chunks) == 1 and chunks[0].readers and grows_on(model) else _in_batches
    with evaluation_mode(model):
        for indices, steps in calls(model, trie, chunks, prompt_ids, batch_tokens, normalize):
            scores[indices] = _sum_over_paths(trie, steps, normalize).cpu()
            if on_progress is not None:
                on_progress(len(indices))
    if not scores.isfinite().all():
        raise ConfigError(NOT_FINITE)
    return scores


def _in_forests(model: LlamaForCausalLM, trie: LabelTrie, chunks: list[TreeChunk], prompt_ids: Sequence[Sequence[int]],
                batch_tokens: int | None, normalize: Normalization) -> Iterator[tuple[list[int], Tensor]]:
    """Indices of the prompts of each call, laid out without padding, and `_steps_by_tree` of them."""
    tree, = chunks
    for forest in forests(prompt_ids, tree, batch_tokens or BATCH_TOKENS * max(1, WIDE // model.config.hidden_size)):
        hidden = model.hidden(forest.input_ids, forest.trees, forest.position_ids, at=forest.at)[0]
        steps = hidden.new_zeros(len(forest.prompts), len(trie.tokens), dtype=torch.float32)
        _read_steps(model, trie, tree, hidden.view(len(steps), -1, hidden.shape[-1]), normalize, steps)
        yield forest.prompts, steps


def _in_batches(model: LlamaForCausalLM, trie: LabelTrie, chunks: list[TreeChunk], prompt_ids: Sequence[Sequence[int]],
                batch_tokens: int | None, normalize: Normalization) -> Iterator[tuple[list[int], Tensor]]:
    """The same of prompts of like length, padded."""
    widest = max(len(chunk.tokens) for chunk in chunks)
    windows = set(model.config.sliding_windows)
    # Longest first: where memory is short, the first batch tells.
    waiting = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
    while waiting:
        longest = len(prompt_ids[waiting[0]])
        indices = waiting[: max(1, (batch_tokens or BATCH_TOKENS) // (longest + widest))]
        prompts = [list(prompt_ids[index]) for index in indices]
        if len(windows) > 1 and any(w is not None and w < longest + trie.longest for w in windows):
            yield indices, _steps_by_label(model, trie, prompts, normalize)
        else:
            yield indices, _steps_by_tree(model, trie, chunks, prompts, normalize)
        waiting = waiting[len(indices) :]


def _steps_by_tree(model: LlamaForCausalLM, trie: LabelTrie, chunks: list[TreeChunk], prompts: list[list[int]],
                   normalize: Normalization) -> Tensor:
    """log p(node | its parent) of every node: (B, nodes) float32; zero where it isn't needed."""
    batch, device = len(prompts), model.device
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)                          # (B,)
    longest = max(map(len, prompts))
    prompt = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts], device=device)   # (B, P), padded right
    window = model.config.sliding_windows[0] if model.config.sliding_windows else None
    room = longest + max(len(chunk.tokens) for chunk in chunks)
    shared = shared_beginning(prompts, model)
    cache = cache_for(model, prompts[0][:shared], batch, room) if shared or len(chunks) > 1 else None
    steps = torch.zeros(batch, len(trie.tokens), dtype=torch.float32, device=device)
    for number, chunk in enumerate(chunks):
        done = longest if number else shared        # columns that the cache holds already
        input_ids = torch.cat((prompt, chunk.tokens.expand(batch, -1)), dim=1)                    # (B, P + K)
        positions = torch.cat((torch.arange(longest, device=device).expand(batch, -1), lengths[:, None] + chunk.depths), dim=1)
        if cache is not None and number:
            cache.length = longest                  # forget the chunk before, keep the prompt
        if not chunk.readers and len(chunks) == 1:
            break                                   # one label: certain
        read = [lengths - 1 - done if node == ROOT else torch.full_like(lengths, longest - done + slot)
                for slot, node in chunk.readers]
        at = torch.stack(read, dim=1) if read else None                                           # (B, readers)
        mask = _tree_mask(lengths, longest, chunk.visible, positions, window)[:, :, done:]
        hidden = model.hidden(input_ids[:, done:], mask, positions[:, done:], cache, at)          # (B, readers, hidden)
        if read:
            _read_steps(model, trie, chunk, hidden, normalize, steps)
    return steps


def _read_steps(model: LlamaForCausalLM, trie: LabelTrie, chunk: TreeChunk, hidden: Tensor, normalize: Normalization,
                steps: Tensor) -> None:
    """Write into steps (B, nodes) what the states of a chunk's readers, (B, readers, hidden), say of their children."""
    for states, (_, node) in zip(hidden.unbind(1), chunk.readers, strict=True):
        tokens = [trie.tokens[child] for child in trie.children[node]]
        steps[:, trie.children[node]] = _next_log_probs(model, states, tokens, normalize)


def _tree_mask(lengths: Tensor, longest: int, visible: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Who sees whom in [prompt, padding, nodes]: (B, 1, P + K, P + K) bool."""
    columns = torch.arange(longest, device=lengths.device)
    real = columns < lengths[:, None]                                                             # (B, P)
    itself = columns == columns[:, None]            # a padding row sees itself, or its softmax over nothing were NaN
    mask = torch.zeros(len(lengths), *[longest + len(visible)] * 2, dtype=torch.bool, device=lengths.device)
    mask[:, :longest, :longest] = (columns <= columns[:, None]) & real[:, None] | itself
    mask[:, longest:, :longest] = real[:, None]
    mask[:, longest:, longest:] = visible
    if window is not None:
        mask &= positions[:, None, :] > positions[:, :, None] - window
    return mask[:, None]


def _steps_by_label(model: LlamaForCausalLM, trie: LabelTrie, prompts: list[list[int]], normalize: Normalization) -> Tensor:
    """`_steps_by_tree` without the tree: each label behind the prompt, for layers that mask differently."""
    steps = torch.zeros(len(prompts), len(trie.tokens), dtype=torch.float32, device=model.device)
    readers = set(trie.readers(normalize))
    for row, ids in enumerate(prompts):
        for path in trie.paths:
            sequence = torch.tensor([ids + [trie.tokens[node] for node in path[:-1]]], device=model.device)
            hidden = model.hidden(sequence)[0, len(ids) - 1 :]                                    # (len(path), hidden)
            for state, node in zip(hidden, [ROOT, *path[:-1]], strict=True):
                if node in readers:
                    tokens = [trie.tokens[child] for child in trie.children[node]]
                    steps[row, trie.children[node]] = _next_log_probs(model, state[None], tokens, normalize)[0]
    return steps


def _next_log_probs(model: LlamaForCausalLM, states: Tensor, tokens: list[int], normalize: Normalization) -> Tensor:
    """Log-probability of each token after (B, hidden) states: (B, tokens) float32."""
    if normalize == "full":
        return F.log_softmax(head_logits(model.lm_head, states).float(), dim=-1)[:, tokens]
    if type(model.lm_head) is nn.Linear:            # only the children's rows of the head, in float32
        logits = F.linear(states.float(), model.lm_head.weight[tokens].float())
    else:                                           # an adapter on the head: its module knows the whole product only
        logits = model.lm_head(states)[:, tokens].float()
    return F.log_softmax(logits, dim=-1)


def _sum_over_paths(trie: LabelTrie, steps: Tensor, normalize: Normalization) -> Tensor:
    """Sum each label's steps: (B, nodes) -> (B, labels)."""
    totals = steps.new_zeros(len(steps), len(trie))
    for depth in range(trie.longest):
        labels = [label for label, path in enumerate(trie.paths) if len(path) > depth]
        totals[:, labels] += steps[:, [trie.paths[label][depth] for label in labels]]
    return F.log_softmax(totals, dim=-1) if normalize == "full" else totals


def predict_labels(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt_ids: Sequence[Sequence[int]],
                   labels: LabelTrie | Sequence[str], batch_tokens: int | None = None, normalize: Normalization = "trie",
                   on_progress: Callable[[int], object] | None = None) -> tuple[list[str], Tensor, list[str | None]]:
    """The most probable label after every prompt.

    Args: as `score_labels`; `labels` may be a plain list, which `tokenizer` then makes a trie of.
    Returns: labels, their probabilities (n,) float32, and the second most probable labels (None: there is only one).
    Raises: as `LabelTrie` and `score_labels`.
    """
    trie = labels if isinstance(labels, LabelTrie) else LabelTrie(labels, tokenizer)
    scores = score_labels(model, trie, prompt_ids, batch_tokens, normalize, on_progress)
    best = scores.topk(min(2, len(trie)), dim=-1)
    runners_up = [trie.labels[row[1]] if len(row) > 1 else None for row in best.indices.tolist()]
    return [trie.labels[row[0]] for row in best.indices.tolist()], best.values[:, 0].exp(), runners_up
