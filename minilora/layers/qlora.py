"""Where 4-bit weights and LoRA meet: attach both to a model.

QLoRA = a frozen NF4 base (`quantize_linears`) + float32 low-rank updates over it (`add_lora`).  Either works alone:
`add_lora` on a 16-bit model is LoRA.  Merging back is in `merge`.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from minilora.errors import ConfigError
from minilora.layers.lora import ALL_LINEARS, LoRAConfig, LoRALinear
from minilora.layers.nf4_linear import NF4Linear


@dataclass(frozen=True)
class Quantization:
    """How a base model's linears are stored; an adapter fits the weights it was trained on and no others."""

    blocksize: int = 64
    double_quant: bool = True
    quant_type: str = "nf4"


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the dotted `name` points."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers with their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def quantization_of(model: nn.Module) -> Quantization | None:
    """How the model's linears are quantized, judged by the first that is; None for a dense model."""
    for module in model.modules():
        if isinstance(module, NF4Linear):
            return Quantization(module.blocksize, module.double_quant)
    return None


def quantize_linears(model: nn.Module, blocksize: int = 64, double_quant: bool = True,
                     target_modules: tuple[str, ...] = ALL_LINEARS) -> nn.Module:
    """Replace dense linears by 4-bit ones in place, one at a time.

    Embeddings, norms and the head stay as they are, as in the paper's implementation.

    Args:
        target_modules: last name parts of the linears to quantize.

    Returns: the same model.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in target_modules:
            replace_module(model, name, NF4Linear.from_linear(module, blocksize, double_quant))
    return model


def is_target(name: str, targets: Iterable[str]) -> bool:
    """Whether a module is meant: a target is its name or the end of it, cut at a dot, as in PEFT."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def add_lora(model: nn.Module, config: LoRAConfig | None = None, generator: torch.Generator | None = None) -> nn.Module:
    """Freeze the model and put a trainable `LoRALinear` over each targeted linear, in place.

    Args:
        model: any module with linears whose name, or its end ("q_proj", "mlp.up_proj"), is in ``config.target_modules``.
        generator: source of the initial A matrices, drawn in the model's order; default torch's global one.

    Returns: the same model; only the adapters have ``requires_grad``.
    Raises: ConfigError: a target matches no linear, or the model has adapters already.
    """
    config = config or LoRAConfig()
    if not isinstance(config, LoRAConfig):
        raise ConfigError(f"add_lora takes a LoRAConfig, not a {type(config).__name__}: LoRAConfig(r=16, alpha=32)")
    if next(lora_layers(model), None) is not None:
        raise ConfigError("the model has LoRA layers already; merge or reload it first")
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, NF4Linear))]
    unknown = [target for target in config.target_modules if not any(is_target(name, (target,)) for name, _ in linears)]
    if unknown or not config.target_modules:
        names = {name.rpartition(".")[2] for name, _ in linears}
        raise ConfigError(f"no linear layer is called {', '.join(map(repr, unknown)) or '(nothing)'}; the model has "
                          f"{', '.join(sorted(names))}")
    model.requires_grad_(False)
    for name, module in linears:
        if is_target(name, config.target_modules):
            layer = LoRALinear(module, config.r, config.alpha, config.dropout, config.use_rslora, config.use_dora, generator)
            replace_module(model, name, layer.train(model.training))
    return model


@contextmanager
def base_only(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its adapters, for as long as the block lasts."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = False
    try:
        yield model
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


@contextmanager
def bases_in_place(model: nn.Module) -> Iterator[nn.Module]:
    """The model with each adapted linear in its adapter's place, for as long as the block lasts: how a base is saved."""
    layers = list(lora_layers(model))
    for name, layer in layers:
        replace_module(model, name, layer.base_layer)
    try:
        yield model
    finally:
        for name, layer in layers:
            replace_module(model, name, layer)


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters, a 4-bit weight counted as the numbers it stands for and not as its bytes."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    return trained, trained + frozen + packed
