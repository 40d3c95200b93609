"""The key/value cache: what attention needs of the tokens that were already read.

Allocated once for the longest sequence and filled in place, so decoding a token allocates nothing.  Grouped-query
attention shows its worth here: bytes = 2 · layers · B · Hkv · length · head_dim · (bytes per number).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minilora.errors import ConfigError
from minilora.llama.config import LlamaConfig

Step = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor | None], int], Tensor]     # x, cos, sin, masks, tokens before -> x


class KVCache:
    """Keys and values of every layer, for a batch of sequences of one padded length.

    Args:
        batch: sequences. max_length: tokens it can hold, padding included. dtype, device: those of the model.

    Attributes: length: tokens it holds. step: what takes a single token through all blocks at once (`decoding.token_step`), set
        by a caller for whom the model stays as it is; None: block after block.
    """

    def __init__(self, config: LlamaConfig, batch: int, max_length: int, dtype: torch.dtype,
                 device: torch.device | str) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length, self.max_length = 0, max_length
        self.step: Step | None = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's (B, Hkv, T, d) behind what is there; returns all of it, (B, Hkv, S, d).

        Raises: ConfigError: the cache is full.
        """
        stop = self.stop_behind(k.shape[2])
        self.keys[layer, :, :, self.length : stop] = k
        self.values[layer, :, :, self.length : stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def stop_behind(self, tokens: int) -> int:
        """Where so many tokens more end.

        Raises: ConfigError: the cache is full.
        """
        if self.length + tokens > self.max_length:
            raise ConfigError(f"the key/value cache holds {self.max_length} tokens, {self.length + tokens} are needed")
        return self.length + tokens

    def start_with(self, shared: KVCache) -> None:
        """Begin every sequence with the tokens of a cache of one."""
        self.length = shared.length
        self.keys[:, :, :, : self.length] = shared.keys[:, :, :, : self.length]
        self.values[:, :, :, : self.length] = shared.values[:, :, :, : self.length]

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += tokens
