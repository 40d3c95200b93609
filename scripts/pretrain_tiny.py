#!/usr/bin/env python3
"""Make the small base model that ships: tokenizer, pretraining from scratch, model card.

    python scripts/pretrain_tiny.py --out tiny          # 85 minutes on two cores

The folder is what ships in minilora/assets/tiny.  The text comes from `minilora.data.radiology.corpus`: unlabelled
notes, findings, definitions, and notes with a reading of what they say.  No document holds a note and a protocol label, so
what protocol a note asks for is left to fine-tuning.
"""
from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minilora.data.batches import Batch, collate, epoch_batches
from minilora.data.prompts import IGNORED
from minilora.data.radiology.corpus import documents, encode_documents
from minilora.llama.config import LlamaConfig
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.tokenizer import read_tokenizer
from minilora.loss import label_loss
from minilora.optim.adamw import AdamW
from minilora.stepping import learning_rate

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
PAD_ID = 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": True, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}

CARD = """---
library_name: minilora
tags: [llama, tiny, synthetic]
license: mit
---
# The small model that ships with minilora

A Llama of {parameters:,} parameters ({num_hidden_layers} blocks of width {hidden_size}, {num_attention_heads} query heads
over {num_key_value_heads} key/value heads, SwiGLU of {intermediate_size}, tied embeddings, {vocab_size:,} tokens), so that
fine-tuning can be shown, tested and measured offline, on a laptop. It is a real Llama in Hugging Face's layout:
`transformers` loads it as it is.

## How it was made

By `scripts/pretrain_tiny.py`, from random weights, on text that `minilora.data.radiology.corpus` generates; nothing else was
read:

```
{command}
```

{table}

Held-out documents come from another seed; none was trained on. The loss stands on all of a note alone, of definitions and of
findings; of a note that is read, on the reading only. Optimizer: Muon on the blocks' matrices (`--lr` is its peak rate, weight
decay 0.1), AdamW on the rest at half the rate; warm-up, then a cosine to zero; products in bfloat16, weights in float32.
The run has not been repeated.

![training and held-out loss over the steps](pretraining.png)

The figures of the curve are in `pretraining.json`.

## What it has read, and what it has not

Synthetic order notes; such notes with a reading in plain words (what is looked for, what is allowed, which fact changes
the plan); definitions of terms and protocols; findings. No document holds both a note and the name of a protocol: which
protocol a note asks for is left to fine-tuning, and before it the model scores next to nothing on that. The phrasings of
the validation and test splits occur nowhere in the text.

## Limits

It knows the synthetic world of its corpus and no other: no general language, no medicine. It is **no medical device**.
"""


def train_tokenizer(texts: list[str], vocab: int, folder: Path) -> None:
    """A byte-level BPE in which every digit is a token of its own, so that numbers can be read digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD,
        "add_bos_token": True, "model_max_length": CONFIG["max_position_embeddings"]}, indent=2) + "\n")


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Sum of −log p over the tokens that carry loss; products in bfloat16, weights and sums in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return label_loss(model, batch)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, batches: list[Batch]) -> float:
    """Mean −log p of the tokens that carry loss."""
    return sum(float(loss_of(model, batch)) for batch in batches) / sum(batch.label_tokens for batch in batches)


def draw_curve(curve: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss over the steps, as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    held = [point for point in curve if point["held_out_loss"]]
    axes.plot([p["step"] for p in curve], [p["loss"] for p in curve], color="#b8bec8", linewidth=1, label="training batch")
    axes.plot([p["step"] for p in held], [p["held_out_loss"] for p in held], color="#3366aa", marker="o", markersize=4,
              label="held-out documents")
    axes.set(xlabel="optimizer step", ylabel="loss per token (nats)", yscale="log", title="Pretraining the model that ships")
    ticks = (0.4, 0.6, 0.8, 1, 1.5, 2, 3, 4)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def card(facts: dict[str, Any]) -> str:
    """The model card."""
    rows = {"documents, each seen once": "documents", "tokens": "tokens", "of them with loss": "tokens_with_loss",
            "held-out loss, nats a token": "held_out_loss", "held-out perplexity": "held_out_perplexity",
            "seconds on two cores": "seconds"}
    lines = ["| what | value |", "| --- | --- |", *(f"| {name} | {facts[key]:,} |" for name, key in rows.items())]
    command = " ".join(f"--{name} {value:g}" for name, value in facts["arguments"].items())
    return CARD.format(**facts, table="\n".join(lines), command=f"python scripts/pretrain_tiny.py --out tiny {command}")


def main() -> None:
    """Tokenizer, corpus, training, evaluation, files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; what it holds of an earlier run is replaced")
    parser.add_argument("--steps", type=int, default=9000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="documents per step; each is seen once")
    parser.add_argument("--vocab", type=int, default=3584, help="tokenizer entries")
    parser.add_argument("--lr", type=float, default=6e-3, help="peak rate of the blocks; half of it for the rest")
    parser.add_argument("--seed", type=int, default=0, help="of weights, documents and order")
    parser.add_argument("--capitals", type=float, default=0.2, help="share of the notes put into capitals")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    # The held-out documents come from another seed and are compared, so that none was trained on.
    texts = list(documents(args.seed, args.steps * args.batch, args.capitals))
    seen = {text.text for text in texts}
    held_out = [text for text in documents(args.seed + 1, 3000, args.capitals) if text.text not in seen][:2000]
    train_tokenizer([text.text for text in texts[:20_000]], args.vocab, args.out)
    tokenizer = read_tokenizer(args.out)
    examples, unseen = encode_documents(tokenizer, texts), encode_documents(tokenizer, held_out)
    held_batches = [collate(unseen[at : at + args.batch], PAD_ID) for at in range(0, len(unseen), args.batch)]
    tokens = sum(len(example.input_ids) for example in examples)
    print(f"{len(texts):,} documents, {tokens:,} tokens, {len(held_out):,} held out, {time.perf_counter() - started:.0f} s",
          flush=True)

    config = {**CONFIG, "vocab_size": tokenizer.vocab_size}
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.init_weights(torch.Generator().manual_seed(args.seed))
    # Muon for the blocks' matrices, AdamW for the rest: lower after two minutes, one run each, than AdamW alone.
    blocks = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not block for block in blocks)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(blocks, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW(rest, lr=args.lr / 2, betas=(0.9, 0.95), weight_decay=0.0)]
    curve, training_started, tokens_done = [], time.perf_counter(), 0
    model.train()
    for step, [rows] in enumerate(epoch_batches([len(e.input_ids) for e in examples], args.batch, 1, args.seed, 0), 1):
        batch = collate([examples[row] for row in rows], PAD_ID)
        share = learning_rate(step, args.steps, 1.0, warmup=0.02)
        for optimizer, peak in zip(optimizers, (args.lr, args.lr / 2), strict=True):
            optimizer.param_groups[0]["lr"] = share * peak
        loss = loss_of(model, batch) / batch.label_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens_done += int(batch.attention_mask.sum())
        if step % 50 == 0 or step == args.steps:
            held = held_out_loss(model, held_batches[:20]) if step % 250 == 0 else None
            curve.append({"step": step, "loss": round(loss.item(), 4), "held_out_loss": held and round(held, 4)})
            rate = tokens_done / (time.perf_counter() - training_started)
            also = f" held out {held:.4f}" if held else ""
            print(f"step {step}/{args.steps} loss {loss.item():.4f}{also} {rate:,.0f} tokens/s", flush=True)
            if step % 500 == 0 or step == args.steps:
                save(model, args.out)
    final = held_out_loss(model, held_batches)
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "documents": len(texts), "tokens": tokens,
             "tokens_with_loss": sum(label != IGNORED for example in examples for label in example.labels),
             "held_out_documents": len(held_out), "held_out_loss": round(final, 4),
             "held_out_perplexity": round(math.exp(final), 3), "seconds": round(time.perf_counter() - started),
             "arguments": {name: value for name, value in vars(args).items() if name != "out"}, "curve": curve}
    (args.out / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.out / "README.md").write_text(card({**config, **facts}))
    draw_curve(curve, args.out / "pretraining.png")
    print(json.dumps({name: value for name, value in facts.items() if name != "curve"}))


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write model.safetensors in bfloat16, atomically."""
    state = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
             if name != "lm_head.weight"}       # tied: the head is the embedding
    save_file(state, folder / ".model.tmp", metadata={"format": "pt"})
    shutil.move(folder / ".model.tmp", folder / "model.safetensors")


if __name__ == "__main__":
    main()
