"""Adapters on disk, in PEFT's format.

    adapter_config.json          r, lora_alpha, target_modules, … as PEFT writes them
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, in), …lora_B.weight (out, r)
    minilora.json                what PEFT has no field for: how the base was quantized

Module names of our Llama are Hugging Face's, so the keys are the model's own names behind PEFT's prefix.  An adapter fits
the weights it was trained on: on a base quantized with another block size it still loads, but computes something else, so
loading it there warns.
"""
from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError
from minilora.files import atomic_path, write_json
from minilora.layers.lora import LoRAConfig, LoRALinear
from minilora.layers.qlora import Quantization, add_lora, lora_layers, quantization_of

CONFIG_FILE, WEIGHTS_FILE, EXTRA_FILE = "adapter_config.json", "adapter_model.safetensors", "minilora.json"
PREFIX = "base_model.model."


def lora_config_of(model: nn.Module) -> LoRAConfig:
    """The configuration the model's LoRA layers were made with.

    Raises: ConfigError: the model has none.
    """
    layers = list(lora_layers(model))
    if not layers:
        raise ConfigError("the model has no LoRA layers")
    first = layers[0][1]
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name, _ in layers))
    return LoRAConfig(first.r, first.alpha, first.dropout, targets, first.use_rslora,
                      first.lora_magnitude_vector is not None)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under PEFT's keys, float32, on the CPU."""
    tensors = {}
    for name, layer in lora_layers(model):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.weight
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.weight
        if layer.lora_magnitude_vector is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector
    return {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}


def save_adapter(model: nn.Module, folder: str | Path, base_model: str | None = None, extra: dict[str, Any] | None = None
                 ) -> None:
    """Write the model's adapters as PEFT does; `PeftModel.from_pretrained` reads the folder.

    Args:
        folder: created if absent; each file is replaced atomically.
        base_model: name or path recorded as the base. extra: entries added to minilora.json.

    Raises: ConfigError: no LoRA layers. OutputError: the disk refuses.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = lora_config_of(model)
    quantization = quantization_of(model)
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(adapter_tensors(model), temporary, metadata={"format": "pt"})
    write_json(folder / EXTRA_FILE, {"base_quantization": quantization and asdict(quantization), **(extra or {})})
    write_json(folder / CONFIG_FILE, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "target_modules": list(config.target_modules), "use_rslora": config.use_rslora, "use_dora": config.use_dora,
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    })


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file.

    Raises: CheckpointError: absent, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {path.parent}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({type(error).__name__}); write the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def read_extra(folder: str | Path) -> dict[str, Any]:
    """minilora.json of an adapter folder, empty when some other tool wrote the adapter."""
    path = Path(folder) / EXTRA_FILE
    return read_json_object(path) if path.exists() else {}


def read_adapter_config(folder: str | Path) -> tuple[LoRAConfig, dict[str, Any]]:
    """adapter_config.json as a `LoRAConfig`, and everything it says.

    Raises: CheckpointError: absent, malformed, or asks for something minilora does not do.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.parent.is_dir():
        raise CheckpointError(f"no such adapter folder: {folder}")
    raw = read_json_object(path)
    if raw.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{path}: peft_type {raw['peft_type']!r} is not supported, only LORA")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "layers_to_transform"):
        if raw.get(key):
            raise CheckpointError(f"{path}: {key} is set, which minilora does not support")
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias {raw['bias']!r} is not supported, only 'none'")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in raw]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    targets = raw["target_modules"]
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{path}: target_modules must be a list of names, found {targets!r:.80}")
    try:
        config = LoRAConfig(raw["r"], raw["lora_alpha"], raw.get("lora_dropout", 0.0), tuple(sorted(targets)),
                            bool(raw.get("use_rslora", False)), bool(raw.get("use_dora", False)))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return config, raw


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {path.parent}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({str(error).splitlines()[0]:.120}); copy or save it again"
                              ) from None


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Attach the adapter of a folder to a model, in place.

    Args:
        model: without LoRA layers; its base should be the one the adapter was trained on.

    Returns: the same model.
    Raises: CheckpointError: files missing, damaged, or of another model's shape.
    Warns: UserWarning when the base is quantized in another way than in training.
    """
    folder = Path(folder)
    config, _ = read_adapter_config(folder)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    _check_fit(model, config, tensors, folder)
    recorded, actual = read_extra(folder), quantization_of(model)
    if "base_quantization" in recorded and recorded["base_quantization"] != (actual and asdict(actual)):
        warnings.warn(f"the adapter in {folder} was trained on a base stored as {_described(recorded['base_quantization'])}, "
                      f"this one is {_described(actual and asdict(actual))}: its answers will differ from those evaluated",
                      stacklevel=2)
    add_lora(model, config)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            layer.lora_A.weight.copy_(tensors[f"{PREFIX}{name}.lora_A.weight"])
            layer.lora_B.weight.copy_(tensors[f"{PREFIX}{name}.lora_B.weight"])
            if layer.lora_magnitude_vector is not None:
                layer.lora_magnitude_vector.copy_(tensors[f"{PREFIX}{name}.lora_magnitude_vector"])
    return model


def _check_fit(model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Every tensor the model needs is there with its shape, finite, and none is left over; nothing is changed before."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in config.target_modules and hasattr(module, "in_features"):
            if isinstance(module, LoRALinear):
                raise CheckpointError("the model has an adapter already; load the base model anew")
            expected[f"{PREFIX}{name}.lora_A.weight"] = (config.r, module.in_features)
            expected[f"{PREFIX}{name}.lora_B.weight"] = (module.out_features, config.r)
            if config.use_dora:
                expected[f"{PREFIX}{name}.lora_magnitude_vector"] = (module.out_features,)
    for key, shape in expected.items():
        if key not in tensors:
            raise CheckpointError(f"{folder / WEIGHTS_FILE} lacks {key}: the adapter belongs to another model, or is damaged")
        if tuple(tensors[key].shape) != shape:
            raise CheckpointError(f"{folder / WEIGHTS_FILE}: {key} has shape {tuple(tensors[key].shape)}, this model needs "
                                  f"{shape}: the adapter belongs to another model")
        if not bool(torch.isfinite(tensors[key]).all()):
            raise CheckpointError(f"{folder / WEIGHTS_FILE}: {key} holds NaN or infinities")
    left_over = sorted(tensors.keys() - expected.keys())
    if left_over or not expected:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} holds {left_over[0] if left_over else 'an adapter'}, for which this "
                              "model has no place: the adapter belongs to another model")


def _described(quantization: Any) -> str:
    if not isinstance(quantization, dict):
        return "16- or 32-bit"
    nested = "with" if quantization.get("double_quant") else "without"
    return f"{quantization.get('quant_type', 'nf4')} in blocks of {quantization.get('blocksize')} {nested} double quantization"

