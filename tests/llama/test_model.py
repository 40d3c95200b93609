"""The model by itself: worked examples, invariances, masks, cache, checkpointing.  Peers: tests/peers/."""
from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minilora.llama
from minilora.errors import CheckpointError, ConfigError
from minilora.llama.cache import KVCache
from minilora.llama.config import LlamaConfig
from minilora.llama.frugal import rotate
from minilora.llama.masks import attention_masks
from minilora.llama.model import LlamaForCausalLM, RMSNorm, take
from minilora.llama.rotary import inverse_frequencies, rotation

TINY: dict[str, Any] = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
                        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "max_position_embeddings": 64}
WINDOWED = {"model_type": "mistral", "sliding_window": 3}


def make(**changes: Any) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_dict({**TINY, **changes}))
    model.init_weights(torch.Generator().manual_seed(0), std=0.2)
    return model.eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def same(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float32 additions."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.detach().abs().max())))


def cached(model: LlamaForCausalLM, batch: int, length: int) -> KVCache:
    return KVCache(model.config, batch, length, model.dtype, model.device)


# RMSNorm

def test_rms_norm_of_3_and_4_divides_by_the_root_of_12_and_a_half() -> None:
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0])
    found = norm(torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(found, torch.tensor([3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]))


def test_rms_norm_adds_eps_under_the_root_and_subtracts_no_mean() -> None:
    found = RMSNorm(4, eps=3.0)(torch.ones(1, 4))
    torch.testing.assert_close(found, torch.full((1, 4), 0.5))          # 1 / sqrt(1 + 3); a layer norm would give 0


def test_rms_norm_squares_in_float32() -> None:
    found = RMSNorm(2, eps=1e-6).half()(torch.full((2,), 300.0, dtype=torch.float16))     # 300² overflows float16
    torch.testing.assert_close(found, torch.ones(2, dtype=torch.float16))


# Rotary embedding

def test_rotation_of_one_pair_by_one_position_is_one_radian() -> None:
    config = LlamaConfig.from_dict({**TINY, "hidden_size": 8, "num_key_value_heads": 4})     # head_dim 2: one pair
    cos, sin = rotation(torch.tensor([[0, 1]]), inverse_frequencies(config), torch.float32)
    found = rotate(torch.tensor([1.0, 0.0]).expand(1, 1, 2, 2), cos, sin)
    torch.testing.assert_close(found[0, 0], torch.tensor([[1.0, 0.0], [math.cos(1), math.sin(1)]]))


def test_frequencies_are_powers_of_the_base_and_pairs_are_half_a_head_apart() -> None:
    config = LlamaConfig.from_dict({**TINY, "head_dim": 4, "rope_theta": 100.0})
    frequencies = inverse_frequencies(config)
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1]))                      # 100^0, 100^(-1/2)
    cos, sin = rotation(torch.tensor([[2]]), frequencies, torch.float32)
    found = rotate(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4), cos, sin).flatten()
    c, s, c2, s2 = math.cos(2), math.sin(2), math.cos(0.2), math.sin(0.2)
    torch.testing.assert_close(found, torch.tensor([c - 3 * s, 2 * c2 - 4 * s2, 3 * c + s, 4 * c2 + 2 * s2]))


def test_linear_scaling_divides_every_frequency() -> None:
    plain = inverse_frequencies(LlamaConfig.from_dict(TINY))
    scaled = inverse_frequencies(LlamaConfig.from_dict({**TINY, "rope_scaling": {"type": "linear", "factor": 4.0}}))
    torch.testing.assert_close(scaled, plain / 4)


def test_llama3_scaling_keeps_short_waves_divides_long_ones_and_blends_between() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}
    base = {**TINY, "head_dim": 8, "rope_theta": 1e4}                                      # θ = 1, 0.1, 0.01, 0.001
    found = inverse_frequencies(LlamaConfig.from_dict({**base, "rope_scaling": rope}))
    blend = (64 * 0.1 / (2 * math.pi) - 1) / 3                                             # θ = 0.1 turns 1.02 times in 64
    expected = [1.0, (1 - blend) * 0.1 / 8 + blend * 0.1, 0.01 / 8, 0.001 / 8]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("offset", [1, 7, 100])
def test_a_rotated_dot_product_depends_on_the_distance_only(offset: int) -> None:
    frequencies = inverse_frequencies(LlamaConfig.from_dict(TINY))
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).unbind(0)

    def dot(p: int, other: int) -> float:
        turned = [rotate(x, *rotation(torch.tensor([[at]]), frequencies, torch.float32)) for x, at in ((q, p), (k, other))]
        return float((turned[0] * turned[1]).sum())

    assert dot(9, 4) == pytest.approx(dot(9 + offset, 4 + offset), abs=1e-4)
    assert dot(9, 4) != pytest.approx(dot(9, 5), abs=1e-2)


def test_shifting_all_positions_leaves_logits_alone() -> None:
    model, tokens = make(), ids(1, 6)
    same(model(tokens, position_ids=torch.arange(6)[None] + 11), model(tokens))


# Masks

@pytest.mark.parametrize("changes", [{}, WINDOWED], ids=["causal", "window"])
def test_a_future_token_changes_no_earlier_logit(changes: dict[str, Any]) -> None:
    model, tokens = make(**changes), ids(1, 9)
    other = tokens.clone()
    other[0, 5] = (other[0, 5] + 1) % 61
    first, second = model(tokens), model(other)
    same(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5], second[:, 5])


def test_a_window_forgets_what_lies_behind_it() -> None:
    model, tokens = make(num_hidden_layers=1, **WINDOWED), ids(1, 9)
    other = tokens.clone()
    other[0, 2] = (other[0, 2] + 1) % 61
    moved = (model(tokens) - model(other)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False, False, True, True, True, False, False, False, False]   # itself and two behind it


@pytest.mark.parametrize("changes", [{}, WINDOWED], ids=["causal", "window"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_has_the_logits_it_has_alone(changes: dict[str, Any], side: str) -> None:
    model, lengths = make(**changes), [8, 3, 1]
    tokens, mask = ids(3, 8), torch.zeros(3, 8, dtype=torch.int64)
    places = [slice(8 - n, 8) if side == "left" else slice(0, n) for n in lengths]
    for row, place in enumerate(places):
        mask[row, place] = 1
    batched = model(tokens, attention_mask=mask)
    assert batched.isfinite().all(), "a padding row sees no key and became NaN"
    for row, place in enumerate(places):
        same(batched[row, place], model(tokens[row : row + 1, place])[0])


def test_padding_gives_finite_gradients_even_to_a_row_of_nothing() -> None:
    model = make().train()
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    model(ids(2, 4), attention_mask=mask)[0, 2:].sum().backward()
    bad = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.isfinite().all()]
    assert not bad, f"first without a finite gradient: {bad[0]}"


def test_every_row_of_a_padded_mask_sees_a_key() -> None:
    """At the mask, because recent torch gives 0 for a row that sees nothing and older ones NaN."""
    padded = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    for mask in attention_masks((None, 2), padded, 3, 4, 0, torch.device("cpu")):
        assert mask is not None and mask.any(-1).all()


def test_a_tree_row_that_sees_nothing_is_no_nan() -> None:
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 0, 0] = True
    assert make()(ids(1, 3), attention_mask=mask).isfinite().all()


def test_float64_stays_float64_where_gradients_are_wanted() -> None:
    model = make().double()
    with torch.no_grad():
        expected = model(ids(1, 7))
    assert model.model.layers[0].self_attn.q_proj.weight.requires_grad
    torch.testing.assert_close(model(ids(1, 7)), expected, rtol=0, atol=1e-12)


def test_an_unpadded_batch_needs_no_mask_and_a_windowed_one_shares_one() -> None:
    cpu = torch.device("cpu")
    assert attention_masks((None, None), torch.ones(2, 5), 2, 5, 0, cpu) == [None, None]
    assert attention_masks((9,), None, 2, 5, 0, cpu) == [None]              # the window is longer than the sequence
    assert attention_masks((None,), None, 2, 1, 7, cpu) == [None]           # one new token sees the whole cache
    first, second, full = attention_masks((3, 3, None), None, 2, 5, 0, cpu)
    assert first is second and full is None
    assert first is not None and first.dtype == torch.bool and first.shape == (1, 1, 5, 5)
    assert first[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("with_cache", [False, True])
def test_a_tree_mask_reads_branches_as_separate_sequences(with_cache: bool) -> None:
    """Prompt 0 1 2, branches (3 4 5) and (3 6 7): token 3 is shared."""
    model, tokens = make(), ids(1, 8)
    paths = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7]]
    visible = torch.zeros(8, 8, dtype=torch.bool)
    positions = torch.zeros(1, 8, dtype=torch.int64)
    for path in paths:
        for depth, node in enumerate(path):
            visible[node, path[: depth + 1]] = True
            positions[0, node] = depth
    if with_cache:
        cache = cached(model, 1, 8)
        first = model(tokens[:, :3], cache=cache)
        rest = model(tokens[:, 3:], attention_mask=visible[None, None, 3:], position_ids=positions[:, 3:], cache=cache)
        logits = torch.cat((first, rest), dim=1)
    else:
        logits = model(tokens, attention_mask=visible[None, None], position_ids=positions)
    for path in paths:
        same(logits[0, path], model(tokens[:, path])[0])


def test_a_mask_of_another_length_is_refused() -> None:
    model = make()
    with pytest.raises(ConfigError, match="covers 4 positions"):
        model(ids(1, 5), attention_mask=torch.ones(1, 4))
    cache = cached(model, 1, 8)
    model(ids(1, 3), cache=cache)
    with pytest.raises(ConfigError, match="3 cached and 2 new"):
        model(ids(1, 2), attention_mask=torch.ones(1, 2), cache=cache)


@pytest.mark.parametrize(("wrong", "found"), [
    (torch.tensor([1, 2, 3]), r"torch.int64 \(3,\)"), (torch.tensor([[1.0, 2.0]]), "torch.float32"), ([[1, 2]], "list"),
    (torch.zeros(2, 0, dtype=torch.int64), r"\(2, 0\)"), (torch.zeros(0, 2, dtype=torch.int64), r"\(0, 2\)"),
    (torch.zeros(1, 2, 3, dtype=torch.int64), r"\(1, 2, 3\)"), (torch.ones(1, 2, dtype=torch.bool), "torch.bool"),
])
def test_what_are_no_token_ids_of_a_batch_is_named(wrong: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=f"input_ids must be an int64 tensor.*{found}"):
        make()(wrong)


@pytest.mark.parametrize("wrong", [61, 1 << 40, -1])
def test_an_id_outside_the_table_is_refused_before_it_is_used(wrong: int) -> None:
    with pytest.raises(CheckpointError, match=f"token id {wrong} is outside the embedding table of 61 rows.*--pad-vocab"):
        make()(torch.tensor([[3, wrong], [4, 5]]))


@pytest.mark.parametrize("wrong", [
    torch.ones(3, 5), torch.ones(5), torch.ones(2, 5, 5), torch.ones(2, 1, 5, 5), [[1] * 5] * 2])
def test_a_mask_of_another_form_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"attention_mask must be a tensor \(2, 5\)"):
        make()(ids(2, 5), attention_mask=wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("real", [1, 2])
def test_any_type_of_mask_and_any_number_but_zero_mean_a_real_token(dtype: torch.dtype, real: int) -> None:
    model, tokens, mask = make(), ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    found = model(tokens.int(), attention_mask=(mask * real).to(dtype))
    same(found[0, 2:], model(tokens[:1, 2:])[0])
    same(found[1, :3], model(tokens[1:, :3])[0])


# Cache

@pytest.mark.parametrize("changes", [{}, WINDOWED, {"model_type": "qwen2"}], ids=["llama", "window", "qwen2"])
@pytest.mark.parametrize("steps", [[7], [4, 1, 1, 1], [1, 1, 3, 2]], ids=str)
def test_decoding_with_a_cache_equals_the_full_forward(changes: dict[str, Any], steps: list[int]) -> None:
    model, tokens = make(**changes), ids(2, 7)
    cache, parts = cached(model, 2, 7), []
    for part in tokens.split(steps, dim=1):
        parts.append(model(part, cache=cache))
    assert cache.length == 7
    same(torch.cat(parts, dim=1), model(tokens))


@pytest.mark.parametrize("changes", [{}, WINDOWED], ids=["causal", "window"])
def test_left_padded_batched_decoding_equals_single_decoding(changes: dict[str, Any]) -> None:
    model, lengths = make(**changes), [5, 2]
    prompts, answers = ids(2, 5), ids(2, 4, seed=2)
    mask = torch.tensor([[1] * 5, [0] * 3 + [1] * 2])
    cache = cached(model, 2, 9)
    steps = [model(prompts, attention_mask=mask, cache=cache, last_only=True)]
    for step in range(4):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), dim=1)
        steps.append(model(answers[:, step : step + 1], attention_mask=mask, cache=cache))
    batched = torch.cat(steps, dim=1)                                                      # (2, 5, V)
    for row, length in enumerate(lengths):
        alone = torch.cat((prompts[row, 5 - length :], answers[row]))[None]
        same(batched[row], model(alone)[0, length - 1 :])


def test_a_full_cache_says_so() -> None:
    model = make()
    cache = cached(model, 1, 3)
    with pytest.raises(ConfigError, match="holds 3 tokens, 4 are needed"):
        model(ids(1, 4), cache=cache)
    assert cache.length == 0 and model(ids(1, 3), cache=cache).shape == (1, 3, 61)


def test_the_cache_holds_key_value_heads_only() -> None:
    cache = cached(make(), 3, 10)
    assert cache.keys.shape == cache.values.shape == (2, 3, 2, 10, 8)


# The module itself

def test_last_only_is_the_last_position_and_hidden_feeds_the_head() -> None:
    model, tokens = make(), ids(2, 5)
    full = model(tokens)
    assert full.shape == (2, 5, 61) and model.hidden(tokens).shape == (2, 5, 32)
    same(model(tokens, last_only=True), full[:, -1:])
    same(model.lm_head(model.hidden(tokens)), full)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mask", [None, "left", "right"])
@pytest.mark.parametrize("changes", [{}, WINDOWED, {"num_key_value_heads": 4, "attention_bias": True}], ids=str)
def test_states_at_some_positions_are_those_of_a_full_forward(changes: dict[str, Any], mask: str | None,
                                                              recompute: bool) -> None:
    model, tokens = make(**changes).double().train(), ids(3, 9)
    model.gradient_checkpointing = recompute
    real = torch.ones(3, 9, dtype=torch.int64)
    if mask is not None:
        real[1, :4] = 0 if mask == "left" else 1
        real[1, 5:] = 1 if mask == "left" else 0
    at = torch.tensor([[8, 2, 2], [5, 4, 8], [0, 7, 3]]) if mask != "right" else torch.tensor([[8, 2, 2], [0, 4, 3], [0, 7, 3]])
    found: list[list[Tensor]] = []
    for some in (True, False):
        model.zero_grad()
        given = None if mask is None else real
        states = model.hidden(tokens, given, at=at) if some else take(model.hidden(tokens, given), at)
        states.square().sum().backward()
        found.append([states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for here, there in zip(*found, strict=True):
        same(here, there)


def test_positions_that_do_not_fit_are_refused() -> None:
    model = make()
    with pytest.raises(ConfigError, match="at must be"):
        model.hidden(ids(2, 5), at=torch.zeros(3, 1, dtype=torch.int64))


@pytest.mark.parametrize("new", [1, 4])
def test_positions_behind_a_cache_are_counted_from_its_end(new: int) -> None:
    model, tokens = make().double(), ids(2, 9)
    full = model.hidden(tokens)
    cache = cached(model, 2, 9)
    model.hidden(tokens[:, :-new], cache=cache)
    at = torch.tensor([[new - 1, 0], [0, new // 2]])
    same(model.hidden(tokens[:, -new:], cache=cache, at=at), take(full, at + 9 - new))


def test_training_on_the_cpu_attends_in_float32_and_answers_in_its_own_type() -> None:
    model, tokens = make().to(torch.bfloat16), ids(2, 9)
    with torch.no_grad():
        plain = model(tokens)
    trained = model(tokens)
    assert plain.dtype == trained.dtype == torch.bfloat16
    torch.testing.assert_close(trained.detach().float(), plain.float(), rtol=0, atol=0.03 * float(plain.float().abs().max()))


def test_grouped_query_attention_equals_repeated_heads() -> None:
    grouped, full = make(), make(num_key_value_heads=4)
    state = grouped.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    same(grouped(ids(2, 6)), full(ids(2, 6)))


@pytest.mark.parametrize("changes", [{}, WINDOWED, {"tie_word_embeddings": True}], ids=["llama", "window", "tied"])
def test_gradient_checkpointing_changes_no_gradient(changes: dict[str, Any]) -> None:
    model = make(**changes).train()
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    gradients = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        model(ids(2, 5), attention_mask=mask)[:, 1:].square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(model.named_parameters()).keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7, msg=f"{name}: gradients differ")


def test_offloading_changes_no_bit_of_a_gradient_and_parts_of_an_mlp_only_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for offloading, rows in ((False, 4096), (True, 4096), (False, 3), (True, 3)):
        monkeypatch.setattr("minilora.llama.model.MLP_ROWS", rows)
        model = make().double().train()         # in which another order of a sum is far below the bound, on any threads
        model.gradient_checkpointing, model.activation_offloading = True, offloading
        model(ids(2, 5)).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    whole, offloaded, parts, parts_offloaded = gradients
    assert whole.keys() == parts.keys() and len(whole) == len(list(model.parameters()))
    for name, expected in whole.items():
        assert torch.equal(offloaded[name], expected) and torch.equal(parts_offloaded[name], parts[name])
        torch.testing.assert_close(parts[name], expected, rtol=1e-10, atol=1e-12, msg=f"{name}: gradients differ")


def test_checkpointing_trains_an_adapter_over_a_frozen_embedding() -> None:
    """Reentrant checkpointing would leave these gradients at None: its inputs need no gradient."""
    model = make().train().requires_grad_(False)
    model.gradient_checkpointing = True
    trained = [layer.self_attn.q_proj.weight.requires_grad_(True) for layer in model.model.layers]
    model(ids(1, 4)).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in trained)


def test_checkpointing_keeps_no_activation_of_a_block() -> None:
    model, kept = make().train(), []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        saved: list[int] = []

        def keep(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids(2, 16))
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2, f"elements kept: {kept[0]} without, {kept[1]} with checkpointing"


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = make(tie_word_embeddings=True), make()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight.data_ptr() != untied.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in dict(tied.named_parameters())


def test_biases_stand_where_each_family_has_them() -> None:
    def biased(model: nn.Module) -> set[str]:
        return {name.split(".")[-2] for name in model.state_dict() if name.endswith(".bias")}

    assert biased(make()) == set()
    assert biased(make(attention_bias=True)) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert biased(make(mlp_bias=True)) == {"gate_proj", "up_proj", "down_proj"}
    assert biased(make(model_type="qwen2")) == {"q_proj", "k_proj", "v_proj"}


def test_a_linear_can_be_replaced_by_any_module() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, tokens = make(), ids(1, 5)
    expected = model(tokens)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                setattr(part, name, Wrapped(child))
    same(model(tokens), expected)


def test_the_model_builds_without_memory_and_is_filled_by_assignment() -> None:
    source = make()
    with torch.device("meta"):
        model = LlamaForCausalLM(source.config)
    assert all(tensor.is_meta for tensor in model.state_dict().values()) and not list(model.buffers())
    model.load_state_dict(source.state_dict(), assign=True)
    same(model(ids(1, 5)), source(ids(1, 5)))
    assert model.device.type == "cpu" and model.dtype == torch.float32


def test_the_embedding_sets_the_compute_type() -> None:
    model = make().bfloat16()
    assert model.dtype == torch.bfloat16 and model(ids(1, 5)).dtype == torch.bfloat16


def test_initial_weights_depend_on_the_generator_only() -> None:
    torch.manual_seed(3)
    first = make()
    torch.manual_seed(4)
    second = make()
    for name, expected in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], expected), name
    model = make(attention_bias=True)
    model.init_weights(torch.Generator().manual_seed(1))
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.model.layers[0].self_attn.q_proj.bias.any() and bool((model.model.norm.weight == 1).all())


def test_the_model_imports_nothing_of_quantization_or_lora() -> None:
    folder = Path(minilora.llama.__file__).parent
    for name in ("config", "model", "rotary", "masks", "cache"):
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        ours = {module for module in imported if module.split(".")[0] == "minilora"}
        strangers = {module for module in ours if not module.startswith(("minilora.llama.", "minilora.errors"))}
        assert not strangers, f"{name}.py imports {strangers}"
