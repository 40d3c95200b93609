"""Attention of one position a sequence (`block_query.h`) against its formula in float64."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.kernels import block
from minilora.llama.frugal import attention
from tests.kernels.test_block import heads, kernel, native, normal, threads

__all__ = ["kernel", "native", "threads"]    # fixtures


def cached(batch: int, count: int, length: int, dim: int, seed: int) -> Tensor:
    """(B, H, S, d) as it lies in a cache with room for more."""
    return normal(batch, count, length + 5, dim, seed=seed)[:, :, :length]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formula in float64, and the same of |v|."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
    return weights @ v, weights @ v.abs()


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 3), shared=st.integers(1, 3), group=st.integers(1, 9), length=st.integers(1, 90),
       dim=st.sampled_from(block.HEAD_DIMS), masked=st.sampled_from(["none", "each", "all alike"]),
       scale=st.sampled_from([1, 30]))
def test_one_position_is_the_formula_rounded(kernel: block.Kernel, batch: int, shared: int, group: int, length: int, dim: int,
                                             masked: str, scale: float) -> None:
    q = heads(batch, shared * group, 1, dim, seed=0) * scale
    k, v = cached(batch, shared, length, dim, 1), cached(batch, shared, length, dim, 2)
    mask = None
    if masked != "none":
        mask = torch.rand(batch if masked == "each" else 1, 1, 1, length, generator=torch.Generator().manual_seed(3)) < 0.6
        mask[..., -1] = True
    found = kernel.query(q, k, v, mask)
    right, size = exact(q, k, v, mask)
    assert found.shape == q.shape and found.dtype == q.dtype
    assert ((found.double() - right).abs() <= 2 ** -8 * right.abs() + 1e-5 * scale * size).all()


def test_a_sequence_has_the_bits_it_has_alone_whatever_the_threads(kernel: block.Kernel,
                                                                   threads: Callable[[int], None]) -> None:
    q, k, v = heads(3, 10, 1, 64, 0), cached(3, 2, 77, 64, 1), cached(3, 2, 77, 64, 2)
    together = kernel.query(q, k, v)
    for count in (1, 2, 5):
        threads(count)
        assert torch.equal(kernel.query(q, k, v), together)
        assert torch.equal(kernel.query(q[1:2], k[1:2], v[1:2]), together[1:2])
    longer = torch.cat((torch.ones(3, 1, 1, 77, dtype=torch.bool), torch.zeros(3, 1, 1, 5, dtype=torch.bool)), -1)
    behind = [torch.cat((x, normal(3, 2, 5, 64, seed=9)), 2) for x in (k, v)]
    assert torch.equal(kernel.query(q, *behind, longer), together), "what is masked behind them moves nothing"


@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
def test_nan_and_infinity_come_through(kernel: block.Kernel, which: int) -> None:
    for bad in (torch.nan, torch.inf):
        inputs = [heads(2, 4, 1, 64, 0), cached(2, 2, 40, 64, 1).clone(), cached(2, 2, 40, 64, 2).clone()]
        inputs[which][0, 0, -1, 5] = bad
        found = kernel.query(*inputs)
        assert not found[0, 0].isfinite().all() and found[1].isfinite().all() and found[0, 2:].isfinite().all()


def test_what_the_kernel_cannot_read_is_refused(kernel: block.Kernel) -> None:
    q, k, v = heads(2, 4, 1, 64, 0), cached(2, 2, 9, 64, 1), cached(2, 2, 9, 64, 2)
    for call in (lambda: kernel.query(q.float(), k, v), lambda: kernel.query(q[:, :3], k, v), lambda: kernel.query(q, k[:1], v),
                 lambda: kernel.query(q, k, v[:, :, 1:]), lambda: kernel.query(q[..., :32], k[..., :32], v[..., :32]),
                 lambda: kernel.query(q, k, v, torch.ones(2, 1, 1, 8, dtype=torch.bool)),
                 lambda: kernel.query(q, k, v, torch.ones(2, 1, 1, 9)), lambda: kernel.query(q, k[:, :, :0], v[:, :, :0]),
                 lambda: kernel.query(q.expand(2, 4, 2, 64), k, v)):
        with pytest.raises(ValueError, match="the kernel takes"):
            call()


def test_decoding_takes_it_where_no_gradient_is_wanted(native: block.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(2, 4, 1, 64, 0), cached(2, 2, 9, 64, 1), cached(2, 2, 9, 64, 2)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    expected = native.query(q, k, v)
    called: list[int] = []
    monkeypatch.setattr(native, "query", lambda *_: (called.append(1), expected)[1])
    assert attention(q, k, v, mask) is expected and called == [1]
    plain = attention(q, k.clone().requires_grad_(), v, mask)
    assert plain.requires_grad and called == [1]
    torch.testing.assert_close(plain.detach(), expected, rtol=2 ** -7, atol=1e-5)
    attention(q[..., :32], k[..., :32], v[..., :32], mask)
    assert called == [1], "narrow heads keep torch's bits"
