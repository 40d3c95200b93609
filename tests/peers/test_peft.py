"""LoRA, rsLoRA and DoRA against peft: outputs, gradients, adapters in both directions, merges."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from minilora import LoRAConfig, add_lora, load_adapter, load_model, merge_lora, save_adapter
from minilora.layers.qlora import lora_layers
from tests.models import write_model

peft = pytest.importorskip("peft", reason="extra [peers] is not installed")
transformers = pytest.importorskip("transformers", reason="extra [peers] is not installed")

IDS = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(3))
VARIANTS = [{}, {"use_rslora": True}, {"use_dora": True}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("peft") / "base")


def theirs(base: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def close(ours: torch.Tensor, other: torch.Tensor) -> None:
    # float32 through two blocks: the order of additions differs in the last bits.
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("options", VARIANTS)
def test_an_adapter_written_here_loads_in_peft(base: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    model = load_model(base, quantize=None, dtype=torch.float32)
    add_lora(model, LoRAConfig(r=4, alpha=6, **options), torch.Generator().manual_seed(0))
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.data.mul_(1.3)
    save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(theirs(base), tmp_path).eval()
    close(model.eval()(IDS), other(IDS).logits)
    merged = merge_lora(model)
    close(merged(IDS), other.merge_and_unload()(IDS).logits)


@pytest.mark.parametrize("options", VARIANTS)
def test_an_adapter_written_by_peft_loads_here_with_equal_gradients(base: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    other = peft.get_peft_model(theirs(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options))
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    other.save_pretrained(tmp_path)
    model = load_adapter(load_model(base, quantize=None, dtype=torch.float32), tmp_path)
    ours, reference = model(IDS), other(IDS).logits
    close(ours, reference)
    ours.square().mean().backward()
    reference.square().mean().backward()
    gradients = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    for name, layer in lora_layers(model):
        for part in ("lora_A", "lora_B"):
            close(getattr(layer, part).weight.grad, gradients[f"base_model.model.{name}.{part}.default.weight"])
        if options.get("use_dora"):
            close(layer.lora_magnitude_vector.grad, gradients[f"base_model.model.{name}.lora_magnitude_vector.default.weight"])


def test_the_start_has_pefts_distribution(base: Path) -> None:
    model = add_lora(load_model(base, quantize=None), LoRAConfig(r=32))
    other = peft.get_peft_model(theirs(base), peft.LoraConfig(r=32, target_modules=["q_proj"]))
    ours = model.model.layers[0].self_attn.q_proj.lora_A.weight
    reference = other.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert abs(float(ours.std() / reference.std()) - 1) < 0.1
    assert float(ours.abs().max()) <= 1 / 8 and float(reference.abs().max()) <= 1 / 8
