"""Twenty steps of QLoRA beside peft + bitsandbytes + torch: the same weights, notes, order and rates in float32.

The peers are put together the way their documentation does it, with a plain loop around them: the mean of the label tokens'
losses by `transformers`' own loss, gradients clipped, torch's AdamW.  They read the 4-bit checkpoint written here, since
bitsandbytes' CPU build double-quantizes a few constants apart from the exact rule (tests/peers/test_bitsandbytes.py).
"""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minilora import LoRAConfig, TrainConfig, add_lora, load_model, load_tokenizer, save_adapter, train
from minilora.data.batches import collate, epoch_batches, steps_per_epoch
from minilora.data.tables import label_set
from minilora.llama.bnb_format import save_quantized
from minilora.stepping import learning_rate
from minilora.train import encode_table
from tests.models import write_model
from tests.notes import notes, write_csv

peft = pytest.importorskip("peft", reason="extra [peers] is not installed")
transformers = pytest.importorskip("transformers", reason="extra [peers] is not installed")
pytest.importorskip("bitsandbytes", reason="extra [peers] is not installed")

STEPS = 20


def test_twenty_steps_of_qlora_equal_peft_bitsandbytes_and_torch(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", std=0.08)
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    save_quantized(load_model(base, dtype=torch.float32), quantized)
    load_tokenizer(base).save(quantized)
    config = TrainConfig(model=str(quantized), data=str(write_csv(tmp_path / "train.csv", notes(32))),
                         out=str(tmp_path / "run"),
                         r=4, alpha=8, batch_size=4, epochs=0, max_steps=STEPS, lr=5e-3, weight_decay=0.05, max_length=128,
                         save_every=0, dtype="float32", device="cpu", quiet=True)

    # The adapter that training starts from, by the same seed.
    start = load_model(quantized, dtype=torch.float32)
    torch.manual_seed(config.seed)
    add_lora(start, config.lora(), generator=torch.Generator().manual_seed(config.seed))
    save_adapter(start, tmp_path / "start")
    assert config.lora() == LoRAConfig(r=4, alpha=8)

    train(config)
    ours = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses, norms = peers(quantized, tmp_path / "start", tmp_path / "theirs", config)

    assert len(ours) == len(losses) == STEPS and ours[-1]["loss"] < 0.8 * ours[0]["loss"], "something was learnt"
    for line, loss, norm in zip(ours, losses, norms, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-4), line["step"]
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3), line["step"]
    found, expected = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("run", "theirs"))
    before = load_file(tmp_path / "start" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() == before.keys()
    for name, tensor in expected.items():
        moved = (tensor - before[name]).norm()
        assert moved > 0, f"{name} was not trained"
        assert (found[name] - tensor).norm() <= 1e-3 * moved, f"{name}: off by more than a thousandth of what it moved"


def peers(base: Path, adapter: Path, out: Path, config: TrainConfig) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the peers' steps; their adapter stands in `out`."""
    tokenizer = load_tokenizer(base)
    labels = label_set(label for _, label in notes(32))
    examples, _ = encode_table(config.data, config, tokenizer, labels, tokenizer.vocab_size)
    four_bit = transformers.AutoModelForCausalLM.from_pretrained(base, device_map="cpu", dtype=torch.float32)
    # Their CPU kernel for no-grad calls rounds codes to bfloat16; in training mode weights are unpacked in full.
    model: nn.Module = peft.PeftModel.from_pretrained(four_bit, adapter, is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=config.weight_decay)
    lengths = [len(example.input_ids) for example in examples]
    per_epoch = steps_per_epoch(len(examples), config.batch_size, config.accumulate)
    losses, norms = [], []
    for step in range(STEPS):
        [rows] = epoch_batches(lengths, config.batch_size, 1, config.seed, step // per_epoch)[step % per_epoch]
        batch = collate([examples[row] for row in rows], 0)
        optimizer.param_groups[0]["lr"] = learning_rate(step + 1, STEPS, config.lr, config.warmup)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad],
                                                          config.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.save_pretrained(out)          # type: ignore[operator]
    return losses, norms
