"""Exercise 18.  Write the functions, then run:  minilora check 18"""
from torch import Tensor


def rslora_scaling(alpha: float, r: int) -> float:
    """The factor on B A with rsLoRA, which keeps its strength where r changes."""
    raise NotImplementedError


def dora_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    """The weight of the plain layer that computes what a DoRA layer computes.

    Args: weight: (out, in). lora_a: (r, in). lora_b: (out, r). magnitude: (out,), the trained length of each row.
    Returns: (out, in) float32.
    """
    raise NotImplementedError


def loraplus_rates(names: list[str], lr: float, ratio: float) -> dict[str, float]:
    """The learning rate of each trained parameter with LoRA+.

    Args: names: such as "layers.0.q_proj.lora_A.weight". lr: the rate of A and of all else. ratio: of B's rate to it.
    Returns: rates by name.
    """
    raise NotImplementedError


def pissa_start(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """PiSSA's start: A and B hold the r strongest directions of W, the base what is left.

    Args: weight: (out, in) float32. scaling: the factor on B A in the layer. Singular values and 1 / scaling are split evenly.
    Returns: base (out, in), lora_a (r, in), lora_b (out, r), with base + scaling * lora_b @ lora_a = weight.
    """
    raise NotImplementedError
