"""The Triton kernels of `block_triton.py`, called with tensors on a GPU: a block besides its products and attention.

`kernel(device)` launches them, or is None where there are none (`gpu.at_first_use`): then the caller takes torch's operations,
as for tensors of other kinds (`takes_rows`, `takes_rotation`).  Norms stay with torch, which makes each in one pass.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels.cpu import KINDS
from minilora.kernels.gpu import Launcher, at_first_use, checked

TILE = 2048                         # elements a program of SwiGLU takes: sixteen a thread
# Elements below which Triton's launch may cost more than all of torch's operations: 77 µs against 13 each on an H100's host.
WORTH_A_LAUNCH = 1 << 20


def takes_rows(gate: Tensor, up: Tensor) -> bool:
    """Whether `Kernel.swiglu` is made for these, and pays."""
    return (gate.is_cuda and gate.device == up.device and gate.dtype == up.dtype and gate.dtype in KINDS
            and gate.shape == up.shape and gate.is_contiguous() and up.is_contiguous() and gate.numel() >= WORTH_A_LAUNCH)


def takes_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `Kernel.rotation` is made for these, and pays."""
    half = x.shape[-1] // 2
    return (x.is_cuda and x.device == cos.device == sin.device and x.dtype == cos.dtype == sin.dtype and x.dtype in KINDS
            and x.shape[-1] == 2 * half and half >= 16 and half & (half - 1) == 0 and x.stride(-1) == 1
            and cos.is_contiguous() and sin.is_contiguous() and x.numel() >= WORTH_A_LAUNCH)


class Kernel(Launcher):
    """The Triton kernels, for a GPU or for Triton's interpreter.

    Raises: ImportError: Triton is not installed.
    """

    def __init__(self) -> None:
        from minilora.kernels import block_triton
        self._programs = block_triton

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up in one pass, in float32 and rounded once; both of one shape and type, contiguous."""
        y, n = torch.empty_like(gate), gate.numel()
        self._launch("swiglu", (-(-n // TILE),), y, gate, up, n, TILE=TILE)
        return y

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up in one pass, rounded once; grad: of what `swiglu` gave, of the same shape."""
        by_gate, by_up, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        self._launch("swiglu_backward", (-(-n // TILE),), by_gate, by_up, grad.contiguous(), gate, up, n, TILE=TILE)
        return by_gate, by_up

    def rotation(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Each pair (i, i + d/2) of x rotated, in float32 and rounded once.

        Args: x: (B, H, T, d), d side by side, twice a power of two. cos, sin: (B or 1, 1, T, d), contiguous, of x's type.
        Returns: (B, H, T, d), lying as (B, T, H, d).
        Raises: ValueError: cos or sin has another type, size, layout or device.
        """
        batch, heads, length, head_dim = x.shape
        cos, sin = (checked(part, x.device, x.dtype, count=len(part) * length * head_dim) for part in (cos, sin))
        y = torch.empty(batch, length, heads, head_dim, dtype=x.dtype, device=x.device)
        held, half = 1 << (heads - 1).bit_length(), head_dim // 2
        self._launch("rotation", (batch * length,), y, x, cos, sin, heads, length, *x.stride()[:3], SAME=cos.shape[0] == 1,
                     HEADS=held, HALF=half, num_warps=min(8, max(1, held * half // 512)))
        return y.transpose(1, 2)


_tried: dict[torch.device, Kernel | None] = {}


def kernel(device: torch.device) -> Kernel | None:
    """The kernels for this GPU, tried out at the first call, or None (`gpu.at_first_use`)."""
    return at_first_use(_tried, device, _proven, "SwiGLU and rotations take torch's operations on the GPU")


def _proven(device: torch.device) -> Kernel:
    made = Kernel()
    prove(made, device)
    return made


def prove(kernel: Kernel, device: torch.device) -> None:
    """Compare each kernel on the device with its formula on the CPU.

    Raises: RuntimeError: a number is further off than rounding takes it; or what Triton raises.
    """
    numbers = torch.randn(3, 5, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    gate, up, grad = numbers.bfloat16().to(device)
    x = grad[:, :960].reshape(5, 3, 5, 64).transpose(1, 2)
    cos, sin = (part[:, :192].reshape(5, 1, 3, 64).contiguous() for part in (gate, up))
    found = kernel.swiglu(gate, up), *kernel.swiglu_backward(grad, gate, up), kernel.rotation(x, cos, sin)
    gate, up, grad, x, cos, sin = (tensor.double().cpu() for tensor in (gate, up, grad, x, cos, sin))
    sigmoid, half = gate.sigmoid(), x.shape[-1] // 2
    expected = (F.silu(gate) * up, grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * F.silu(gate),
                x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin)
    for ours, exact in zip(found, expected, strict=True):
        # Half a step of bfloat16, and what float32 takes before it.
        if not torch.allclose(ours.double().cpu(), exact, rtol=1.01 * 2 ** -8, atol=1e-5):
            raise RuntimeError("Triton's kernels for a block give other numbers")
