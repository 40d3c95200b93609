"""A frozen linear layer whose weight stays in 4 bits.

    forward    y = x Ŵᵀ + b          Ŵ = dequantize(packed), rebuilt, used, dropped
    backward   ∂L/∂x = ∂L/∂y Ŵ       Ŵ rebuilt once more; there is no ∂L/∂W, the base is frozen

The arithmetic is 16- or 32-bit; only the storage is 4-bit (QLoRA section 3, equation 5).  Plain autograd would keep Ŵ
alive from forward to backward, for every layer at once: the whole model in 16 bits.  So the function saves the packed
tensor, which is alive anyway, and pays for a second rebuild instead.

Ŵ is rebuilt in one of two places: in registers and the first cache, without ever being written to memory, where that is faster
(`NF4Tensor.fused_product`: a few rows of x, on some processors any number); else in the buffer that all layers share
(`scratch`), where torch's own product reads it.

Lesson 07 explains it.
"""
from __future__ import annotations

from collections.abc import Callable
from math import prod
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import QuantizationError
from minilora.layers import dense
from minilora.layers.scratch import borrow
from minilora.quant.nf4 import NestedAbsmax, NF4Tensor, quantize_nf4

# Smaller layers keep torch's product: there is little to save, and its sums are those of a dense layer to the bit.
FUSED_WEIGHTS = 1 << 19


def _rebuilt(weight: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """Ŵ in the shared buffer, to be used before the next one."""
    return weight.dequantize(out=borrow(weight.shape, dtype, weight.device))


def _product(x: Tensor, weight: NF4Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """``x Ŵᵀ + b``, transposed ``x Ŵ``, in x's dtype; sums are taken in float32, and rounded once.

    Ŵ is rounded to x's dtype, but where one row meets the fused product, which has it as it is.
    """
    bias = None if bias is None else bias.to(x.dtype)
    # Under autocast the types are torch's to choose; of an x that doesn't fit torch says so.
    if (prod(weight.shape) >= FUSED_WEIGHTS and x.dim() and x.shape[-1] == weight.shape[0 if transposed else 1] and x.numel()
            and weight.device.type in ("cpu", "cuda") and not torch.is_autocast_enabled(weight.device.type)):
        y = weight.fused_product(x.reshape(-1, x.shape[-1]), bias, transposed)
        if y is not None:
            return y.view(*x.shape[:-1], -1)
    rebuilt = _rebuilt(weight, x.dtype)
    return dense.matmul(x, rebuilt) if transposed else dense.linear(x, rebuilt, bias)


class NF4Product(torch.autograd.Function):
    """``x Ŵᵀ + b``, or transposed ``x Ŵ``, that keeps no dense copy of Ŵ for backward.  Each is the other's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        """x: (..., in), weight: (out, in), bias: (out,) or None -> (..., out), in x's dtype; transposed the other way."""
        ctx.weight, ctx.transposed = weight, transposed
        return _product(x, weight, bias, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        """∂L/∂y: (..., out) -> ∂L/∂x: (..., in), and ∂L/∂b: (out,) where a bias is trained."""
        grad_y, = grads
        # Trap: under create_graph a plain `@` would save its operands, and with them the buffer that the next layer overwrites.
        grad_x = NF4Product.apply(grad_y, ctx.weight, None, not ctx.transposed) if ctx.needs_input_grad[0] else None
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None


class AddedNF4Product(torch.autograd.Function):
    """``y += x Ŵᵀ + b`` in place; nothing is kept for backward, where ∂L/∂y goes on as it is."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: NF4Tensor, bias: Tensor | None) -> Tensor:
        """y: (..., out), x: (..., in), weight: (out, in), bias: (out,) or None -> y."""
        ctx.weight = weight
        ctx.mark_dirty(y)
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        few = weight.fused_product(flat_x, None) if len(flat_x) else None
        if few is None:
            dense.addmm_(flat_y, flat_x, _rebuilt(weight, x.dtype).T)
        else:
            flat_y.add_(few)
        if bias is not None:
            y.add_(bias.to(y.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        """∂L/∂y: (..., out) -> ∂L/∂x: (..., in), and ∂L/∂b: (out,) where a bias is trained."""
        grad_y, = grads
        grad_x = NF4Product.apply(grad_y, ctx.weight, None, True) if ctx.needs_input_grad[1] else None
        return grad_y, grad_x, None, grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None


class NF4Linear(nn.Module):
    """A linear layer over an `NF4Tensor`.

    The parts of the weight are buffers, so they follow ``model.to(device)`` and stand in the ``state_dict``:
    ``packed`` uint8, then ``absmax`` float32, or ``nested_codes`` uint8, ``nested_absmax`` float32, ``nested_offset``.
    ``model.to(dtype)`` leaves them as they are (constants rounded to 16 bits would be other weights); `weight_dtype`, the
    type of the dense weight that a merge or a plain checkpoint makes, follows it.

    Args:
        weight: the quantized (out, in) matrix. bias: (out,) or None; frozen.

    Raises: QuantizationError: the weight is no matrix, or the bias doesn't fit it.
    """

    SHARED = ("packed", "absmax", "nested_codes")       # what `share_out` makes parameters

    packed: Tensor
    absmax: Tensor
    nested_codes: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor

    def __init__(self, weight: NF4Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if len(weight.shape) != 2 or (bias is not None and tuple(bias.shape) != weight.shape[:1]):
            raise QuantizationError(f"a 4-bit linear needs a weight (out, in) and a bias (out,) or none, found "
                                    f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}")
        self.out_features, self.in_features = weight.shape
        self.blocksize = weight.blocksize
        self.weight_dtype = weight.dtype
        self.double_quant = weight.nested is not None
        self.register_buffer("packed", weight.packed)
        if weight.nested is None:
            self.register_buffer("absmax", weight.stored_absmax)
        else:
            self.nested_blocksize = weight.nested.blocksize
            self.register_buffer("nested_codes", weight.nested.codes)
            self.register_buffer("nested_absmax", weight.nested.absmax)
            self.register_buffer("nested_offset", torch.tensor(weight.nested.offset, dtype=torch.float32, device="cpu"))
        self._made: tuple[tuple[float, torch.dtype], tuple[Tensor | None, ...], NF4Tensor] | None = None
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = True) -> NF4Linear:
        """Quantize a dense layer.

        Raises: QuantizationError: the weight is not finite.
        """
        return cls(quantize_nf4(linear.weight, blocksize, double_quant), linear.bias)

    @property
    def quantized(self) -> NF4Tensor:
        """The weight as an `NF4Tensor` that shares the layer's storage.

        Made once, and again only after a buffer was replaced, or the offset, which is read off the device, was written to
        (load_state_dict): a token in decoding asks for hundreds.
        """
        parts = (*self._buffers.values(), *(self._parameters[name] for name in self.SHARED if name in self._parameters))
        state = self._offset_state(), self.weight_dtype
        if self._made is not None and self._made[0] == state and all(map(is_, self._made[1], parts)):
            return self._made[2]
        shape = torch.Size((self.out_features, self.in_features))
        if self.double_quant:
            nested = NestedAbsmax(self.nested_codes, self.nested_absmax, float(self.nested_offset), self.nested_blocksize)
            made = NF4Tensor(self.packed, shape, self.weight_dtype, self.blocksize, nested=nested)
        else:
            made = NF4Tensor(self.packed, shape, self.weight_dtype, self.blocksize, stored_absmax=self.absmax)
        self._made = state, parts, made
        return made

    def _offset_state(self) -> float:
        """Another number once the offset was written to; a tensor born in inference mode does not count that."""
        if not self.double_quant:
            return 0
        return float(self.nested_offset) if self.nested_offset.is_inference() else self.nested_offset._version

    def __getstate__(self) -> dict[str, Any]:       # a copy's offset counts its own writes, and may come to the same number
        return {**self.__dict__, "_made": None}

    def share_out(self) -> None:
        """Make the codes and constants parameters, frozen ones: the kind of tensor that FSDP deals out over processes."""
        for name in self.SHARED:
            if name in self._buffers:
                tensor = self._buffers.pop(name)
                assert tensor is not None
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Ŵ: a new (out, in) tensor, in `dtype` or the type the weight was quantized from."""
        return self.quantized.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype, which is the compute type."""
        if not torch.is_grad_enabled():         # a function of autograd costs as long as a small product
            return _product(x, self.quantized, self.bias)
        return NF4Product.apply(x, self.quantized, self.bias, False)

    @property
    def adds_in_place(self) -> bool:
        """Whether `add_to` pays, and is what a call would compute."""
        return self.in_features * self.out_features >= FUSED_WEIGHTS and type(self).forward is NF4Linear.forward

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """``y += x Ŵᵀ + b``: (..., out) and (..., in) -> y, in the type of both."""
        return AddedNF4Product.apply(y, x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"nf4 blocks of {self.blocksize}, double_quant={self.double_quant}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # Trap: nn.Module.to(bfloat16) casts every floating buffer; the block constants must stay float32.
        self.weight_dtype = fn(self.packed.new_empty(0, dtype=self.weight_dtype)).dtype
        constants = {id(buffer) for buffer in self.buffers(recurse=False)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in constants and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)
