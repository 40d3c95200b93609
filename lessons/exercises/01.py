"""Exercise 01.  Write the functions, then run:  minilora check 1"""


def training_bytes(parameters: int) -> int:
    """What full fine-tuning with AdamW keeps for this many float32 parameters, activations aside.

    Weights, gradients and both of Adam's moments, all float32.
    """
    raise NotImplementedError


def four_bit_bytes(in_linears: int, elsewhere: int) -> float:
    """Size of a 4-bit checkpoint, with double quantization.

    Args: in_linears: weights in the linears of the blocks. elsewhere: weights in embeddings, head and norms.
    """
    raise NotImplementedError
