"""Exercise 08.  Write the functions, then run:  minilora check 8"""
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x divided by the root of its mean square, with eps = 1e-5 under the root, times the weight.

    Args: x: (..., size) float32. weight: (size,).
    """
    raise NotImplementedError


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: row p turned by p, with entry i and entry i + d/2 as a pair of frequency 10000^(-2i/d).

    Args: x: (T, d) queries or keys of one head, position 0 first, d even.
    """
    raise NotImplementedError


def shared_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in which neighbouring query heads share a key/value head.

    Args: q: (H, T, d). k, v: (Hkv, T, d), H a multiple of Hkv.
    Returns: (H, T, d).
    """
    raise NotImplementedError


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """What stands between the three matrices of Llama's MLP: the gate, through silu, times up."""
    raise NotImplementedError
