"""Llama in four ideas, with Hugging Face's module names so that checkpoints and adapters need no mapping.

    RMSNorm   x / √(mean(x²) + ε) · g                       no mean is subtracted (arXiv 1910.07467)
    RoPE      positions as rotations of q and k             `rotary` (arXiv 2104.09864)
    GQA       several query heads share a key/value head    a smaller cache (arXiv 2305.13245)
    SwiGLU    down( silu(gate(x)) · up(x) )                 a gated MLP (arXiv 2002.05202)

    block:    x + attention(norm(x)),  then  x + mlp(norm(x))

The model knows nothing of quantization or LoRA: its linears are modules that are called, and others replace them.
Source: Llama (arXiv 2302.13971), Llama 2 (2307.09288), Llama 3 (2407.21783), Mistral (2310.06825), Qwen2 (2407.10671).

Lesson 08 explains it.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError
from minilora.llama.cache import KVCache
from minilora.llama.config import LlamaConfig
from minilora.llama.frugal import attention, rms_norm, rotate, swiglu
from minilora.llama.head import logits
from minilora.llama.masks import attention_masks
from minilora.llama.recompute import recompute, recompute_rows
from minilora.llama.rotary import inverse_frequencies, rotation
from minilora.llama.trees import Trees

MLP_ROWS = 4096         # of an MLP that is recomputed at a time: enough for products at full speed, and the weight's unpacking


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight, computed in float32.

    Rounded before the weight is applied, as Hugging Face does; on a CPU wide rows are rounded once, behind it (`frugal`).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return rms_norm(x, self.weight, self.eps)


def take(x: Tensor, at: Tensor) -> Tensor:
    """Rows of each sequence: x (B, T, d), at (B, L) int64 -> (B, L, d)."""
    if x.is_cuda:       # where the gradient of `gather` goes element by element if bits are to be repeated; this one by rows
        return x[torch.arange(len(at), device=at.device)[:, None], at]
    return x.gather(1, at[:, :, None].expand(-1, -1, x.shape[-1]))


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions; query head h reads key/value head h // (H / Hkv)."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        shapes, qkv_bias = config.linear_shapes(), config.qkv_bias or config.attention_bias
        self.q_proj = _linear(shapes["q_proj"], qkv_bias)
        self.k_proj = _linear(shapes["k_proj"], qkv_bias)
        self.v_proj = _linear(shapes["v_proj"], qkv_bias)
        self.o_proj = _linear(shapes["o_proj"], config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | Trees | None, cache: KVCache | None,
                at: Tensor | None = None) -> Tensor:
        """x: (B, T, hidden); mask: bool (B, 1, T, S), True = may attend, or trees, or None = causal -> (B, T, hidden).

        With `at`, (B, L) positions, queries are made there alone -> (B, L, hidden).
        """
        batch, length, _ = x.shape
        asking = x if at is None else take(x, at)
        q = self.q_proj(asking).view(batch, asking.shape[1], -1, self.head_dim).transpose(1, 2)    # (B, H, T or L, d)
        k = self.k_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)          # (B, Hkv, T, d)
        v = self.v_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        k = rotate(k, cos, sin)
        if at is not None:
            cos, sin = take(cos[:, 0], at)[:, None], take(sin[:, 0], at)[:, None]          # (B, 1, L, d)
            past = 0 if cache is None else cache.length
            if isinstance(mask, Trees):
                mask = mask.reading()
            elif mask is None:
                mask = torch.arange(past + length, device=x.device) <= past + at[:, None, :, None]
            else:
                mask = take(mask.expand(batch, -1, -1, -1)[:, 0], at)[:, None]             # (B, 1, L, S)
        q = rotate(q, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                                          # (B, Hkv, S, d)
        attended = attention(q, k, v, mask)
        return self.o_proj(attended.transpose(1, 2).reshape(*asking.shape[:2], -1).to(x.dtype))


class LlamaMLP(nn.Module):
    """SwiGLU: down( silu(gate(x)) · up(x) )."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        shapes = config.linear_shapes()
        self.gate_proj = _linear(shapes["gate_proj"], config.mlp_bias)
        self.up_proj = _linear(shapes["up_proj"], config.mlp_bias)
        self.down_proj = _linear(shapes["down_proj"], config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class LlamaDecoderLayer(nn.Module):
    """One block: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | Trees | None, cache: KVCache | None,
                at: Tensor | None = None, checkpointing: bool = False, offloading: bool = False) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden), or (B, L, hidden) at the positions `at`.

        `checkpointing` recomputes each half, the MLP some rows at a time; `offloading` keeps what goes into them on the host.
        """
        def attention_half(x: Tensor) -> Tensor:
            return (x if at is None else take(x, at)) + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, at)

        def mlp_half(x: Tensor) -> Tensor:
            return x + self.mlp(self.post_attention_layernorm(x))

        if checkpointing:
            return recompute_rows(mlp_half, recompute(attention_half, x, offloading), MLP_ROWS, offloading)
        return mlp_half(attention_half(x))


class LlamaModel(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaForCausalLM(nn.Module):
    """A Llama with its head.

    Attributes: `config`; `gradient_checkpointing`: recompute each half of a block in backward instead of keeping its
        activations; `activation_offloading`: keep what that needs in host memory.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = self.activation_offloading = False
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one Parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> None:
        """Normal weights, zero biases, ones for norms: where pretraining starts."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    module.weight.normal_(0.0, std, generator=generator)
                    if isinstance(module, nn.Linear) and module.bias is not None:
                        module.bias.zero_()
                elif isinstance(module, RMSNorm):
                    module.weight.fill_(1.0)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute type: that of the embedding."""
        return self.model.embed_tokens.weight.dtype

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | Trees | None = None, position_ids: Tensor | None = None,
               cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, T) int64.
            attention_mask: None (all real); (B, S) with 1 = real token, padded left or right, S = cached + T; or bool
                (B, 1, T, S), True = may attend, used as it is (tree decoding); or, with B = 1 and no cache, trees.
            position_ids: (B, T); default the count of real tokens before each.
            cache: keys and values of earlier tokens; this call's are appended.
            at: (B, L) int64, the columns of input_ids whose states are wanted, where not all are: the last block then makes
                queries and its MLP there alone.

        Returns: (B, T, hidden), or (B, L, hidden).
        Raises:
            ConfigError: shapes or types don't fit, or the cache is full.
            CheckpointError: a token id outside the embedding table (looked for on the CPU only: on a GPU the question
                itself would cost a synchronization, so there callers check what they read).
        """
        past = cache.length if cache is not None else 0
        _check_ids(input_ids, self.model.embed_tokens.num_embeddings)
        batch, length = input_ids.shape
        if attention_mask is not None:
            _check_mask(attention_mask, batch, length, past)
        if position_ids is None:
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
                position_ids = (attention_mask.bool().cumsum(-1) - 1).clamp(min=0)[:, past:]
            else:
                position_ids = torch.arange(past, past + length, device=input_ids.device).expand(batch, length)
        if at is not None and (at.dim() != 2 or at.shape[0] != batch):
            raise ConfigError(f"at must be an int64 tensor ({batch}, positions), not {tuple(at.shape)}")
        masks = attention_masks(self.config.sliding_windows, attention_mask, batch, length, past, input_ids.device)
        x = self.model.embed_tokens(input_ids)                                             # (B, T, hidden)
        cos, sin = rotation(position_ids, inverse_frequencies(self.config, x.device), x.dtype)
        alone = length == 1 and at is None and not isinstance(attention_mask, Trees)
        if (alone and cache is not None and cache.step is not None and not torch.is_grad_enabled()
                and not torch.is_autocast_enabled(x.device.type)):
            cache.stop_behind(length)
            x = cache.step(x, cos, sin, [mask for mask in masks if not isinstance(mask, Trees)], past)
        else:
            checkpointing = self.gradient_checkpointing and self.training and cache is None and torch.is_grad_enabled()
            for index, (layer, mask) in enumerate(zip(self.model.layers, masks, strict=True)):
                wanted = at if index == len(masks) - 1 else None
                x = layer(x, cos, sin, mask, cache, wanted, checkpointing, self.activation_offloading)
        if cache is not None:
            cache.advance(length)
        return self.model.norm(x)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits: (B, T, vocab), or (B, 1, vocab) with `last_only`; arguments as in `hidden`."""
        at = torch.full((len(input_ids), 1), input_ids.shape[1] - 1, device=input_ids.device) \
            if last_only and input_ids.dim() == 2 and input_ids.shape[1] > 1 else None
        return logits(self.lm_head, self.hidden(input_ids, attention_mask, position_ids, cache, at))


def _check_ids(input_ids: Tensor, rows: int) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel() or \
            input_ids.dtype not in (torch.int64, torch.int32):
        found = f"{input_ids.dtype} {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ConfigError(f"input_ids must be an int64 tensor (batch, seq) of at least one token, not {found}")
    if input_ids.device.type == "cpu":
        low, high = (int(end) for end in input_ids.aminmax())
        if low < 0 or high >= rows:
            raise CheckpointError(f"token id {low if low < 0 else high} is outside the embedding table of {rows} rows (ids 0 "
                                  f"to {rows - 1}): tokenizer and weights differ; use the tokenizer of these weights, or "
                                  "--pad-vocab")


def _check_mask(attention_mask: Tensor | Trees, batch: int, length: int, past: int) -> None:
    if isinstance(attention_mask, Trees):
        rows = len(attention_mask.asking.positions)
        if (batch, past, length) != (1, 0, rows):
            raise ConfigError(f"trees of {rows} rows are one sequence of as many tokens without a cache, not {batch} of "
                              f"{length} behind {past}")
        return
    shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else ()
    if len(shape) not in (2, 4) or shape[0] not in (1, batch) or (len(shape) == 4 and attention_mask.dtype != torch.bool):
        found = f"{attention_mask.dtype} {shape}" if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ConfigError(f"attention_mask must be a tensor ({batch}, {past + length}) with 1 = real token, or bool ({batch}, "
                          f"1, {length}, {past + length}), not {found}")
    if shape[-1] != past + length:
        raise ConfigError(f"attention_mask covers {shape[-1]} positions, needed are {past} cached and {length} new")


def _linear(shape: tuple[int, int], bias: bool) -> nn.Linear:
    return nn.Linear(shape[1], shape[0], bias=bias)
