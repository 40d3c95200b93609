"""One call for a token through all blocks has the bits of the modules, and is none where anything is out of the ordinary."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.generate import generate_ids
from minilora.kernels import block, cpu
from minilora.kernels.block_token import TokenStep
from minilora.layers.lora import LoRAConfig, LoRALinear
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import add_lora, base_only
from minilora.llama import decoding
from minilora.llama.cache import KVCache
from minilora.llama.config import LlamaConfig
from minilora.llama.decoding import token_step
from minilora.llama.model import LlamaForCausalLM, LlamaMLP, RMSNorm
from tests.kernels.conftest import make as make_products
from tests.kernels.test_block import make as make_block
from tests.kernels.test_block import threads

__all__ = ["threads"]       # a fixture

# The narrowest that the vector code takes: all linears of half a million weights, one key/value head for two heads.
WIDE: dict[str, Any] = {"model_type": "llama", "vocab_size": 61, "hidden_size": 1024, "intermediate_size": 768,
                        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8,
                        "max_position_embeddings": 64}
BIASED = {"attention_bias": True, "mlp_bias": True}
WINDOWED = {"model_type": "mistral", "sliding_window": 5}
ROOM = 24


@pytest.fixture(scope="module", autouse=True)
def native() -> Iterator[None]:
    """The vector code of this machine, whatever the environment says."""
    kernel, products = make_block("native"), make_products("native")
    if not products.dense_rows:
        pytest.skip("no vector code for the products of an update here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "_tried", [kernel])
        patch.setattr(cpu, "_tried", [products])
        yield


def make(adapter: LoRAConfig | None = None, quantize: bool = True, dtype: torch.dtype = torch.bfloat16,
         **changes: Any) -> LlamaForCausalLM:
    """A random model in 4 bits, its biases and its adapter's B no zeros."""
    model, generator = LlamaForCausalLM(LlamaConfig.from_dict({**WIDE, **changes})), torch.Generator().manual_seed(0)
    model.init_weights(generator, std=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.to(dtype)
    for part in (part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)):
        for name, linear in list(part.named_children()):
            if quantize:
                setattr(part, name, NF4Linear.from_linear(linear, double_quant=name != "up_proj"))
    if adapter is not None:
        add_lora(model, adapter, generator)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.weight.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def cache_of(model: LlamaForCausalLM, batch: int, room: int = ROOM) -> KVCache:
    cache = KVCache(model.config, batch, room, model.dtype, model.device)
    cache.keys.fill_(9)                     # what lies behind the tokens that were read must never be seen
    cache.values.fill_(9)
    return cache


def stepped(model: LlamaForCausalLM, batch: int, prompt: int, tokens: int, mask: Tensor | None,
            fast: bool) -> tuple[Tensor, KVCache]:
    """Hidden states of `tokens` single tokens behind a prompt: (tokens, B, 1, hidden), and the cache."""
    cache, states = cache_of(model, batch), []
    with torch.no_grad():
        model.hidden(ids(batch, prompt), None if mask is None else mask[:, :prompt], cache=cache)
        if fast:
            cache.step = token_step(model, cache)
            assert cache.step is not None
        for index in range(tokens):
            seen = None if mask is None else mask[:, : prompt + index + 1]
            states.append(model.hidden(ids(batch, 1, seed=index), seen, cache=cache))
    return torch.stack(states), cache


def same_bits(model: LlamaForCausalLM, batch: int = 3, prompt: int = 4, tokens: int = 4, mask: Tensor | None = None) -> Tensor:
    found, cache = stepped(model, batch, prompt, tokens, mask, True)
    right, plain = stepped(model, batch, prompt, tokens, mask, False)
    assert torch.equal(found, right) and found.isfinite().all() and found.unique().numel() > 100
    assert torch.equal(cache.keys, plain.keys) and torch.equal(cache.values, plain.values)
    assert cache.length == plain.length == prompt + tokens
    return found


@pytest.fixture(scope="module")
def plain() -> LlamaForCausalLM:
    return make()


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 20), prompt=st.integers(1, 20), tokens=st.integers(1, 4))
def test_a_token_has_the_bits_it_has_block_by_block(plain: LlamaForCausalLM, batch: int, prompt: int, tokens: int) -> None:
    same_bits(plain, batch, prompt, tokens)


@pytest.mark.parametrize("changes", [BIASED, WINDOWED, {"num_attention_heads": 8, "num_key_value_heads": 4},
                                     {"num_attention_heads": 16, "num_key_value_heads": 16},
                                     {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64},
                                     {"model_type": "qwen2"}, {"intermediate_size": 1296, "rms_norm_eps": 0.5}])
def test_models_of_every_kind_have_their_bits(changes: dict[str, Any]) -> None:
    same_bits(make(**changes), tokens=6)


def test_padding_is_never_seen(plain: LlamaForCausalLM) -> None:
    mask = torch.ones(3, ROOM, dtype=torch.bool)
    mask[0, :3] = mask[2, 1:3] = False
    padded = same_bits(plain, mask=mask)
    assert not torch.equal(padded[:, 0], same_bits(plain)[:, 0])
    windowed = make(**WINDOWED)
    same_bits(windowed, mask=mask)


def test_a_sequence_has_the_bits_it_has_among_others_whatever_the_threads(plain: LlamaForCausalLM,
                                                                          threads: Callable[[int], None]) -> None:
    together = same_bits(plain, batch=2)
    for count in (1, 2, 5):
        threads(count)
        assert torch.equal(stepped(plain, 2, 4, 4, None, True)[0], together)


# Adapters

@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize(("r", "changes"), [(16, {}), (5, BIASED), (64, {}), (1, {"model_type": "qwen2"})])
def test_an_adapter_has_the_bits_of_its_modules(batch: int, r: int,
                                                       changes: dict[str, Any]) -> None:
    same_bits(make(LoRAConfig(r, 3 * r), **changes), batch)


def test_a_frozen_adapter_has_the_same_bits() -> None:
    model = make(LoRAConfig(8, 16))
    trained = same_bits(model)
    assert torch.equal(same_bits(model.requires_grad_(False)), trained)


def test_an_adapter_may_be_on_some_layers() -> None:
    some = same_bits(make(LoRAConfig(8, 16, target_modules=("q_proj", "down_proj"))))
    assert not torch.equal(some, same_bits(make()))


def test_an_adapter_that_is_switched_off_is_not_there() -> None:
    model = make(LoRAConfig(8, 16))
    with base_only(model):
        assert torch.equal(same_bits(model), same_bits(make()))
    assert not torch.equal(stepped(model, 3, 4, 4, None, True)[0], stepped(make(), 3, 4, 4, None, True)[0])


# Decoding takes it

def test_answers_are_those_of_the_modules(plain: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class NeverEnds:
        eos_id = None

    made: list[TokenStep | None] = []
    loop = sys.modules["minilora.generate"]                     # the package has a function of that name
    monkeypatch.setattr(loop, "token_step", lambda *given: made.append(token_step(*given)) or made[-1])
    prompts = [ids(length, seed=length).tolist() for length in (1, 9, 4, 4, 7, 1)]
    answers = generate_ids(plain, NeverEnds(), prompts, 9, 3)               # type: ignore[arg-type]
    assert len(made) == 2 and None not in made and len(set(map(tuple, answers))) > 1
    monkeypatch.setattr(loop, "token_step", lambda *_: None)
    assert generate_ids(plain, NeverEnds(), prompts, 9, 3) == answers       # type: ignore[arg-type]


def test_what_decoding_takes_is_of_the_adapter_it_is_asked_with() -> None:
    class NeverEnds:
        eos_id = None

    model = make(LoRAConfig(8, 16))
    one = generate_ids(model, NeverEnds(), [[1, 2, 3]], 8)                  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_A = nn.Linear(module.in_features, 8, bias=False)
    assert generate_ids(model, NeverEnds(), [[1, 2, 3]], 8) != one          # type: ignore[arg-type]


@pytest.mark.parametrize("why", ["float32", "dense", "small", "DoRA", "dropout", "hook", "hook before", "hook on all",
                                 "subclass", "another MLP", "another norm", "another forward", "many", "many rows",
                                 "no kernel", "narrow heads", "no room"])
def test_where_anything_is_out_of_the_ordinary_the_modules_run(why: str, monkeypatch: pytest.MonkeyPatch,
                                                                 request: pytest.FixtureRequest) -> None:
    adapter = LoRAConfig(4, 8, use_dora=why == "DoRA", dropout=0.1) if why in ("DoRA", "dropout", "many rows") else None
    model = make(adapter, quantize=why != "dense", dtype=torch.float32 if why == "float32" else torch.bfloat16,
                 **({"hidden_size": 512} if why == "small" else {}), **({"head_dim": 32} if why == "narrow heads" else {}))
    assert why != "dropout" or token_step(model, cache_of(model, 2)) is not None, "without training nothing is dropped"
    model.train(why == "dropout")
    attention = model.model.layers[1].self_attn
    if why == "hook":
        attention.k_proj.register_forward_hook(lambda *_: None)
    elif why == "hook before":
        attention.register_forward_pre_hook(lambda *_: None)
    elif why == "subclass":
        attention.k_proj.__class__ = type("Another", (NF4Linear,), {})
    elif why == "another MLP":
        model.model.layers[1].mlp.__class__ = type("Another", (LlamaMLP,), {})
    elif why == "another norm":
        model.model.layers[0].input_layernorm.__class__ = type("Another", (RMSNorm,), {})
    elif why == "another forward":
        monkeypatch.setattr(attention.q_proj, "forward", lambda x: x)
    elif why == "hook on all":
        request.addfinalizer(nn.modules.module.register_module_forward_hook(lambda *_: None).remove)
    elif why == "no kernel":
        monkeypatch.setattr(block, "kernel", lambda: None)
    products = cpu.kernel()
    assert products is not None
    batch = {"many": products.fused_rows[torch.bfloat16] + 1, "many rows": products.dense_rows + 1, "no room": 0}.get(why, 2)
    assert token_step(model, cache_of(model, batch)) is None


def test_gradients_autocast_and_several_tokens_go_through_the_modules(plain: LlamaForCausalLM,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(plain, 2)

    def never(*_: Any) -> Tensor:
        raise AssertionError("the step was taken")

    cache.step = never                                                      # type: ignore[assignment]
    with torch.no_grad():
        plain.hidden(ids(2, 3), cache=cache)
        with torch.autocast("cpu", torch.bfloat16):
            plain.hidden(ids(2, 1), cache=cache)
    plain.hidden(ids(2, 1), cache=cache)
    with torch.no_grad():
        assert plain.hidden(ids(2, 1), cache=cache, at=torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 1024)
    with torch.no_grad(), pytest.raises(AssertionError, match="taken"):
        plain.hidden(ids(2, 1), cache=cache)


@torch.no_grad()
def test_a_full_cache_is_refused_before_anything_is_written(plain: LlamaForCausalLM) -> None:
    cache = cache_of(plain, 2, room=3)
    cache.step = token_step(plain, cache)
    for index in range(3):
        plain.hidden(ids(2, 1, seed=index), cache=cache)
    before = cache.keys.clone()
    with pytest.raises(ConfigError, match="holds 3 tokens, 4 are needed"):
        plain.hidden(ids(2, 1), cache=cache)
    assert torch.equal(cache.keys, before)


def test_what_the_kernel_cannot_read_is_refused(plain: LlamaForCausalLM) -> None:
    cache = cache_of(plain, 2)
    step = token_step(plain, cache)
    assert step is not None
    x, angles = torch.zeros(2, 1, 1024, dtype=torch.bfloat16), torch.zeros(2, 1, 1, 64, dtype=torch.bfloat16)
    seen = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    step(x, angles, angles, [seen, None], 3)
    bad: list[tuple[Any, ...]] = [
        (x.float(), angles, angles, [None, None], 3), (x[:1], angles, angles, [None, None], 3),
        (x[..., :512], angles, angles, [None, None], 3), (x, angles.float(), angles, [None, None], 3),
        (x, angles, angles[..., :32], [None, None], 3), (x, angles[:0], angles[:0], [None, None], 3),
        (x, angles, angles, [None], 3), (x, angles, angles, [None, None], -1), (x, angles, angles, [None, None], ROOM),
        (x, angles, angles, [seen, None], 4), (x, angles, angles, [seen.int(), None], 3),
        (x, angles, angles, [torch.ones(3, 1, 1, 4, dtype=torch.bool), None], 3)]
    for arguments in bad:
        with pytest.raises(ValueError, match="the kernel takes"):
            step(*arguments)


def test_blocks_of_different_shapes_are_refused(plain: LlamaForCausalLM) -> None:
    kernel, products, cache = block.kernel(), cpu.kernel(), cache_of(plain, 2)
    assert kernel is not None and products is not None
    blocks = [decoding._block(layer) for layer in plain.model.layers]
    first, second = (each for each in blocks if each is not None)
    for wrong in ([first], [first, replace(second, k=second.q)], [first, replace(second, down=second.up)]):
        with pytest.raises(ValueError, match="the kernel takes blocks of one shape"):
            TokenStep(kernel, products, wrong, cache.keys, cache.values, 16, 1e-5)
    with pytest.raises(ValueError, match="the kernel takes"):
        TokenStep(kernel, products, [first, second], cache.keys, cache.values, 15, 1e-5)
    with pytest.raises(ValueError, match="the kernel takes"):
        TokenStep(kernel, products, [replace(first, input_norm=first.input_norm.float()), second], cache.keys, cache.values,
                  16, 1e-5)
