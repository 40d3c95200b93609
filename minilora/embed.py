"""A text as a vector: the mean of the base model's final hidden states over the text's tokens, scaled to length 1.

    e(text) = h̄ / ‖h̄‖,   h̄ = mean over real tokens t of h_t         BOS and padding are not averaged

The cosine of two texts is then the dot product of their vectors.  A causal model's states point much the same way for
any text, so cosines of unrelated labels lie far above 0: read them beside the baselines of `evaluate`, never alone.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.data.prompts import check_ids
from minilora.errors import ConfigError
from minilora.generate import evaluation_mode
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.tokenizer import Tokenizer

Embedder: TypeAlias = Callable[[Sequence[str]], Tensor]     # n texts -> (n, d), each row of length 1 (or 0: no text)


def embed_texts(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Embed texts with a Llama's own hidden states; adapters count if they are active (`layers.qlora.base_only`).

    Args:
        texts: what exceeds the model's positions is cut. batch_size: texts a forward call.

    Returns: (n, hidden) float32 on the CPU; rows have length 1, that of a text without tokens is zero.
    Raises:
        ConfigError: batch_size below 1.
        CheckpointError: a token id outside the embedding table.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    skip = 0 if tokenizer.bos_id is None else 1
    ids = [tokenizer.encode(text)[: model.config.max_position_embeddings] for text in texts]
    for row in ids:
        check_ids(row, model.model.embed_tokens.num_embeddings)
    vectors = torch.zeros(len(ids), model.config.hidden_size, dtype=torch.float32, device="cpu")
    order = sorted((index for index, row in enumerate(ids) if len(row) > skip), key=lambda index: len(ids[index]))
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            longest = len(ids[indices[-1]])
            lengths = torch.tensor([len(ids[i]) for i in indices], device=model.device)                         # (B,)
            padded = [ids[i] + [0] * (longest - len(ids[i])) for i in indices]
            real = torch.arange(longest, device=model.device) < lengths[:, None]                                # (B, T)
            states = model.hidden(torch.tensor(padded, device=model.device), real).float()                      # (B, T, h)
            weights = real.float()
            weights[:, :skip] = 0
            means = (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
            vectors[indices] = F.normalize(means, dim=-1).cpu()
    return vectors
