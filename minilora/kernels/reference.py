"""Block-wise quantization in plain torch: the definition that every faster kernel must equal to the bit.

A block is S consecutive elements of the flattened tensor; the last may be short.  For each block

    absmax = max |x|          scaled = x * (1 / absmax)          code index = nearest entry of the codebook to scaled
    x̂      = code[index] * absmax                                                     (all in float32)

Shapes: ``x_n`` n elements, ``codes_n`` their indices, ``absmax_N`` one float per block, N = ceil(n / S);
``code`` is a sorted table of K entries.  Tables are handed in: this room knows no codebook.

Source: QLoRA (arXiv 2305.14314) section 2 and equation 1; Dettmers et al. 8-bit optimizers (arXiv 2110.02861) section 2.

Lessons 04 and 17 explain it.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this absmax (2e-39 more is where float32 turns subnormal) 1/absmax would overflow towards infinity, so scaling
# stops there; bitsandbytes clamps at the same value, and equality to its bytes needs the same choice.
SMALLEST_SCALED_ABSMAX = 1e-38
CHUNK = 1 << 22     # elements quantized at a time: bounds the int32 and float32 temporaries to some 50 MB


def nearest_codes(scaled_n: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest table entry; a value on the midpoint of two entries takes the lower index.

    Args:
        scaled_n: (n,) float32. code: (K,) float32, sorted, K <= 256.

    Returns: (n,) uint8.
    """
    midpoints = (code[1:] + code[:-1]) / 2
    # right=False counts the midpoints strictly below each value: the value on a midpoint stays below it.
    return torch.bucketize(scaled_n, midpoints, out_int32=True, right=False).to(torch.uint8)


def _in_blocks(x_n: Tensor, blocksize: int) -> Tensor:
    """(n,) -> (N, S), the last block filled with zeros; a view where n is a multiple of S, or less than one block."""
    if x_n.numel() < blocksize:
        return x_n.view(1, -1)
    missing = -x_n.numel() % blocksize
    return (F.pad(x_n, (0, missing)) if missing else x_n).view(-1, blocksize)


def quantize_blocks(x_n: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize a flat tensor block by block.

    Args:
        x_n: (n,) finite, any floating type (each element is upcast to float32 first).
        code: (K,) float32 sorted codebook. blocksize: S, elements per block.

    Returns: ``codes_n`` (n,) uint8 and ``absmax_N`` (N,) float32.
    Guarantee: the slow loops in tests/quant/loops.py give the same bits (tests/quant/test_nf4.py).
    """
    codes, absmaxes = [], []
    step = max(blocksize, CHUNK // blocksize * blocksize)
    for chunk_n in x_n.split(step):
        x_NS = _in_blocks(chunk_n.float(), blocksize)
        absmax_N = x_NS.abs().amax(dim=1)
        inverse_N = 1 / absmax_N.clamp(min=SMALLEST_SCALED_ABSMAX)
        codes.append(nearest_codes((x_NS * inverse_N[:, None]).view(-1)[: chunk_n.numel()], code))
        absmaxes.append(absmax_N)
    return torch.cat(codes), torch.cat(absmaxes)


def dequantize_blocks(codes_n: Tensor, absmax_N: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """``code[index] * absmax`` of each element's block: (n,) uint8 -> (n,) float32."""
    values_NS = _in_blocks(code[codes_n.int()], blocksize)
    return (values_NS * absmax_N[:, None]).view(-1)[: codes_n.numel()]


def pack_nibbles(codes_n: Tensor, padding: int) -> Tensor:
    """Two 4-bit codes a byte, the first in the high nibble; an odd count is padded with the code `padding`.

    Args: codes_n: (n,) uint8 below 16.
    Returns: (ceil(n / 2),) uint8.
    """
    if codes_n.numel() % 2:
        codes_n = F.pad(codes_n, (0, 1), value=padding)
    return codes_n[0::2] << 4 | codes_n[1::2]


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_nibbles`: (ceil(n / 2),) uint8 -> (n,) uint8."""
    return torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:n]


def dequantize_packed(packed: Tensor, absmax_N: Tensor, code: Tensor, blocksize: int, out_n: Tensor) -> Tensor:
    """Unpack, look up and scale in one go, into a buffer of the caller's.

    One byte holds two codes, so one lookup in a table of 256 pairs yields two values.

    Args:
        packed: (ceil(n / 2),) uint8. absmax_N: (N,) float32. code: (16,) float32.
        out_n: (n,) contiguous, any floating type: float32 products are rounded once to it.

    Returns: out_n.
    """
    n = out_n.numel()
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)               # (256, 2): high, low nibble
    step = max(2 * blocksize, CHUNK // (2 * blocksize) * 2 * blocksize)                     # whole bytes and whole blocks
    for start in range(0, n, step):
        stop = min(start + step, n)
        values_n = F.embedding(packed[start // 2 : (stop + 1) // 2].int(), pairs).view(-1)[: stop - start]
        absmax_chunk = absmax_N[start // blocksize : -(-stop // blocksize)]
        if (stop - start) % blocksize:
            scale_n = absmax_chunk.repeat_interleave(min(blocksize, stop - start))[: stop - start]
            out_n[start:stop].copy_(values_n * scale_n)
        else:
            out_n[start:stop].view(-1, blocksize).copy_(values_n.view(-1, blocksize).mul_(absmax_chunk[:, None]))
    return out_n
