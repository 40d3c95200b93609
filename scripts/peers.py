"""The peers' side of `minilora bench --peers`: the same work by bitsandbytes, peft and transformers, as their pages say it.

Needs the extra [peers].  Started by the bench, as ``python scripts/peers.py '{"work": "step", …}'``; our side, function for
function, is minilora/bench/ours.py.
"""
from __future__ import annotations

import difflib
import gc
from collections.abc import Callable
from itertools import cycle
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from bitsandbytes import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minilora.bench import ours
from minilora.bench.sides import Task, serve
from minilora.hub import resolve_model
from minilora.metrics import normalize_label

QUANTIZE = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16)


def load_model(folder: str, quantize: bool = False, device: str = "cpu") -> Any:
    """A 4-bit folder, or with `quantize` a 16-bit one, as transformers loads it for bitsandbytes."""
    options = {"quantization_config": QUANTIZE} if quantize else {}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device, dtype=torch.bfloat16, **options)


def load(task: Task) -> Callable[[], object]:
    """A 16-bit folder into a 4-bit model."""
    def call() -> None:
        load_model(task.model, quantize=True, device=task.device)
        gc.collect()
    return call


def adapted(model: Any, task: Task) -> Any:
    """With adapters on all seven linears of each block."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=task.r, lora_alpha=2 * task.r, target_modules="all-linear",
                                                      task_type="CAUSAL_LM"))


def step(task: Task) -> Callable[[], object]:
    """One optimizer step of QLoRA, adapters on all seven linears of each block."""
    model = load_model(task.model, quantize=True, device=task.device)
    # What prepare_model_for_kbit_training does beside this is to make every other weight float32, which takes memory and time.
    if task.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False
    model = adapted(model, task).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=ours.RATE)
    ids = ours.token_ids(task, model.config.vocab_size).to(task.device)
    labels = ours.label_ids(task, ids)

    def call() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return call


def prefill(task: Task) -> Callable[[], object]:
    """Read prompts into a key/value cache; logits of each one's last token."""
    model = load_model(task.model, quantize=True, device=task.device).eval()
    ids = ours.token_ids(task, model.config.vocab_size).to(task.device)

    def call() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return call


def decode(task: Task) -> Callable[[], object]:
    """Seconds of writing tokens after prompts that were read."""
    model = load_model(task.model, quantize=True, device=task.device)
    model = (adapted(model, task).get_base_model() if task.adapted else model).eval()
    ids = ours.token_ids(task, model.config.vocab_size).to(task.device)

    def write(new: int) -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                       pad_token_id=0)
    return ours.written(model, write, task.new_tokens)


def score(task: Task) -> Callable[[], object]:
    """The label nearest to what the model that ships writes after each note, 16 notes of a length at a time."""
    folder = str(resolve_model("tiny"))
    model = load_model(folder, quantize=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts, labels = ours.scored_notes(task)
    prompts.sort(key=len)
    longest = max(len(tokenizer(label).input_ids) for label in labels)
    spelled = {normalize_label(label): label for label in labels}

    def call() -> None:
        for start in range(0, len(prompts), 16):
            batch = tokenizer(prompts[start : start + 16], return_tensors="pt", padding=True)
            batch.pop("token_type_ids", None)
            answers = model.generate(**batch, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            for text in tokenizer.batch_decode(answers[:, batch["input_ids"].shape[1] :], skip_special_tokens=True):
                difflib.get_close_matches(normalize_label(text), spelled, n=1, cutoff=0.0)
    return call


def unpack(task: Task) -> Callable[[], object]:
    """A weight from 4 bits; bitsandbytes has no form for a CPU that writes into a buffer that is there."""
    weight = ours.matrices(task)[0].to(task.device, task.torch_dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    if task.device == "cpu":
        return lambda: functional.dequantize_4bit(packed, state)
    return lambda: functional.dequantize_4bit(packed, state, out=weight)


def product(task: Task) -> Callable[[], object]:
    """Rows through a 4-bit layer, or through several in turn."""
    def layer(weight: torch.Tensor) -> Any:
        made = bnb.nn.Linear4bit(task.shape[1], task.shape[0], bias=False, compute_dtype=task.torch_dtype,
                                 compress_statistics=True, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(weight.to(task.torch_dtype), requires_grad=False, quant_type="nf4",
                                        compress_statistics=True)
        return made.to(task.device).train(task.grad)

    layers = cycle([layer(weight) for weight in ours.matrices(task)])
    x = ours.rows_of(task).requires_grad_(task.grad)

    def call() -> None:
        with torch.set_grad_enabled(task.grad):
            for _ in range(task.layers):
                next(layers)(x)
    return call


WORKS = {"load": load, "step": step, "prefill": prefill, "decode": decode, "score": score, "unpack": unpack, "product": product}

if __name__ == "__main__":
    serve(lambda task: WORKS[task.work](task))
