"""Exercise 03.  Write the functions, then run:  minilora check 3"""
from torch import Tensor


def lora_forward(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, alpha: float) -> Tensor:
    """A linear layer with its update: x W^T, and beside it the scaled path through A and B.

    Args: x: (n, in). weight: (out, in). lora_a: (r, in). lora_b: (out, r).
    Returns: (n, out).
    """
    raise NotImplementedError


def lora_start(in_features: int, out_features: int, r: int) -> tuple[Tensor, Tensor]:
    """A and B before the first step: the layer computes what it did, and yet it can learn.

    Returns: A (r, in) and B (out, r); the entries of the random one are uniform within 1 / sqrt(in), on both sides of zero, as
        in PEFT and loralib; the paper draws them from a Gaussian.
    """
    raise NotImplementedError


def lora_gradients(x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of A and B by hand, without autograd.

    Args: x: (n, in). lora_a: (r, in). lora_b: (out, r). grad_y: (n, out), the loss's gradient by y.
    Returns: that of A, (r, in), and that of B, (out, r).
    """
    raise NotImplementedError
