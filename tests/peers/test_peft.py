"""LoRA, rsLoRA and DoRA against peft: outputs, gradients, adapters in both directions, merges."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from minilora import (
    CheckpointError,
    LoRAConfig,
    LoRALinear,
    TrainConfig,
    add_lora,
    load_adapter,
    load_model,
    merge_lora,
    save_adapter,
    train,
)
from minilora.layers.lora import dense_weight
from minilora.layers.qlora import lora_layers
from minilora.own_base import start_adapters
from minilora.stepping import rate_groups
from tests.models import write_model
from tests.notes import notes, write_csv

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
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-5 * float(other.detach().abs().max()))


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
def test_an_adapter_written_by_peft_loads_here_with_equal_gradients(
        base: Path, tmp_path: Path, options: dict[str, bool]) -> None:
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


def by_peft(base: Path, folder: Path, **options: object) -> nn.Module:
    """A PEFT model with a random update, saved to `folder`."""
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(r=3, lora_alpha=5, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("options", [
    {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}, {"target_modules": ["model.layers.1.self_attn.v_proj"]},
    {"target_modules": "all-linear"}, {"target_modules": ["q_proj", "query_key_value"]},
    {"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    {"target_modules": ["o_proj"], "use_rslora": True, "use_dora": True},
])
def test_what_peft_lets_a_user_choose_computes_the_same_here(base: Path, tmp_path: Path, options: dict[str, object]) -> None:
    other = by_peft(base, tmp_path, **options).eval()
    model = load_adapter(load_model(base, quantize=None, dtype=torch.float32), tmp_path)
    close(model(IDS), other(IDS).logits)
    save_adapter(model, tmp_path / "again")
    close(peft.PeftModel.from_pretrained(theirs(base), tmp_path / "again").eval()(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("options", [
    {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"lora_bias": True}, {"layers_to_transform": 0},
    {"alora_invocation_tokens": [3]}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 2}},
])
def test_what_is_another_function_of_the_weights_is_refused(base: Path, tmp_path: Path, options: dict[str, object]) -> None:
    by_peft(base, tmp_path, target_modules=["q_proj"], **options)
    with pytest.raises(CheckpointError, match=next(iter(options))):
        load_adapter(load_model(base, quantize=None, dtype=torch.float32), tmp_path)


@pytest.mark.parametrize("options", [{"rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]},
                                     {"target_modules": r".*layers\.1\..*_proj"}, {"exclude_modules": r".*layers\.0.*"}])
def test_what_a_refusal_says_to_do_gives_the_adapters_model(base: Path, tmp_path: Path, options: dict[str, object]) -> None:
    other = by_peft(base, tmp_path / "adapter", **{"target_modules": ["q_proj", "up_proj"], **options}).eval()
    with pytest.raises(CheckpointError, match=r"let PEFT merge it into its base \(merge_and_unload\)"):
        load_adapter(load_model(base, quantize=None, dtype=torch.float32), tmp_path / "adapter")
    expected = other(IDS).logits
    other.merge_and_unload().save_pretrained(tmp_path / "merged")
    close(load_model(tmp_path / "merged", quantize=None, dtype=torch.float32)(IDS), expected)


def test_an_adapter_on_the_head_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    by_peft(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    other = load_model(write_model(tmp_path / "other", seed=1), quantize=None, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"lm_head\.base_layer\.weight"):
        load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_falls_on_the_same_entries(base: Path, tmp_path: Path, use_dora: bool) -> None:
    other = by_peft(base, tmp_path, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.3, use_dora=use_dora)
    model = load_adapter(load_model(base, quantize=None, dtype=torch.float32), tmp_path).train()
    assert not torch.equal(model(IDS), model(IDS))
    torch.manual_seed(5)
    expected = other.train()(IDS).logits
    torch.manual_seed(5)
    close(model(IDS), expected)


def test_a_dora_row_of_zeros_is_nan_there_and_finite_here() -> None:
    base = nn.Sequential()
    base.q_proj = nn.Linear(8, 4, bias=False)
    nn.init.zeros_(base.q_proj.weight[1].data)
    ours, x = LoRALinear(base.q_proj, use_dora=True), torch.randn(2, 8)
    found = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], use_dora=True))(x)
    assert torch.isnan(found[:, 1]).all()
    assert torch.equal(ours(x)[:, 1], torch.zeros(2))
    rows = [0, 2, 3]
    torch.testing.assert_close(ours(x)[:, rows], found[:, rows])


@pytest.mark.parametrize("use_dora", [False, True])
def test_qlora_equals_peft_over_bitsandbytes(tmp_path: Path, use_dora: bool) -> None:
    pytest.importorskip("bitsandbytes", reason="extra [peers] is not installed")
    base = write_model(tmp_path / "base", hidden_size=128, intermediate_size=256)       # rows of whole blocks, as its CPU needs
    model = add_lora(load_model(base, dtype=torch.float32, double_quant=False), LoRAConfig(r=4, use_dora=use_dora))
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)
    other = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(
        base, device_map="cpu", dtype=torch.float32, quantization_config=how), tmp_path / "adapter", is_trainable=True).train()
    ours, reference = model.train()(IDS), other(IDS).logits
    close(ours, reference)
    ours.square().mean().backward()
    reference.square().mean().backward()
    gradients = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    for name, layer in lora_layers(model):
        for part in ("lora_A", "lora_B"):
            close(getattr(layer, part).weight.grad, gradients[f"base_model.model.{name}.{part}.default.weight"])


def test_pissa_starts_as_in_peft(base: Path) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    other = peft.get_peft_model(theirs(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets,
                                                              init_lora_weights="pissa"))
    model = load_model(base, quantize=None, dtype=torch.float32)
    add_lora(model, LoRAConfig(r=3, alpha=5))
    start_adapters(model, base, "pissa")
    for name, layer in lora_layers(model):
        peer = other.get_submodule(f"base_model.model.{name}")
        # A and B are unique up to a sign for each direction; their product and the base are unique.
        close(layer.update(), peer.get_delta_weight("default"))
        close(dense_weight(layer.base_layer), peer.base_layer.weight)


def test_lora_plus_gives_the_rates_that_peft_gives(base: Path) -> None:
    optimizers = pytest.importorskip("peft.optimizers")
    other = peft.get_peft_model(theirs(base), peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    optimizer = optimizers.create_loraplus_optimizer(other, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    expected = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    theirs_by_name = {name.replace(".default", "").removeprefix("base_model.model."): expected[id(parameter)]
                      for name, parameter in other.named_parameters() if parameter.requires_grad}

    model = load_model(base, quantize=None, dtype=torch.float32)
    add_lora(model, LoRAConfig(r=3, target_modules=("q_proj", "up_proj")))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)]: 1e-3 * rate for parameters, rate in rate_groups(model, 16)
            for parameter in parameters} == theirs_by_name


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_a_run_over_its_own_base_answers_the_same_in_transformers_and_peft(base: Path, tmp_path: Path, start: str) -> None:
    pytest.importorskip("bitsandbytes")
    table = write_csv(tmp_path / "train.csv", notes(16))
    train(TrainConfig(model=str(base), data=str(table), out=str(tmp_path / "run"), r=4, batch_size=4, epochs=1, lr=1e-2,
                      max_length=128, dtype="float32", device="cpu", quiet=True,
                      init_lora_weights=start))                                     # type: ignore[arg-type]
    ours = load_model(base, dtype=torch.float32, adapter=tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    other = peft.PeftModel.from_pretrained(theirs(Path(config["base_model_name_or_path"])), tmp_path / "run")
    # Their CPU kernel for calls without a gradient rounds codes to bfloat16; in training mode weights are unpacked in full.
    close(ours(IDS), other.train()(IDS).logits)
