"""Every claim, re-derived here and now: what is said, who says it, what should come out, what does.

Each check is a function that measures with the package's own public parts and compares with a figure that stands somewhere
else: in the paper, in a library's documentation, or in this README.  Nothing is read from a file of results.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilora.data.batches import collate
from minilora.data.prompts import DEFAULT_TEMPLATE, encode_example, load_template
from minilora.generate import generate
from minilora.hub import resolve_model
from minilora.kernels.reference import unpack_nibbles
from minilora.layers.lora import LoRAConfig, LoRALinear
from minilora.layers.merge import MergeError, merge_lora
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import Quantization, add_lora, trainable_parameters
from minilora.llama.config import LlamaConfig
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.tokenizer import read_tokenizer
from minilora.loading import load_model
from minilora.loss import label_loss
from minilora.optim.adamw import AdamW
from minilora.optim.paged_adamw import PagedAdamW
from minilora.quant.blockwise import dequantize_blockwise, quantize_blockwise
from minilora.quant.codebooks import NF4_CODE, derive_nf4
from minilora.quant.nf4 import quantize_nf4

QLORA, LORA, ADAMW = "arXiv 2305.14314", "arXiv 2106.09685", "torch.optim.AdamW"
WEIGHTS = 1 << 20       # numbers in the sample of normal weights
# hidden size, layers, inner size of Llama 1 (arXiv 2302.13971, table 2), and the parameters it gives, in billions.
SHAPES = {"7B": (4096, 32, 11008, 6.7), "13B": (5120, 40, 13824, 13.0), "33B": (6656, 60, 17920, 32.5),
          "65B": (8192, 80, 22016, 65.2)}
FP4 = tuple(sign * level / 6 for sign in (-1, 1) for level in (0, 0.5, 1, 1.5, 2, 3, 4, 6))     # E2M1
INT4 = tuple(level / 7 for level in range(-7, 8))


@dataclass(frozen=True)
class Claim:
    """One line of the audit; `ok` says whether what was measured bears the claim out."""

    claim: str
    source: str
    expected: str
    measured: str
    ok: bool


def audit() -> Iterator[Claim]:
    """Check every claim, one after the other; some twenty seconds on two cores."""
    for check in CHECKS:
        yield from check()


def _near(claim: str, source: str, expected: float, measured: float, tolerance: float, form: str = ".4g") -> Claim:
    return Claim(claim, source, f"{expected:{form}} ± {tolerance:.1g}", f"{measured:{form}}",
                 abs(measured - expected) <= tolerance)


def _most(claim: str, source: str, limit: float, measured: float, form: str = ".3g") -> Claim:
    return Claim(claim, source, f"at most {limit:{form}}", f"{measured:{form}}", measured <= limit)


def _exact(claim: str, source: str, expected: int, measured: int) -> Claim:
    return Claim(claim, source, f"{expected:,}", f"{measured:,}", measured == expected)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# -- quantization -----------------------------------------------------------------------------------------------------
def codebook() -> Iterator[Claim]:
    """The sixteen levels, and the nearest of them for every weight."""
    derived = torch.from_numpy(derive_nf4())
    yield _most("the sixteen levels are normal quantiles: largest difference", f"{QLORA}, appendix E", 1.2e-7,
                float((derived - NF4_CODE.double()).abs().max()))
    yield _exact("levels below zero", f"{QLORA}, section 3", 7, int((NF4_CODE < 0).sum()))
    yield _exact("levels above zero", f"{QLORA}, section 3", 8, int((NF4_CODE > 0).sum()))
    codes = quantize_nf4(torch.tensor([1.0, -1.0, 0.0]), double_quant=False)
    yield _exact("first byte of (1, -1): the first code is the high nibble", "bitsandbytes", 0xF0, int(codes.packed[0]))
    yield _exact("weights whose packed code is not their nearest level, of 65,536", f"{QLORA}, section 2", 0, _not_nearest())


def _not_nearest() -> int:
    w = _normal(1024, 64)
    q = quantize_nf4(w, double_quant=False)
    scaled = w * (1 / w.abs().amax(dim=1, keepdim=True))
    best = (scaled[..., None] - NF4_CODE).abs().min(-1).values
    used = (scaled - NF4_CODE[unpack_nibbles(q.packed.view(-1), w.numel()).int()].view_as(w)).abs()
    return int((used > best + 2.0 ** -24).sum())


def storage() -> Iterator[Claim]:
    """Bits a weight, and gigabytes of the models of the paper."""
    w = _normal(1024, 1024)
    plain, double = quantize_nf4(w, double_quant=False).bits_per_param, quantize_nf4(w).bits_per_param
    yield _near("bits a weight, float32 constants", f"{QLORA}, section 3", 4.5, plain, 0)
    yield _near("bits a weight, double-quantized constants", f"{QLORA}, section 3", 4.127, double, 5e-4)
    yield _near("bits saved by double quantization", f"{QLORA}, section 3", 0.373, plain - double, 5e-4)
    yield _near("GB saved by it on 65 billion weights", f"{QLORA}, section 1 (about 3 GB)", 3.03, 65e9 * (plain - double) / 8e9,
                5e-3)
    for name, (hidden, layers, inner, billions) in SHAPES.items():
        in_linears = layers * (4 * hidden * hidden + 3 * hidden * inner)
        rest = 2 * 32_000 * hidden + (2 * layers + 1) * hidden
        yield _near(f"billions of parameters of Llama {name}", "arXiv 2302.13971, table 2", billions,
                    (in_linears + rest) / 1e9, 0.1, ".2f")
        size = (in_linears * double / 8 + 2 * rest) / 1e9
        limit = 48.0 if name == "65B" else 0.3 * 2 * (in_linears + rest) / 1e9
        source = f"{QLORA}, abstract: under 48 GB" if name == "65B" else "this README: under 0.3 of 16 bits"
        yield _most(f"GB of Llama {name} in 4 bits, embeddings and head in 16", source, limit, size, ".2f")


def error() -> Iterator[Claim]:
    """What four bits cost, against other tables of sixteen."""
    tables = {"NF4": NF4_CODE, "FP4": torch.tensor(sorted(set(FP4))), "INT4": torch.tensor(INT4)}
    model = load_model("tiny", quantize=None, dtype=torch.float32)
    real = [module.weight.detach() for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    for kind, samples in (("normal", [_normal(WEIGHTS)]), ("the small model's", real)):
        found = {}
        for name, table in tables.items():
            restored = [dequantize_blockwise(*quantize_blockwise(w, table, 64), table, 64).view_as(w) for w in samples]
            total = sum(float((w - r).square().sum()) for w, r in zip(samples, restored, strict=True))
            found[name] = (total / sum(float(w.square().sum()) for w in samples)) ** 0.5
        for other, where in (("FP4", "figure 3 and table 2"), ("INT4", "table 2")):
            yield _most(f"error of NF4 against {other} on {kind} weights, as a ratio", f"{QLORA}, {where} (NF4 is better)",
                        1.0,
                        found["NF4"] / found[other])
        if kind == "normal":
            yield _near("error of NF4 on normal weights, of their spread", "this README", 0.09197, found["NF4"], 2e-4)
    w = _normal(WEIGHTS).view(-1, 64)
    off = (w - quantize_nf4(w, double_quant=False).dequantize()).abs() / w.abs().amax(1, keepdim=True)
    yield _most("largest error, of the block's largest weight: half the widest gap", "the codebook", 0.1519037,
                float(off.max()),
                ".7f")
    back = quantize_nf4(w, double_quant=False).dequantize()
    largest = w.abs().argmax(1, keepdim=True)
    yield _exact("blocks whose largest weight is not exact", "the codebook ends in -1 and 1", 0,
                 int((back.gather(1, largest) != w.gather(1, largest)).sum()))


# -- layers -----------------------------------------------------------------------------------------------------------
def low_rank() -> Iterator[Claim]:
    """How few numbers are trained, and that training starts from the model as it was."""
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(20_000, 10_000, bias=False), r=8)
    yield _exact("numbers trained for a 10,000 x 20,000 matrix at r = 8", f"arithmetic on {LORA}, section 4.1", 240_000,
                 sum(p.numel() for p in (layer.lora_A.weight, layer.lora_B.weight)))
    yield _exact("numbers in that matrix", "arithmetic", 200_000_000, layer.in_features * layer.out_features)
    hidden, layers, inner, _ = SHAPES["7B"]
    sizes = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
    yield _near("millions trained on all seven linears of 7B at r = 64", "arithmetic", 159.9,
                layers * sum(64 * (a + b) for a, b in sizes) / 1e6, 0.05, ".1f")
    model = load_model("tiny", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids)
    add_lora(model, LoRAConfig(r=4))
    yield _exact("logits changed by fresh adapters (B = 0)", f"{LORA}, section 4.1", 0, int((model(ids) != before).sum()))
    adapted = [sum(isinstance(module, LoRALinear) for module in block.modules()) for block in model.model.layers]
    yield _exact("linears that carry adapters, in the block with the fewest", f"{QLORA}, section 4 (all layers)", 7,
                 min(adapted))


def gradient() -> Iterator[Claim]:
    """Back-propagation through a frozen weight."""
    layer = NF4Linear.from_linear(nn.Linear(96, 64))
    x = _normal(3, 96).double().requires_grad_()
    pull = _normal(3, 64, seed=1).double()
    (layer(x) * pull).sum().backward()
    numeric = torch.empty_like(x)
    with torch.no_grad():
        for index in range(x.numel()):
            step = torch.zeros_like(x).view(-1)
            step[index] = 0.5
            numeric.view(-1)[index] = ((layer(x + step.view_as(x)) - layer(x - step.view_as(x))) * pull).sum()
    yield _most("gradient through a frozen 4-bit weight, off finite differences by", "this README", 1e-9,
                _relative(x.grad if x.grad is not None else numeric * 0, numeric))
    yield _exact("gradients kept for the 4-bit weight", f"{QLORA}, section 3", 0,
                 sum(p.grad is not None for p in layer.parameters()))


def merging() -> Iterator[Claim]:
    """What each way of merging keeps of an update that is small, or not, beside the weights."""
    for strength, kept in ((0.01, 0.03), (0.1, 0.74), (1.0, 0.99)):
        found = _merge_error(strength, "4bit")
        yield _near(f"cosine with what was learnt after merging into 4 bits, update {strength:.0%} of the spread",
                    "this README",
                    kept, found.update_cosine, 0.01, ".3f")
    yield _most("error of merging into 16 bits, of the trained weights", "bfloat16 keeps 8 bits", 2.0 ** -9,
                _merge_error(0.1, "16bit").relative_error)
    yield _near("error of merging into the original base, in units of the update (10 %)", "this README", 0.92,
                _merge_error(0.1, "original").error_to_update, 0.03, ".3f")


def _merge_error(strength: float, into: str) -> MergeError:
    base = nn.Linear(1024, 1024, bias=False)
    with torch.no_grad():
        base.weight.copy_(_normal(1024, 1024))
    layer = LoRALinear(base if into == "original" else NF4Linear.from_linear(base), r=16, alpha=16)
    with torch.no_grad():
        layer.lora_A.weight.copy_(_normal(16, 1024, seed=1))
        layer.lora_B.weight.copy_(_normal(1024, 16, seed=2) * strength / 4)       # 16 products: a spread of `strength`
    errors: list[MergeError] = []
    merge_lora(nn.ModuleDict({"q_proj": layer}), "4bit" if into == "4bit" else "16bit",
               dtype=torch.bfloat16 if into == "16bit" else torch.float32,
               trained_on=Quantization() if into == "original" else None, on_layer=lambda _, error: errors.append(error))
    return errors[0]


# -- training ---------------------------------------------------------------------------------------------------------
def optimizer() -> Iterator[Claim]:
    """AdamW, bit for bit, with its moments in memory and in pages; and in 8 bits."""
    steppers = [AdamW([_weights()], lr=1e-2, weight_decay=0.1),
                PagedAdamW([_weights()], lr=1e-2, weight_decay=0.1, page_bytes=4096, resident_bytes=8192, backing="disk"),
                PagedAdamW([_weights()], lr=1e-2, weight_decay=0.1, state_bits=8),
                torch.optim.AdamW([_weights()], lr=1e-2, weight_decay=0.1, foreach=False, fused=False)]
    ours, pages, eight, theirs = (stepper.param_groups[0]["params"][0].detach() for stepper in steppers)
    for step in range(50):
        for stepper in steppers:
            stepper.param_groups[0]["params"][0].grad = _normal(80, 80, seed=step)
            stepper.step()
    yield _exact("weights that differ in a bit from torch's after 50 steps of AdamW", ADAMW, 0, int((ours != theirs).sum()))
    yield _exact("the same with the moments in a file, two pages of 4 KiB in memory", ADAMW, 0, int((pages != theirs).sum()))
    start = _weights().detach()
    yield _most("the same with moments in 8 bits, off in units of what was learnt by", "this README", 0.05,
                _relative(eight - start, theirs - start))
    moments = steppers[2].state_dict()["state"][0]
    kept = sum(moment.numel() * moment.element_size() for name, moment in moments.items() if name != "step")
    yield _near("bytes a weight of moments in 8 bits", "bitsandbytes, blocks of 256: 2 + 2 · 4/256", 2.031, kept / 6400, 0.001,
                ".3f")


def _weights() -> nn.Parameter:
    return nn.Parameter(_normal(80, 80, seed=99))


def _random_model() -> LlamaForCausalLM:
    raw = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    model = LlamaForCausalLM(LlamaConfig.from_dict(raw))
    model.init_weights(torch.Generator().manual_seed(0), 0.3)
    return model


def loss() -> Iterator[Claim]:
    """What carries loss, and how a step that is cut into parts adds up."""
    model, template = _random_model(), load_template(DEFAULT_TEMPLATE)
    tokenizer = read_tokenizer(resolve_model("tiny"))
    made = [encode_example(tokenizer, template, f"note {index} " * (index + 1), "CT " * (index % 3 + 1),
                           64) for index in range(8)]
    examples = [dataclasses.replace(example, input_ids=[token % 61 for token in example.input_ids],
                                    labels=[token if token < 0 else token % 61 for token in example.labels])
                for example in made]

    def gradient_of(parts: int, of_means: bool = False) -> Tensor:
        model.zero_grad()
        batches = [collate(examples[at :: parts], 0) for at in range(parts)]
        tokens = sum(batch.label_tokens for batch in batches)
        for batch in batches:
            (label_loss(model, batch) / (parts * batch.label_tokens if of_means else tokens)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient_of(1)
    yield _most("gradient of a step cut into 4 micro-batches, off the whole batch's by", "DESIGN: rounding only", 1e-5,
                _relative(gradient_of(4), whole))
    wrong = _relative(gradient_of(4, of_means=True), whole)
    yield Claim("the same by the mean of micro-batch means, which is another loss", "transformers issue 34191", "above 0.01",
                f"{wrong:.3g}", wrong > 0.01)
    ids = made[0].input_ids
    yield _exact("begin tokens in a training example", "this README", 1, ids.count(tokenizer.bos_id or 0))
    yield _exact("prompt tokens that carry loss", "this README", 0,
                 sum(label != -100 for label in made[0].labels[: len(ids) - len(tokenizer.encode("CT", bos=False)) - 1]))
    yield _exact("the last token that carries loss is the end token", "this README", tokenizer.eos_id or 0, made[0].labels[-1])


def end_token() -> Iterator[Claim]:
    """Train adapters on eight notes until they are known by heart, then let the model write freely."""
    model, tokenizer = load_model("tiny", dtype=torch.float32), read_tokenizer(resolve_model("tiny"))
    add_lora(model, LoRAConfig(r=8), generator=torch.Generator().manual_seed(0))
    template = load_template(DEFAULT_TEMPLATE)
    notes = [f"r/o {word}" for word in ("PE", "stroke", "appendicitis", "DVT", "stone", "fracture", "tumor", "abscess")]
    labels = [("CT Abdomen W Contrast", "CT Abdomen", "US")[index % 3] for index in range(8)]     # one begins another
    batch = collate([encode_example(tokenizer, template, note, label, 64) for note, label in zip(notes, labels, strict=True)],
                    0)
    stepper = AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    for _ in range(60):
        (label_loss(model, batch) / batch.label_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad()
    answers = generate(model, tokenizer, [template.fill(note) for note in notes], max_new_tokens=24)
    yield _exact("free answers of 8 that are the label and end there", "this README", 8,
                 sum(answer.strip() == label for answer, label in zip(answers, labels, strict=True)))
    trained, parameters = trainable_parameters(model)
    yield Claim("numbers trained, of all (packed bytes counted as two weights)", "this README", "under 10 %",
                f"{trained:,} of {parameters:,}", trained < 0.1 * parameters)


CHECKS: tuple[Callable[[], Iterator[Claim]], ...] = (codebook, storage, error, low_rank, gradient, merging, optimizer, loss,
                                                     end_token)


def format_claim(claim: Claim) -> str:
    """Two lines for a terminal."""
    return (f"{'ok  ' if claim.ok else 'FAIL'} {claim.claim}\n"
            f"       expected {claim.expected}; measured {claim.measured}   [{claim.source}]")
