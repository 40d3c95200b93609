# %% [markdown]
# # 08 · Llama in four ideas
#
# ## The question
#
# Between GPT-2 and Llama lie four small changes. What are they, and why does each of them stay? You need no more to read
# any checkpoint of the family: Llama 1 to 3, Mistral, Qwen2, Meditron.

# %%
import torch
import torch.nn.functional as F

from minilora import load_model
from minilora.course.pictures import BLUE, GREY, RED, picture
from minilora.llama.frugal import rms_norm, rotate, swiglu
from minilora.llama.model import LlamaForCausalLM
from minilora.llama.rotary import inverse_frequencies, rotation

model = load_model("tiny", quantize=None, dtype=torch.float32)
config, ids = model.config, torch.tensor([[0, 339, 28, 461, 17, 81, 980]])
print(model.model.layers[0])

# %% [markdown]
# ## 1. RMSNorm: divide, do not subtract
#
# LayerNorm subtracts the mean and divides by the spread. RMSNorm (arXiv 1910.07467) only divides, by the root of the mean
# square. One pass over the data less, and nothing is lost.

# %%
x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)) + 3
norm = model.model.layers[0].input_layernorm.requires_grad_(False)
by_hand = x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * norm.weight
assert torch.allclose(by_hand, rms_norm(x, norm.weight, config.rms_norm_eps), atol=1e-5)
print(f"mean before {float(x.mean()):.2f}, after {float((by_hand / norm.weight).mean()):.2f}: it stays; "
      f"root mean square after: {float((by_hand / norm.weight).square().mean().sqrt()):.3f}")

# %% [markdown]
# ## 2. RoPE: a position is a rotation
#
# Attention by itself does not know the order of its inputs. GPT-2 adds a learnt vector for each position. RoPE (arXiv
# 2104.09864) *turns* queries and keys: each pair of entries by an angle that grows with the position, fast for the first
# pair, slowly for the last.
#
# **Predict.** A query at position 5 and a key at position 3 have some dot product. Now both move 100 positions on. What
# happens to it?

# %%
frequencies = inverse_frequencies(config)
query, key = torch.randn(2, 1, 1, 1, config.head_dim, generator=torch.Generator().manual_seed(1))


def product(position_q, position_k):
    turned = [rotate(vector, *rotation(torch.tensor([[position]]), frequencies, torch.float32))
              for vector, position in ((query, position_q), (key, position_k))]
    return float((turned[0] * turned[1]).sum())


print(f"at 5 and 3: {product(5, 3):.5f}; 100 on: {product(105, 103):.5f}; at 5 and 4: {product(5, 4):.5f}")
assert abs(product(5, 3) - product(105, 103)) < 1e-4 < abs(product(5, 3) - product(5, 4))

# %% [markdown]
# Nothing. Two rotations compose, so only their *difference* is left: attention sees how far apart two tokens are, and not
# where. No weights, no table of positions.
#
# ## 3. GQA: several queries share a key
#
# While a model writes, it keeps keys and values of everything before. In grouped-query attention (arXiv 2305.13245)
# neighbouring query heads read the same key/value head.
#
# **Predict.** The 70B model has 64 query heads, 8 key/value heads of size 128 and 80 layers. How many megabytes of keys and
# values does *one* token cost in 16 bits, and how many without sharing?

# %%
def cache_bytes(heads, head_dim=128, layers=80):
    return 2 * layers * heads * head_dim * 2             # keys and values; 16 bits


print(f"{cache_bytes(8) / 1e6:.2f} MB with 8 shared heads, {cache_bytes(64) / 1e6:.2f} MB with 64")
assert cache_bytes(64) == 8 * cache_bytes(8)
attention = model.model.layers[0].self_attn
print("in the small model: q_proj", tuple(attention.q_proj.weight.shape), " k_proj", tuple(attention.k_proj.weight.shape))
assert attention.q_proj.weight.shape[0] == 2 * attention.k_proj.weight.shape[0]

# %% [markdown]
# Eight times less, and a LoRA on k and v is thinner as well.
#
# ## 4. SwiGLU: a gate in the MLP
#
# GPT-2's MLP is up, GELU, down. Llama's has a third matrix (arXiv 2002.05202): `down( silu(gate(x)) · up(x) )`. One half
# decides how much of the other passes.

# %%
mlp, h = model.model.layers[0].mlp, torch.randn(1, 256, generator=torch.Generator().manual_seed(2))
by_hand = mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
assert torch.allclose(by_hand, mlp(h), atol=1e-5)
assert torch.allclose(swiglu(torch.tensor([1.0]), torch.tensor([2.0])), 2 * torch.sigmoid(torch.tensor([1.0])))

# %% [markdown]
# ## All of it
#
# A block is `x + attention(norm(x))`, then `x + mlp(norm(x))`. Here is the whole model by hand, against the package's:

# %%
with torch.no_grad():
    states = model.model.embed_tokens(ids)                                                 # (1, T, hidden)
    cos, sin = rotation(torch.arange(ids.shape[1])[None], frequencies, torch.float32)
    for layer in model.model.layers:
        states = states + layer.self_attn(layer.input_layernorm(states), cos, sin, None, None)
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    logits = model.lm_head(model.model.norm(states))                                       # (1, T, vocab)
    off = float((logits - model(ids)).abs().max())
print(f"largest difference of a logit: {off:.1e}")
assert off < 1e-4 and isinstance(model, LlamaForCausalLM)

# %% [markdown]
# ## The picture

# %%
distances = range(0, 60)
ones = torch.ones(1, 1, 1, config.head_dim)
with picture("08_llama", columns=2) as (left_axes, right_axes):
    positions = torch.arange(40)
    for pair, color in ((1, RED), (3, BLUE), (8, GREY)):
        left_axes.plot(positions, (positions * frequencies[pair]).cos(), color=color, label=f"pair {pair}")
    left_axes.set(title="RoPE: the cosine of each pair's angle", xlabel="position", ylim=(-1.1, 1.5))
    left_axes.legend(loc="upper left", ncols=3, fontsize=9)
    query, key = ones, ones
    right_axes.plot(distances, [product(distance, 0) / config.head_dim for distance in distances], color=BLUE)
    right_axes.set(title="a query and the same key, by distance", xlabel="tokens apart", ylabel="dot product, of its largest")

# %% [markdown]
# ![cosines of three frequencies over positions; dot product over distance](figures/08_llama.png)
#
# Near tokens agree, far ones less: the right-hand curve is what RoPE gives before anything is learnt.
#
# ## Where it lives
#
# `minilora/llama/model.py`, with the four ideas at its top; `minilora/llama/rotary.py` and `minilora/llama/frugal.py`.
# `tests/peers/test_transformers_logits.py` compares eight families with transformers.
#
# ## The trap
#
# The same rotation is written down in two ways. The original code pairs *neighbours*: entries 0 and 1, 2 and 3. Hugging
# Face pairs entry i with entry i + d/2, and permutes the rows of q and k in its checkpoints to match. Mix them up, and
# every shape still fits:

# %%
def neighbours(x, cos, sin):
    half = x.shape[-1] // 2
    first, second = x[..., 0::2], x[..., 1::2]
    c, s = cos[..., :half], sin[..., :half]
    return torch.stack((first * c - second * s, second * c + first * s), -1).flatten(-2)


def scores(turn):
    with torch.no_grad():
        states = layer.input_layernorm(model.model.embed_tokens(ids))
        q, k = (linear(states).view(1, ids.shape[1], -1, config.head_dim).transpose(1, 2)[:, :1]
                for linear in (attention.q_proj, attention.k_proj))
        return (turn(q, cos, sin) @ turn(k, cos, sin).transpose(-1, -2))[0, 0]


right, wrong = scores(rotate), scores(neighbours)
print(f"attention scores are off by {float((right - wrong).norm() / right.norm()):.0%}; on the diagonal by "
      f"{float((right - wrong).diagonal().abs().max()):.0e}")
assert (right - wrong).norm() > 0.05 * right.norm() and (right - wrong).diagonal().abs().max() < 1e-4

# %% [markdown]
# The diagonal is right (distance 0 is not turned), so a test on a single token passes. The text comes out fluent and
# confused.
#
# ## Your turn
#
# Write `rms_norm`, `rotate`, `shared_heads` and `swiglu` in `lessons/exercises/08.py`, then:
#
#     minilora check 8
