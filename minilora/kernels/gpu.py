"""The Triton kernels of `nf4_triton.py` and `product_triton.py`, called with tensors on a GPU.

`kernel(device)` launches them, or is None where there are none: then the caller takes `reference`, which gives the same bits of
a weight.  Triton comes with torch's CUDA builds on Linux; where it is missing, or fails, that is so and said once;
``MINILORA_KERNELS=reference`` asks for it.  Nothing of Triton is imported before the first tensor on a GPU.

    dequantize         packed codes and nested constants -> W, one kernel
    product            x Wᵀ + b    W rebuilt in registers, tile by tile, and never written to memory
    product_transposed g W         the same for backward

Tables and buffers are handed in, as for `cpu`: this room knows no codebook.
"""
from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import prod
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from minilora.kernels import reference
from minilora.kernels.cpu import KINDS, Constants

T = TypeVar("T")
# Why no fusion: see nf4_triton.py.  In the products it costs an instruction an element, and keeps their weights those of
# `dequantize`.
OPTIONS = {"enable_fp_fusion": False}
LONGEST_RUN = 64
TILE = 4096                         # weights that a program of `dequantize` holds: 32 a thread, whose codes are 16 bytes
ROW_TILE = 2048                     # the same of `row_product`, whose programs are single warps: 64 a thread
ENOUGH_PROGRAMS, MOST_PARTS = 1024, 8
OPERAND_RUN = 32                    # codes a thread of `operand_product` reads at once
OPERAND_OUT, OPERAND_COLUMNS, OPERAND_WARPS = 128, 128, 8                   # rows and columns of W, and warps, of a program
OPERAND_PROGRAMS = 256              # two on each multiprocessor of the largest GPUs, all at work at once
ADDED = 1024                        # numbers of y that a program of `add_parts` sums
# Up to so many rows of x the product rebuilds W in registers; above, unpacking it once for torch's product is cheaper.  On an
# H100 (`bench.gpu.crossing`) 64 rows of 16 bits take 0.47 of that, 128 rows 0.86 and 256 rows 1.6; two rows of float32, which
# has no tensor cores, 1.8.
FUSED_ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 1}
# Before Ampere Triton multiplies 16-bit matrices without tensor cores and with registers spilt; torch does better.
TENSOR_CORES = (8, 0)
FUSED_ROWS_WITHOUT = dict.fromkeys(FUSED_ROWS, 1)


class Tiles(NamedTuple):
    """What a program of a product works on at a time: rows of x, and rows and columns of W."""

    rows: int
    out: int
    columns: int


def tiles(rows: int, dtype: torch.dtype, transposed: bool) -> Tiles:
    """The tiles for so many rows of x: a fixed choice, so that a sum never depends on what was measured.

    64 features of y fill the tensor cores' largest instruction, and 128 of a sum are 64 weights a thread, enough to pay for
    what a step costs besides.  float32, which has no tensor cores, holds twice the bytes.
    """
    few = next(size for size in (16, 32, 64, 128) if rows <= size or size == 128)
    if dtype == torch.float32:
        return Tiles(min(few, 64), 64, 64)
    return Tiles(few, 128, 64) if transposed else Tiles(few, 64, 128)


def parts_of(programs: int, enough: int, steps: int) -> int:
    """In how many parts sums are taken, by as many programs, so that there is work for every multiprocessor.

    Each part of y is written and read once more, so there are no more than it takes.

    Args: programs: without parts. enough: programs. steps: of one sum.
    """
    return max(1, min(-(-enough // max(programs, 1)), MOST_PARTS, steps))


def run_length(*sizes: int, longest: int = LONGEST_RUN) -> int:
    """The largest power of two that divides every size, up to `longest` (a power of two)."""
    union = longest
    for size in sizes:
        union |= size
    return union & -union


class Launcher:
    """Launches the functions of a module of Triton's."""

    _programs: ModuleType

    def _launch(self, name: str, grid: tuple[int, ...], out: Tensor, *arguments: Any, **sizes: Any) -> None:
        """Run a kernel on the device of `out`.  Trap: Triton launches on the current one, wherever its arguments lie."""
        on_device: AbstractContextManager[Any] = torch.cuda.device(out.device) if out.is_cuda else nullcontext()
        with on_device:
            getattr(self._programs, name)[grid](out, *arguments, **sizes, **OPTIONS)


class Kernel(Launcher):
    """The Triton kernels, for a GPU or for Triton's interpreter.

    Args: tensor_cores: whether Triton has them for 16-bit products (`TENSOR_CORES`).
    Raises: ImportError: Triton is not installed.
    """

    machine = "Triton"

    def __init__(self, tensor_cores: bool = True) -> None:
        from minilora.kernels import product_triton
        self._programs = product_triton
        self.shuffled = torch.version.hip is None       # the shuffle is written in the language of NVIDIA's GPUs
        self.fused_rows = FUSED_ROWS if tensor_cores else FUSED_ROWS_WITHOUT

    @property
    def transposed_rows(self) -> dict[torch.dtype, int]:
        """Up to so many rows of x `product_transposed` is faster than unpacking and torch's product."""
        return self.fused_rows

    def dequantize(self, packed: Tensor, constants: Constants, code: Tensor, blocksize: int, out: Tensor) -> Tensor:
        """Unpack, look up, scale and round in one kernel, the constants decoded on the way.

        Args:
            packed: (ceil(n / 2),) uint8. code: (16,) float32. Both, and the constants, on the device of `out`.
            out: n elements, contiguous, float32, bfloat16 or float16.

        Returns: out.
        Raises: ValueError: a tensor has another type, size, layout or device.
        Guarantee: the bits of `reference.dequantize_packed` (tests/kernels/test_gpu.py); NaN is NaN, of any payload.
        """
        n = out.numel()
        weight, sizes = _weight(packed, constants, code, blocksize, n, checked(out, out.device, *KINDS).device)
        if n:
            run = run_length(sizes["BLOCKSIZE"])
            self._launch("dequantize", (-(-n // TILE),), out.detach(), n, *weight, **sizes, RUN=run, SHORT=n % run != 0,
                         WORDS=_words(packed, run) and n % run == 0, SHUFFLED=self.shuffled, TILE=TILE)
        return out

    def product(self, x: Tensor, packed: Tensor, constants: Constants, code: Tensor, blocksize: int, out_features: int,
                bias: Tensor | None = None) -> Tensor:
        """``x Wᵀ + bias`` without W in memory.

        Args:
            x: (rows, in) float32, bfloat16 or float16, contiguous. packed: the codes of W (out, in).
            bias: (out,) float32 or None.

        Returns: (rows, out) in x's type.  The weight is that of `dequantize` to x's type, or for one row to float32; products
            are summed in float32, and the result is rounded once.
        Raises: ValueError: a tensor has another type, size, layout or device.
        Guarantee: off the exact sum of those products by at most (in + 3) · 2⁻²⁴ · (Σ|x w| + |bias|) before the one rounding,
            for one row and for float32; for more rows of 16 bits four times that, as tensor cores cut where they should round
            (tests/kernels/test_gpu.py).  A row's result does not depend on its neighbours' values.
        """
        rows, in_features = x.shape
        weight, sizes = _weight(packed, constants, code, blocksize, out_features * in_features, x.device)
        bias = None if bias is None else checked(bias, x.device, torch.float32, count=out_features)
        y = torch.empty(rows, out_features, dtype=checked(x, x.device, *KINDS).dtype, device=x.device)
        run = run_length(sizes["BLOCKSIZE"], in_features)
        if rows == 1 and _words(packed, run):
            columns = max(run, min(1024, 1 << (in_features - 1).bit_length()))
            out = ROW_TILE // columns
            direct = self.shuffled and x.dtype != torch.float32 and x.data_ptr() % 16 == 0
            even = out_features % out == 0 and in_features % columns == 0
            self._launch("row_product", (-(-out_features // out),), y, x, x if bias is None else bias, out_features,
                         in_features, *weight, **sizes, RUN=run, BIAS=bias is not None, SHUFFLED=self.shuffled, DIRECT=direct,
                         EVEN=even, OUT=out, IN=columns, num_warps=1)
            return y
        if rows > 1 and x.dtype != torch.float32 and run >= OPERAND_RUN and _words(packed, run):
            few = tiles(rows, x.dtype, False).rows
            programs = -(-out_features // OPERAND_OUT), -(-rows // few)
            parts = parts_of(prod(programs), OPERAND_PROGRAMS, -(-in_features // OPERAND_COLUMNS))
            return self._in_parts("operand_product", programs, parts, y, x, bias, (rows, out_features, in_features), weight,
                                  **sizes, WARPS=OPERAND_WARPS, ROWS=few, OUT=OPERAND_OUT, num_warps=OPERAND_WARPS,
                                  num_stages=1)
        return self._product(x.float() if rows == 1 else x, y, bias, out_features, in_features, weight, sizes, transposed=False)

    def product_transposed(self, x: Tensor, packed: Tensor, constants: Constants, code: Tensor, blocksize: int,
                           in_features: int) -> Tensor:
        """``x W``, the way of a gradient: (rows, out) -> (rows, in); the rest as in `product`, with `out` terms to a sum."""
        rows, out_features = x.shape
        weight, sizes = _weight(packed, constants, code, blocksize, out_features * in_features, x.device)
        y = torch.empty(rows, in_features, dtype=checked(x, x.device, *KINDS).dtype, device=x.device)
        return self._product(x, y, None, out_features, in_features, weight, sizes, transposed=True)

    def _product(self, x: Tensor, y: Tensor, bias: Tensor | None, out_features: int, in_features: int,
                 weight: tuple[Tensor | float, ...], sizes: dict[str, int], transposed: bool) -> Tensor:
        rows, features = y.shape
        tile = tiles(rows, x.dtype, transposed)
        kept, summed = (tile.columns, tile.out) if transposed else (tile.out, tile.columns)
        programs = -(-features // kept), -(-rows // tile.rows)
        enough = ENOUGH_PROGRAMS if rows <= 32 else ENOUGH_PROGRAMS // 3
        parts = parts_of(prod(programs), enough, -(-x.shape[1] // summed))
        run = run_length(sizes["BLOCKSIZE"], in_features, longest=min(LONGEST_RUN, tile.columns))
        return self._in_parts("product", programs, parts, y, x, bias, (rows, out_features, in_features), weight, **sizes,
                              RUN=run, WORDS=_words(weight[0], run), TRANSPOSED=transposed, ROWS=tile.rows, OUT=tile.out,
                              IN=tile.columns, num_stages=1)

    def _in_parts(self, name: str, programs: tuple[int, int], parts: int, y: Tensor, x: Tensor, bias: Tensor | None,
                  shape: tuple[int, int, int], weight: tuple[Tensor | float, ...], **sizes: int) -> Tensor:
        """y by a product's kernel, whose sums are taken in parts and added up behind it."""
        if y.numel():
            sums = y if parts == 1 else y.new_empty(parts, *y.shape, dtype=torch.float32)
            here = bias if parts == 1 else None
            self._launch(name, (*programs, parts), sums, x, x if here is None else here, *shape, *weight, **sizes,
                         BIAS=here is not None, SHUFFLED=self.shuffled, PARTS=parts)
            if parts > 1:
                self._launch("add_parts", (-(-y.numel() // ADDED),), y, sums, x if bias is None else bias, y.numel(),
                             y.shape[1], PARTS=parts, BIAS=bias is not None, TILE=ADDED)
        return y


def checked(tensor: Tensor, device: torch.device, *dtypes: torch.dtype, count: int | None = None) -> Tensor:
    """The tensor; a kernel believes what it is told, so a wrong type, size or gap between elements stops here."""
    if (tensor.dtype not in dtypes or not tensor.is_contiguous() or tensor.device != device
            or (count is not None and tensor.numel() != count)):
        wanted = f"{'' if count is None else f'{count} '}contiguous {' or '.join(map(str, dtypes))} on {device}"
        raise ValueError(f"the kernel takes {wanted}, not {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} "
                         f"on {tensor.device}")
    return tensor


def _words(packed: Any, run: int) -> bool:
    """Whether runs of codes can be read as words of eight; a buffer that begins anywhere is read byte by byte."""
    return run >= 8 and packed.data_ptr() % 16 == 0


def _weight(packed: Tensor, constants: Constants, code: Tensor, blocksize: int, n: int,
            device: torch.device) -> tuple[tuple[Tensor | float, ...], dict[str, int]]:
    """The arguments that describe a weight of n elements to every kernel, and the sizes that they are compiled for."""
    # A block longer than the tensor is as long: 64 bits are not Python's integers, and a power of two keeps runs long.
    blocksize = min(blocksize, 1 << n.bit_length())
    blocks = -(-n // blocksize)
    checked(packed, device, torch.uint8, count=(n + 1) // 2)
    checked(code, device, torch.float32, count=16)
    if constants.absmax is not None:
        absmax = checked(constants.absmax, device, torch.float32, count=blocks)
        return (packed, code, absmax, code, code, 0.0), {"BLOCKSIZE": blocksize, "NESTED": 0}
    if constants.codes is None or constants.dynamic is None or constants.nested is None:
        raise ValueError("block constants are float32, or codes with a map and nested constants: found neither")
    nested_blocksize = min(constants.blocksize, 1 << blocks.bit_length())
    codes = checked(constants.codes, device, torch.uint8, count=blocks)
    dynamic = checked(constants.dynamic, device, torch.float32, count=256)
    nested = checked(constants.nested, device, torch.float32, count=-(-blocks // nested_blocksize))
    return (packed, code, codes, dynamic, nested, constants.offset), {"BLOCKSIZE": blocksize, "NESTED": nested_blocksize}


_lock = threading.Lock()
_tried: dict[torch.device, Kernel | None] = {}


def kernel(device: torch.device) -> Kernel | None:
    """The kernels for this GPU, tried out at the first call, or None (`at_first_use`)."""
    return at_first_use(_tried, device, _proven, "4-bit weights take the slow path in plain torch on the GPU")


def at_first_use(tried: dict[torch.device, T | None], device: torch.device, make: Callable[[torch.device], T],
                 otherwise: str) -> T | None:
    """What `make` gives for a device, made by the first caller and kept in `tried` for all others; None where it fails.

    Then a warning says why, once, with what happens `otherwise`; with ``MINILORA_KERNELS=reference`` nothing is made, or said.
    """
    if device not in tried:
        with _lock:
            if device not in tried:
                tried[device] = _made(tried, device, make, otherwise)
    return tried[device]


def _made(tried: dict[torch.device, T | None], device: torch.device, make: Callable[[torch.device], T],
          otherwise: str) -> T | None:
    if os.environ.get("MINILORA_KERNELS") == "reference":
        return None
    try:
        return make(device)
    except torch.cuda.OutOfMemoryError:
        raise                       # says nothing of the kernels, and the trainer knows what to do
    except Exception as error:      # whatever Triton, its compilers and the driver raise: torch's operations need none of them
        if None not in tried.values():
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            warnings.warn(f"{otherwise}: {reason:.200}", RuntimeWarning, stacklevel=5)
        return None


def _proven(device: torch.device) -> Kernel:
    made = Kernel(tensor_cores=torch.cuda.get_device_capability(device) >= TENSOR_CORES)
    prove(made, device)
    return made


def prove(kernel: Kernel, device: torch.device) -> None:
    """Unpack a matrix on the device and on the CPU, and multiply unit vectors by it, which gives its rows and columns.

    A compiler that fuses operations, or rounds otherwise, or fails at one of the kernels, is found here.
    Raises: RuntimeError: the bits differ; or what Triton raises.
    """
    shape = out_features, in_features = 512, 128
    generator = torch.Generator().manual_seed(0)
    packed, codes = (torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator, device="cpu")
                     for count in (1 << 15, 1 << 10))
    table, dynamic, nested = (torch.randn(count, generator=generator, dtype=torch.float32, device="cpu")
                              for count in (16, 256, 4))
    absmax = reference.dequantize_blocks(codes, nested, dynamic, 256) + 0.3
    constants = Constants(None, codes.to(device), dynamic.to(device), nested.to(device), 0.3)
    weight = packed.to(device), constants, table.to(device), 64
    # In one type: each further one would compile three kernels more.
    multiplied = torch.bfloat16 if kernel.fused_rows[torch.bfloat16] > 1 else torch.float32
    for dtype in KINDS:
        w = torch.empty(shape, dtype=dtype, device="cpu")
        reference.dequantize_packed(packed, absmax, table, 64, w.view(-1))
        found = [kernel.dequantize(*weight, torch.empty_like(w, device=device))]
        expected = [w]
        if dtype == multiplied:
            unit = torch.eye(out_features, dtype=dtype, device=device)
            rows = unit[:in_features, :in_features].contiguous()
            found += [kernel.product(rows[:1], *weight, out_features), kernel.product(rows[:16], *weight, out_features),
                      kernel.product_transposed(unit[:16], *weight, in_features)]
            expected += [w[:, :1].T, w[:, :16].T, w[:16]]
        if not all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, expected, strict=True)):
            raise RuntimeError(f"Triton's kernels do not give the reference's bits in {dtype}")
