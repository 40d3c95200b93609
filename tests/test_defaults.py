"""torch's default type and device are the caller's to set: what is computed does not hang on them.

Compiled code believes the addresses it is given: a buffer of the default type was half as long as what was written there.  On
the device "meta" whatever is made without naming a device holds no numbers, so whatever uses it fails.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import minilora
from minilora.data.batches import collate
from minilora.data.prompts import Example
from minilora.embed import embed_texts
from minilora.loss import label_loss
from minilora.optim.adamw import AdamW
from minilora.trie import LabelTrie, score_labels


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def quantized() -> list[Tensor]:
    found = []
    for shape in ((257, 64), (7, 33), (4096, 256)):
        for double_quant in (False, True):
            q = minilora.quantize_nf4(normal(*shape), double_quant=double_quant)
            found += [q.packed, q.absmax, q.dequantize(), q.dequantize(torch.bfloat16)]
    return found


def layers() -> list[Tensor]:
    """Small ones, and such as have products of their own, with a few rows and with many."""
    found = []
    for out, columns in ((48, 32), (1024, 768)):
        base = minilora.NF4Linear(minilora.quantize_nf4(normal(out, columns)), normal(out))
        layer = minilora.LoRALinear(base, r=4, generator=torch.Generator().manual_seed(0))
        found += [layer.lora_A.weight, layer.lora_B.weight]
        layer.lora_B.weight.data.copy_(normal(out, 4))
        for rows in (1, 16, 300):
            for dtype in (torch.float32, torch.bfloat16):
                x = normal(rows, columns).to(dtype).requires_grad_()
                y = layer(x)
                y.backward(torch.ones_like(y))
                with torch.no_grad():
                    found += [y, layer(x), x.grad]
    return found


def prompts() -> list[list[int]]:
    return [[1, *range(3, 40)], [1, *range(3, 60)], [1, 5]]


def model() -> minilora.llama.model.LlamaForCausalLM:
    return minilora.load_model("tiny", dtype=torch.float32)


def answers() -> list[Tensor]:
    llama, tokenizer = model(), minilora.load_tokenizer("tiny")
    trie = LabelTrie(["CT Head", "CT Abdomen W Contrast", "MR Brain"], tokenizer)
    written = minilora.generate(llama, tokenizer, prompts(), max_new_tokens=5)
    found = [score_labels(llama, trie, prompts()), embed_texts(llama, tokenizer, ["CT of the head", "MR"])]
    return [llama(torch.tensor(prompts()[:1], device="cpu")), *found,
            *(torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu") for text in written)]


def gradients() -> list[Tensor]:
    llama = minilora.add_lora(model(), minilora.LoRAConfig(r=4, dropout=0.1), torch.Generator().manual_seed(0)).train()
    llama.gradient_checkpointing = True
    torch.manual_seed(0)
    label_loss(llama, collate([Example([1, 5, 6, 7, 2], [-100, -100, 6, 7, 2]), Example([1, 5], [-100, 5])], 0)).backward()
    return [parameter.grad for parameter in llama.parameters() if parameter.grad is not None]


def updates() -> list[Tensor]:
    found = []
    for make in (AdamW, minilora.PagedAdamW, lambda p, lr: minilora.PagedAdamW(p, lr, state_bits=8),
                 lambda p, lr: minilora.PagedAdamW(p, lr, page_bytes=4096, resident_bytes=8192, backing="disk")):
        parameters = [torch.nn.Parameter(normal(100, 60)), torch.nn.Parameter(normal(5))]
        optimizer = make(parameters, lr=0.1)
        for step in range(3):
            for parameter in parameters:
                parameter.grad = normal(*parameter.shape, seed=step)
            optimizer.step()
        found += [*parameters, *(value for state in optimizer.state_dict()["state"].values() for value in state.values())]
    return found


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64, "meta"], ids=str)
def other_default(request: pytest.FixtureRequest) -> Iterator[None]:
    yield request.param


@pytest.mark.parametrize("compute", [quantized, layers, answers, gradients, updates], ids=lambda compute: compute.__name__)
def test_other_defaults_change_no_bit(compute: Callable[[], list[Tensor]], other_default: torch.dtype | str) -> None:
    expected = compute()
    try:
        if isinstance(other_default, torch.dtype):
            torch.set_default_dtype(other_default)
        else:
            torch.set_default_device(other_default)
        found = compute()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert len(found) == len(expected) > 5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.device == theirs.device and torch.equal(ours, theirs)
