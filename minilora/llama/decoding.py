"""Decoding's fast path: one token a sequence through all blocks by one call of vector code, where there is some for the model.

The model stays as `model` has it, module by module, and that is what runs where anything is out of the ordinary; the bits are
the same (tests/llama/test_decoding.py).

Lesson 17 explains it.
"""
from __future__ import annotations

import torch
from torch import nn

from minilora.kernels import block, cpu
from minilora.kernels.block_token import Block, Linear, TokenStep
from minilora.layers.hooks import is_hooked
from minilora.layers.lora import LoRALinear
from minilora.layers.nf4_linear import NF4Linear
from minilora.llama.cache import KVCache
from minilora.llama.model import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP, RMSNorm

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PARTS = [LlamaAttention, LlamaMLP, RMSNorm, RMSNorm]


def token_step(model: LlamaForCausalLM, cache: KVCache) -> TokenStep | None:
    """What `KVCache.step` can be for this model, or None where its blocks are not all made of what the vector code takes.

    It is of the weights that the model has now: neither they nor the modules may be exchanged while it is used.  For linears
    that are `NF4Linear`, bare or in a `LoRALinear` without DoRA, in a wide model in bfloat16 on a CPU with AVX-512.
    """
    kernel, products, layers = block.kernel(), cpu.kernel(), model.model.layers
    batch, head_dim = cache.keys.shape[1], cache.keys.shape[-1]
    if (kernel is None or products is None or model.dtype != torch.bfloat16 or model.device.type != "cpu"
            or head_dim not in block.HEAD_DIMS or batch > products.fused_rows.get(model.dtype, 0) or not cache.keys.numel()
            or any(is_hooked(module) for module in layers.modules())):
        return None
    made = [_block(layer) for layer in layers]
    blocks = [each for each in made if each is not None]
    updated = any(linear.update is not None for each in blocks for linear in each.linears.values())
    if len(blocks) < len(made) or (updated and batch > products.dense_rows):
        return None
    return TokenStep(kernel, products, blocks, cache.keys, cache.values, model.config.num_attention_heads,
                     model.config.rms_norm_eps)


def _block(layer: nn.Module) -> Block | None:
    if type(layer) is not LlamaDecoderLayer or [type(part) for part in layer.children()] != PARTS:
        return None
    norms = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()
    linears = [_linear(getattr(part, name)) for part, names in ((layer.self_attn, PROJECTIONS), (layer.mlp, MLP))
               for name in names]
    found = [linear for linear in linears if linear is not None]
    if len(found) < len(linears) or not block.takes_rows(*norms):
        return None
    made = Block(*norms, *found)
    inner = made.down.shape[1]
    return made if inner >= block.NARROWEST and inner % 16 == 0 else None


def _linear(layer: nn.Module) -> Linear | None:
    """What the vector code takes of a layer, or None where it takes none."""
    update = None
    if type(layer) is LoRALinear:
        if layer.active:
            if layer.lora_magnitude_vector is not None or (layer.training and layer.dropout):
                return None
            a, b = (factor.weight.detach().bfloat16().contiguous() for factor in (layer.lora_A, layer.lora_B))
            update = a, b, layer.scaling
        layer = layer.base_layer
    if type(layer) is not NF4Linear or not layer.adds_in_place:
        return None
    bias = None if layer.bias is None else layer.bias.detach().bfloat16().float().contiguous()
    return Linear(*layer.quantized.for_kernel(), (layer.out_features, layer.in_features), bias, update)
