"""Rotary position embedding: a position is a rotation of each pair of query and key entries.

    (x₁, x₂) ↦ (x₁ cos pθ − x₂ sin pθ, x₂ cos pθ + x₁ sin pθ)         θ_i = base^(−2i / d)

Rotations compose, so the dot product of a query at p and a key at q depends on p − q alone (RoFormer, arXiv 2104.09864,
section 3.2).  Hugging Face pairs entry i with entry i + d/2 ("half split"); the original Llama code pairs neighbours, and
checkpoints in Hugging Face's layout have their rows permuted to match.

"llama3" scaling (Llama 3.1) leaves short wavelengths alone, divides the frequency of long ones by `factor`, and blends in
between; "linear" divides all.

Lesson 08 explains it.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from minilora.llama.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig, device: torch.device | str = "cpu") -> Tensor:
    """θ_i for each pair: (head_dim / 2,) float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents
    scaling = config.rope_scaling
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        wavelengths = 2 * math.pi / frequencies
        turns = scaling.original_max_position_embeddings / wavelengths      # over the length it was pretrained at
        blend = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
        return (1 - blend) * frequencies / scaling.factor + blend * frequencies
    return frequencies


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions: (B, T) int64 -> two of (B, 1, T, head_dim), computed in float32."""
    angles = positions[:, None, :, None].float() * frequencies                     # (B, 1, T, d/2)
    angles = torch.cat((angles, angles), dim=-1)                                   # (B, 1, T, d)
    return angles.cos().to(dtype), angles.sin().to(dtype)
