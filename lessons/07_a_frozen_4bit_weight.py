# %% [markdown]
# # 07 · Back-propagation through a frozen 4-bit weight
#
# ## The question
#
# A code from 0 to 15 has no gradient: there is no code seven and a half. How, then, can one train *through* a 4-bit layer?
#
# The weight is frozen, so nobody asks for its gradient. What has to pass is the gradient of its input, on its way to
# adapters farther down. With Ŵ = dequantize(codes), the layer is a plain product, and so is its backward:
#
#     forward    y = x Ŵᵀ
#     backward   ∂L/∂x = ∂L/∂y Ŵ         ∂L/∂W: not wanted

# %%
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from minilora import LoRALinear, NF4Linear, NF4Tensor, quantize_nf4
from minilora.course.pictures import BLUE, GREY, RED, picture

torch.manual_seed(0)
dense = nn.Linear(512, 512, bias=False)
layer = NF4Linear.from_linear(dense)
x = torch.randn(4, 512, requires_grad=True)

(layer(x) * torch.ones(4, 512)).sum().backward()
by_hand = torch.ones(4, 512) @ layer.dense_weight()
assert torch.allclose(x.grad, by_hand, atol=1e-5)
assert [parameter for parameter in layer.parameters() if parameter.requires_grad] == []
print("the gradient of x is ∂L/∂y Ŵ; trainable numbers in the layer: 0")
print("types:", {name: str(buffer.dtype) for name, buffer in layer.named_buffers()})

# %% [markdown]
# So where is the difficulty? In memory. The textbook way is to dequantize and let autograd do the rest:

# %%
def textbook(x, weight: NF4Tensor):
    return x @ weight.dequantize().T


def kept_bytes(forward):
    """What autograd keeps for the backward, each tensor once."""
    kept = {}

    def remember(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(remember, lambda tensor: tensor):
        forward()
    return sum(kept.values())

# %% [markdown]
# **Predict.** A stack of eight such layers, 512 × 512 each, stored in 4 bits (1.08 MB together). How many bytes does
# autograd keep between forward and backward, for the textbook way and for the package's layer?

# %%
weights = [quantize_nf4(torch.randn(512, 512) / 512 ** 0.5) for _ in range(8)]
ours = [NF4Linear(weight) for weight in weights]
stored = sum(weight.nbytes for weight in weights)


def stack_textbook(depth):
    y = x
    for weight in weights[:depth]:
        y = textbook(y, weight)
    return y


def stack_ours(depth):
    y = x
    for layer in ours[:depth]:
        y = layer(y)
    return y


plain, frugal = kept_bytes(lambda: stack_textbook(8)), kept_bytes(lambda: stack_ours(8))
print(f"stored: {stored / 1e6:.2f} MB; kept by the textbook way: {plain / 1e6:.2f} MB, by NF4Linear: {frugal / 1e6:.2f} MB")
assert plain == 8 * 512 * 512 * 4 and frugal == 0
assert torch.allclose(stack_textbook(8), stack_ours(8), atol=1e-5)

# %% [markdown]
# Everything: all eight dense weights, 8.39 MB, as if nothing had been quantized. Many expect that dequantized weights "are
# temporary". They are not, as long as a backward needs them, and it needs them all: the first layer's backward comes last.
#
# `NF4Linear` keeps the packed tensor, which lives anyway, and builds Ŵ again in the backward:

# %%
rebuilt, original = [], NF4Tensor.dequantize


def counting(self, *args, **kwargs):
    rebuilt.append(self.shape)
    return original(self, *args, **kwargs)


NF4Tensor.dequantize = counting
y = stack_ours(8).sum()
in_forward = len(rebuilt)
y.backward()
NF4Tensor.dequantize = original
print(f"rebuilt {in_forward} times in the forward, {len(rebuilt) - in_forward} more in the backward")
assert (in_forward, len(rebuilt)) == (8, 16)

# %% [markdown]
# That is the trade: each weight is unpacked twice a step. And it settles another popular belief, that QLoRA computes in 4
# bits and is faster for it. The products are those of LoRA, in 16 or 32 bits; the unpacking comes on top. What 4 bits buy
# is *room*.
#
# ## Adapters on top
#
# LoRA asks nothing of its base but to be called, so it goes over this layer as over any other. The adapters stay in
# float32: QLoRA quantizes the frozen base and nothing else.

# %%
adapted = LoRALinear(ours[0], r=8)
adapted(torch.randn(4, 512)).square().mean().backward()
for name, parameter in adapted.named_parameters():
    print(f"{name:15s} {parameter.dtype}  gradient {float(parameter.grad.norm()):.4f}")
assert adapted.lora_B.weight.grad.any() and adapted.lora_A.weight.dtype == torch.float32

# %% [markdown]
# ## The picture

# %%
with picture("07_frozen", columns=1, width=6, height=3.2) as axes:
    depths = range(1, 9)
    for label, color, megabytes in (
            ("textbook autograd", RED, [kept_bytes(lambda d=d: stack_textbook(d)) / 1e6 for d in depths]),
            ("the 4-bit weights themselves", GREY, [sum(weight.nbytes for weight in weights[:d]) / 1e6 for d in depths]),
            ("NF4Linear", BLUE, [kept_bytes(lambda d=d: stack_ours(d)) / 1e6 for d in depths])):
        axes.plot(depths, megabytes, "o-", color=color, label=label)
    axes.set(xlabel="layers of 512 x 512", ylabel="MB", title="kept between forward and backward")
    axes.legend()

# %% [markdown]
# ![megabytes kept for the backward over the number of layers](figures/07_frozen.png)
#
# ## Where it lives
#
# `minilora/layers/nf4_linear.py`: `NF4Product` is the function that you will write, `NF4Linear` the layer. Source: QLoRA
# (arXiv 2305.14314), section 3, equations 5 and 6. `tests/layers/test_nf4_linear.py` holds the gradient against finite
# differences.
#
# ## The trap
#
# Unpacking into fresh memory is slow, so all layers share *one* buffer (`minilora/layers/scratch.py`). That is safe only
# because nothing of it is kept. Here is what happens to whoever shares the buffer but leaves the backward to autograd:

# %%
buffer = torch.empty(512, 512)


def shared(x, weight):
    return x @ weight.dequantize(out=buffer).T          # autograd remembers the buffer, not what is in it now


x.grad = None
textbook(textbook(x, weights[0]), weights[1]).sum().backward()
right, x.grad = x.grad, None
try:
    shared(shared(x, weights[0]), weights[1]).sum().backward()
    off = float((x.grad - right).norm() / right.norm())
    print(f"the gradient is off by {off:.0%} of its length; no error was raised")
    assert off > 0.5
except RuntimeError as error:                           # without a compiler, torch itself writes the buffer
    print(f"torch noticed: {str(error)[:80]} ...")

# %% [markdown]
# The backward of the first layer read the second layer's weight. Where torch itself writes the buffer, its version counter
# notices and raises. A kernel that writes to memory directly, as all fast ones do, is invisible to it.
#
# ## Your turn
#
# Write the autograd function `FrozenProduct` in `lessons/exercises/07.py`, then:
#
#     minilora check 7
#
# The grader also measures what you keep.
