"""Exercise 11.  Write the functions, then run:  minilora check 11

`quantize_blockwise` (minilora.quant.blockwise) and the maps of minilora.quant.codebooks may be imported.
"""
from torch import Tensor


def adamw_step(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float, weight_decay: float
               ) -> tuple[Tensor, Tensor, Tensor]:
    """Step number `step` (the first is 1) of AdamW, with betas 0.9 and 0.999, and eps 1e-8 beside the root of the corrected v.

    Args: all tensors have one shape, float32; m and v are the moments before the step.
    Returns: the new parameter, m and v.
    """
    raise NotImplementedError


def encode_second_moment(v: Tensor) -> tuple[Tensor, Tensor]:
    """v in 8 bits, as the 8-bit optimizers store it: block-wise, 256 elements to a block.

    Args: v: (n,) float32, not negative.
    Returns: codes (n,) uint8 into the dynamic map that fits it, and absmax (blocks,) float32.
    """
    raise NotImplementedError
