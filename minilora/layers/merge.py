"""Folding adapters into the weights, and what that costs.

Training saw Ŵ + ΔW, where Ŵ is the dequantized base.  Three merges are in use:

    into the dequantized base, saved in 16 bits    Ŵ + ΔW     the model that was trained, up to 16-bit rounding
    into the original 16-bit base                  W + ΔW     off by W − Ŵ, which is about as large as ΔW itself
    back into 4 bits                               Q(Ŵ + ΔW)  rounding eats updates smaller than half a level

Each merge measures itself against Ŵ + ΔW, layer by layer, so that a user sees which model is being shipped.

Lesson 16 explains it.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.layers.lora import dense_weight
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import Quantization, lora_layers, replace_module
from minilora.quant.nf4 import quantize_nf4


@dataclass(frozen=True)
class MergeError:
    """One merged layer against the weight that was trained, all over the Frobenius norm.

    Attributes:
        relative_error: ‖merged − trained‖ / ‖trained‖.
        error_to_update: ‖merged − trained‖ / ‖update‖: above 1, the error outweighs what was learnt.
        update_cosine: cosine between what merging added to Ŵ and what training added to it; 1 keeps all of it.
    """

    relative_error: float
    error_to_update: float
    update_cosine: float

    @staticmethod
    def measure(merged: Tensor, trained: Tensor, base: Tensor) -> MergeError:
        """All three (out, in), any dtype; computed in float32."""
        merged, trained, base = merged.float(), trained.float(), base.float()
        error, update, kept = (merged - trained).norm(), trained - base, merged - base
        scale = update.norm() * kept.norm()
        return MergeError(float(error / trained.norm()), float(error / update.norm()) if update.norm() else 0.0,
                          float((update * kept).sum() / scale) if scale else 1.0)


@torch.no_grad()
def merge_lora(model: nn.Module, into: Literal["16bit", "4bit"] = "16bit", dtype: torch.dtype | None = None,
               trained_on: Quantization | None = None,
               on_layer: Callable[[str, MergeError], None] | None = None) -> nn.Module:
    """Replace every LoRA layer by a plain one that computes the same, in place.

    Args:
        model: with LoRA layers over dense or 4-bit linears.
        into: "16bit" makes dense linears of Ŵ + ΔW; "4bit" quantizes that sum again, with the base's block size, where the base
            is 4-bit: a layer that was dense in training, such as the head, stays so.
        dtype: of the dense weights; default the type the base was quantized from, or is stored in.  In float32 Ŵ is not
            rounded to that first.
        trained_on: for a model whose base is the *original* dense one: how the base was quantized in training.  The
            merge is then W + ΔW, and the error is measured against the Ŵ + ΔW that training saw.
        on_layer: called with each layer's name and measured error.

    Returns: the same model without LoRA layers.
    Raises: ConfigError: nothing to merge, another `into`, "4bit" over a base all dense without `trained_on`, or an adapter that
        is not finite; the model is then as it was.  Or a sum that its type cannot hold: layers before that one are merged.
    """
    layers = list(lora_layers(model))
    if not layers:
        raise ConfigError("the model has no LoRA layers to merge")
    if into not in ("16bit", "4bit"):
        raise ConfigError(f"into must be '16bit' or '4bit', not {into!r}")
    if into == "4bit" and trained_on is None and not any(isinstance(layer.base_layer, NF4Linear) for _, layer in layers):
        raise ConfigError("merging into 4 bits needs a 4-bit base, and every layer with an adapter is dense; merge into 16 "
                          "bits, and quantize the result")
    for name, layer in layers:
        parts = (layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
        if not all(bool(part.isfinite().all()) for part in parts if part is not None):
            raise ConfigError(f"{name}: the adapter holds a NaN or an infinity and cannot be merged")
    for name, layer in layers:
        base = layer.base_layer
        bias = getattr(base, "bias", None)
        how = trained_on
        if isinstance(base, NF4Linear):
            how, stored_in = Quantization(base.blocksize, base.double_quant), base.weight_dtype
            seen = base.dense_weight(torch.float32 if dtype == torch.float32 else None)     # the base that training saw
        else:
            seen = dense_weight(base)
            stored_in = seen.dtype
        to_4bit = how if into == "4bit" else None
        weight = layer.merged_weight(seen).to(stored_in if to_4bit else dtype or stored_in)
        if not bool(weight.isfinite().all()):
            raise ConfigError(f"{name}: base and adapter add up to numbers that {weight.dtype} cannot hold: the adapter's are "
                              "too large, or it is of another base")
        new: nn.Module
        if to_4bit:
            new = NF4Linear(quantize_nf4(weight, to_4bit.blocksize, to_4bit.double_quant), bias)
        else:
            dense: nn.Linear = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, bias=bias is not None,
                                                  dtype=weight.dtype, device=weight.device)
            dense.weight.copy_(weight)
            if bias is not None:
                dense.bias.copy_(bias)
            new = dense.requires_grad_(False)
        if on_layer is not None:
            if trained_on is not None and not isinstance(base, NF4Linear):
                seen = quantize_nf4(seen, trained_on.blocksize, trained_on.double_quant).dequantize()
            on_layer(name, MergeError.measure(dense_weight(new), layer.merged_weight(seen), seen))
        replace_module(model, name, new.train(model.training))
    return model
