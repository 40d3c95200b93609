"""Exercise 07.  Write the class, then run:  minilora check 7"""
from typing import Any

import torch
from torch import Tensor

from minilora import NF4Tensor


class FrozenProduct(torch.autograd.Function):
    """y = x W^T for a weight that is stored in 4 bits, and never lies dense in memory between forward and backward.

    `weight.dequantize()` gives the dense (out, in) weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Tensor) -> Tensor:
        """x: (n, in) -> (n, out)."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        """grad_y: (n, out) -> the gradient of x: (n, in), and None for the weight, which is frozen."""
        raise NotImplementedError
