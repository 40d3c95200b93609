"""Adapters on disk, in PEFT's format.

    adapter_config.json          r, lora_alpha, target_modules, … as PEFT writes them
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, in), …lora_B.weight (out, r)
    minilora.json                what PEFT has no field for: how the base was quantized, which weights it had, the prompt it
                                 was trained with

Module names of our Llama are Hugging Face's, so the keys are the model's own names behind PEFT's prefix.  An adapter fits
the weights it was trained on: on another model of its shape, or on one quantized with another block size, it still loads, but
computes something else, so loading it there warns.
"""
from __future__ import annotations

import hashlib
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError, OutputError
from minilora.files import atomic_path, write_json
from minilora.layers.lora import LoRAConfig, LoRALinear, dense_weight
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import Quantization, add_lora, is_target, lora_layers, quantization_of
from minilora.llama.safetensors_file import TensorEntry, read_header, read_tensor
from minilora.llama.strict_json import LARGEST_OBJECT, parse_object, read_bytes

CONFIG_FILE, WEIGHTS_FILE, EXTRA_FILE = "adapter_config.json", "adapter_model.safetensors", "minilora.json"
PREFIX = "base_model.model."
LARGEST_CONFIG = 1 << 20        # bytes of adapter_config.json; it takes a thousand
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What PEFT can set that makes the adapter another function than the one computed here.
UNSUPPORTED = ("rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "layers_to_transform", "layer_replication",
               "exclude_modules", "lora_bias", "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
               "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "megatron_config")
MERGE_ELSEWHERE = "let PEFT merge it into its base (merge_and_unload), and name what that saves as the model"
# Trap: these starts subtract B A from the base weights, and the adapter's file alone doesn't tell the new base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_config_of(model: nn.Module) -> LoRAConfig:
    """The configuration the model's LoRA layers were made with.

    Raises: ConfigError: the model has none, or its layers were not all made with one.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ConfigError("the model has no LoRA layers")
    settings = {(layer.r, layer.alpha, layer.dropout, layer.use_rslora, layer.lora_magnitude_vector is not None)
                for layer in layers.values()}
    if len(settings) > 1:
        raise ConfigError("the model's LoRA layers differ in r, alpha, dropout or variant; an adapter folder holds one setting")
    (r, alpha, dropout, use_rslora, use_dora), = settings
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    others = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, NF4Linear))
              and not any(name.startswith(f"{adapted}.") for adapted in layers)]
    if any(is_target(name, targets) for name in others):        # only some of a kind are adapted: name each in full
        targets = tuple(layers)
    return LoRAConfig(r, alpha, dropout, targets, use_rslora, use_dora)


def base_digest(model: nn.Module) -> str:
    """SHA-256 of the weight under the model's first adapter: of its 4-bit codes, or of its values rounded to bfloat16.

    The same on every device and in every compute type.
    """
    base = next(layer.base_layer for _, layer in lora_layers(model))
    stored = base.packed if isinstance(base, NF4Linear) else dense_weight(base).to(torch.bfloat16)
    return hashlib.sha256(stored.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under PEFT's keys, float32, on the CPU."""
    tensors = {}
    for name, layer in lora_layers(model):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.weight
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.weight
        if layer.lora_magnitude_vector is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector
    return {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}


def save_adapter(model: nn.Module, folder: str | Path, base_model: str | None = None, extra: dict[str, Any] | None = None,
                 revision: str | None = None, digest: str | None = None) -> None:
    """Write the model's adapters as PEFT does; `PeftModel.from_pretrained` reads the folder.

    Args:
        folder: created if absent; each file is replaced atomically.
        base_model: name or path recorded as the base. extra: entries added to minilora.json.
        revision: of a base on the hub; PEFT fetches that one. digest: `base_digest`, where the base is no longer whole here.

    Raises: ConfigError: no LoRA layers, or layers of several settings. OutputError: the disk refuses.
    """
    folder = Path(folder)
    config = lora_config_of(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; check the path and its permissions") from error
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(adapter_tensors(model), temporary, metadata={"format": "pt"})
    save_extra(model, folder, {"base_digest": digest or base_digest(model), **(extra or {})})
    write_json(folder / CONFIG_FILE, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "revision": revision,
        "inference_mode": True,
        "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "target_modules": list(config.target_modules), "use_rslora": config.use_rslora, "use_dora": config.use_dora,
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    })


def save_extra(model: nn.Module, folder: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write minilora.json: how the model is stored, so that it is loaded like that again, and the entries of `extra`."""
    quantization = quantization_of(model)
    write_json(Path(folder) / EXTRA_FILE, {"base_quantization": quantization and asdict(quantization), **(extra or {})})


def read_json_object(path: Path, largest: int = LARGEST_OBJECT) -> dict[str, Any]:
    """A JSON object from an untrusted file of at most `largest` bytes.

    Raises: CheckpointError: absent, too large, not JSON, or not an object.
    """
    if not path.exists():
        raise CheckpointError(f"no {path.name} in {path.parent}")
    return parse_object(read_bytes(path, largest), str(path))


def read_extra(folder: str | Path) -> dict[str, Any]:
    """minilora.json of an adapter folder, empty when some other tool wrote the adapter."""
    path = Path(folder) / EXTRA_FILE
    return read_json_object(path) if path.exists() else {}


def base_quantization(folder: str | Path) -> Quantization | None:
    """How the base of a folder's adapter was stored in training; the default where another tool wrote the adapter.

    Raises: CheckpointError: minilora.json is malformed.
    """
    found = read_extra(folder).get("base_quantization", asdict(Quantization()))
    if found is None:
        return None
    how = found if isinstance(found, dict) else {}
    blocksize, double_quant = how.get("blocksize"), how.get("double_quant")
    if type(blocksize) is not int or blocksize < 1 or not isinstance(double_quant, bool):
        raise CheckpointError(f"{Path(folder) / EXTRA_FILE}: base_quantization must be null, or an object with blocksize and "
                              f"double_quant, found {found!r:.80}")
    return Quantization(blocksize, double_quant)


def read_adapter_config(folder: str | Path) -> tuple[LoRAConfig, dict[str, Any]]:
    """adapter_config.json as a `LoRAConfig`, and everything it says.

    Raises: CheckpointError: absent, malformed, or asks for something minilora does not do.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.parent.is_dir():
        raise CheckpointError(f"no such adapter folder: {folder}")
    raw = read_json_object(path, LARGEST_CONFIG)
    if raw.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{path}: peft_type {raw['peft_type']!r:.60} is not supported, only LORA; {MERGE_ELSEWHERE}")
    for key in UNSUPPORTED:
        if not (raw.get(key) is None or raw[key] is False or raw[key] in ([], {})):     # 0 means the first layer
            raise CheckpointError(f"{path}: {key} is set, which minilora does not support; {MERGE_ELSEWHERE}")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise CheckpointError(f"{path}: init_lora_weights is {start!r:.40}: such an adapter belongs to a base that was changed "
                              "at its start; convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion)")
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias {raw['bias']!r:.60} is not supported, only 'none'; {MERGE_ELSEWHERE}")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(raw.get(key), (bool, type(None))):        # "false" would count as true
            raise CheckpointError(f"{path}: {key} must be true or false, not {raw[key]!r:.40}")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in raw]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    targets = raw["target_modules"]
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{path}: target_modules must be a list of names, found {targets!r:.80}; write those that the "
                              f"pattern fits, or {MERGE_ELSEWHERE}")
    try:
        config = LoRAConfig(raw["r"], raw["lora_alpha"], raw.get("lora_dropout", 0.0), tuple(sorted(targets)),
                            bool(raw.get("use_rslora")), bool(raw.get("use_dora")))
    except (ConfigError, OverflowError) as error:       # Trap: of 10 ** 400 nobody can say whether it is finite
        raise CheckpointError(f"{path}: {error!s:.200}") from None
    return config, raw


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Attach the adapter of a folder to a model, in place.

    Args:
        model: without LoRA layers; its base should be the one the adapter was trained on.

    Returns: the same model.
    Raises: CheckpointError: files missing, damaged, or of another model's shape.
    Warns: UserWarning when the base is quantized in another way than in training, or has other weights.
    """
    folder = Path(folder)
    config, _ = read_adapter_config(folder)
    tensors = _fitting(model, config, folder)
    recorded, actual = read_extra(folder), quantization_of(model)
    same_storage = recorded.get("base_quantization", actual and asdict(actual)) == (actual and asdict(actual))
    if not same_storage:
        warnings.warn(f"the adapter in {folder} was trained on a base stored as {_described(recorded['base_quantization'])}, "
                      f"this one is {_described(actual and asdict(actual))}: its answers will differ from those evaluated",
                      stacklevel=2)
    # Trap: PEFT allows targets that this model has none of, as long as one is there.
    linears = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    present = tuple(target for target in config.target_modules if any(is_target(name, (target,)) for name in linears))
    add_lora(model, replace(config, target_modules=present))
    with torch.no_grad():
        for name, layer in lora_layers(model):
            layer.lora_A.weight.copy_(tensors[f"{PREFIX}{name}.lora_A.weight"])
            layer.lora_B.weight.copy_(tensors[f"{PREFIX}{name}.lora_B.weight"])
            if layer.lora_magnitude_vector is not None:
                layer.lora_magnitude_vector.copy_(tensors[f"{PREFIX}{name}.lora_magnitude_vector"])
    if same_storage and recorded.get("base_digest", digest := base_digest(model)) != digest:
        own = f"the run's own base, {folder / 'base'}" if recorded.get("init_lora_weights", "lora") != "lora" else \
            str(recorded.get("base_model", "another model"))
        warnings.warn(f"the adapter in {folder} was trained over other weights than these: over {own}; its answers will be "
                      "others than those evaluated", stacklevel=2)
    return model


def _fitting(model: nn.Module, config: LoRAConfig, folder: Path) -> dict[str, Tensor]:
    """Every tensor that the model needs, after making sure that each is there with its shape, finite, and none is left over.

    The file's header is compared first, so no more memory is taken than the model's own adapter does; nothing is changed.
    """
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise CheckpointError(f"no {path.name} in {path.parent}")
    entries = read_header(path)
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if is_target(name, config.target_modules) and hasattr(module, "in_features"):
            if isinstance(module, LoRALinear):
                raise CheckpointError("the model has an adapter already; load the base model anew")
            expected[f"{PREFIX}{name}.lora_A.weight"] = (config.r, module.in_features)
            expected[f"{PREFIX}{name}.lora_B.weight"] = (module.out_features, config.r)
            if config.use_dora:
                expected[f"{PREFIX}{name}.lora_magnitude_vector"] = (module.out_features,)
    for key, shape in expected.items():
        if key not in entries:
            raise CheckpointError(f"{path} lacks {key}: the adapter belongs to another model, or is damaged")
        if entries[key].shape != shape:
            raise CheckpointError(f"{path}: {key} has shape {entries[key].shape!s:.60}, this model needs {shape}: the adapter "
                                  "belongs to another model")
        if entries[key].dtype not in FLOATS:
            raise CheckpointError(f"{path}: {key} has type {entries[key].dtype_name}; expected a floating type")
    left_over = [key for key in sorted(entries.keys() - expected.keys()) if not _is_own_weight(model, entries[key])]
    if left_over or not expected:
        raise CheckpointError(f"{path} holds {left_over[0] if left_over else 'an adapter'}, for which this "
                              "model has no place: the adapter belongs to another model, or changes more than its linears")
    tensors = {key: read_tensor(entries[key]) for key in expected}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {key} holds NaN or infinities")
    return tensors


def _is_own_weight(model: nn.Module, entry: TensorEntry) -> bool:
    """Whether a tensor is the model's weight, which PEFT saves beside an adapter on the head."""
    name = entry.key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, (nn.Linear, NF4Linear)) or entry.key != f"{PREFIX}{name}.base_layer.weight":
        return False
    if entry.shape != (module.out_features, module.in_features) or entry.dtype not in FLOATS:
        return False
    tensor = read_tensor(entry)
    return torch.equal(tensor, dense_weight(module).to("cpu", tensor.dtype))


def _described(quantization: Any) -> str:
    if not isinstance(quantization, dict):
        return "16- or 32-bit"
    nested = "with" if quantization.get("double_quant") else "without"
    return f"{quantization.get('quant_type', 'nf4')} in blocks of {quantization.get('blocksize')} {nested} double quantization"

