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
        into: "16bit" makes dense linears of Ŵ + ΔW; "4bit" quantizes that sum again, with the base's block size.
        dtype: of the dense weights; default the type the base was quantized from, or is stored in.
        trained_on: for a model whose base is the *original* dense one: how the base was quantized in training.  The
            merge is then W + ΔW, and the error is measured against the Ŵ + ΔW that training saw.
        on_layer: called with each layer's name and measured error.

    Returns: the same model without LoRA layers.
    Raises: ConfigError: nothing to merge, another `into`, or "4bit" over a dense base without `trained_on`; the model is
        then as it was.
    """
    layers = list(lora_layers(model))
    if not layers:
        raise ConfigError("the model has no LoRA layers to merge")
    if into not in ("16bit", "4bit"):
        raise ConfigError(f"into must be '16bit' or '4bit', not {into!r}")
    if into == "4bit" and trained_on is None and not all(isinstance(layer.base_layer, NF4Linear) for _, layer in layers):
        raise ConfigError("merging into 4 bits needs a 4-bit base: load the model with quantize='nf4'")
    for name, layer in layers:
        base = layer.base_layer
        bias = getattr(base, "bias", None)
        stored_in = base.weight_dtype if isinstance(base, NF4Linear) else dense_weight(base).dtype
        weight = layer.merged_weight()
        new: nn.Module
        if into == "4bit":
            own = Quantization(base.blocksize, base.double_quant) if isinstance(base, NF4Linear) else None
            how = own or trained_on or Quantization()       # the last never: refused above
            new = NF4Linear(quantize_nf4(weight.to(stored_in), how.blocksize, how.double_quant), bias)
        else:
            dense: nn.Linear = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, bias=bias is not None,
                                                  dtype=dtype or stored_in, device=weight.device)
            dense.weight.copy_(weight)
            if bias is not None:
                dense.bias.copy_(bias)
            new = dense.requires_grad_(False)
        if on_layer is not None:
            seen = dense_weight(base)       # the base weight that training saw
            if trained_on is not None and not isinstance(base, NF4Linear):
                seen = quantize_nf4(seen, trained_on.blocksize, trained_on.double_quant).dequantize()
            on_layer(name, MergeError.measure(dense_weight(new), layer.merged_weight(seen), seen))
        replace_module(model, name, new.train(model.training))
    return model
