"""The buffer that all layers unpack into: one a thread, and nobody outside sees it."""
from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from minilora import NF4Linear
from minilora.kernels import cpu
from minilora.layers import scratch
from minilora.layers.nf4_linear import FUSED_WEIGHTS
from minilora.quant.nf4 import NF4Tensor

CPU = torch.device("cpu")


def test_the_same_memory_is_lent_again_and_grows_to_the_largest() -> None:
    scratch.release()
    first = scratch.borrow(torch.Size((30, 40)), torch.float32, CPU)
    assert first.shape == (30, 40) and first.dtype == torch.float32 and first.is_contiguous()
    assert scratch.borrow(torch.Size((7, 3)), torch.bfloat16, CPU).data_ptr() == first.data_ptr()
    assert scratch.held_bytes() == 30 * 40 * 4
    scratch.borrow(torch.Size((40, 40)), torch.float64, CPU)
    assert scratch.held_bytes() == 40 * 40 * 8
    scratch.release()
    assert scratch.held_bytes() == 0


def test_every_thread_has_its_own() -> None:
    mine = scratch.borrow(torch.Size((10, 10)), torch.float32, CPU)
    theirs: list[int] = []
    thread = threading.Thread(target=lambda: theirs.append(scratch.borrow(torch.Size((10, 10)), torch.float32, CPU).data_ptr()))
    thread.start()
    thread.join()
    assert theirs != [mine.data_ptr()]


def test_a_buffer_made_in_inference_mode_serves_training() -> None:
    scratch.release()
    layer, x = NF4Linear.from_linear(nn.Linear(96, 40)), torch.randn(2, 96, requires_grad=True)
    with torch.inference_mode():
        expected = layer(x.detach())
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y.detach(), expected) and x.grad is not None


@pytest.mark.parametrize("size", [96, 768])         # below and above FUSED_WEIGHTS
@pytest.mark.parametrize("rows", [1, 300])          # below and above every `fused_rows` but one that has no end
@pytest.mark.parametrize("fused", ["as ever", "never"])
def test_results_and_gradients_survive_the_next_layers(size: int, rows: int, fused: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    assert 96 * 96 < FUSED_WEIGHTS <= 768 * 768
    assert all(limit < 300 or limit == cpu.ANY for limits in cpu.FUSED_ROWS.values() for limit in limits.values())
    if fused == "never":
        monkeypatch.setattr(NF4Tensor, "fused_product", lambda *_: None)
    torch.manual_seed(0)
    layers = [NF4Linear.from_linear(nn.Linear(size, size)) for _ in range(3)]
    x = torch.randn(rows, size, requires_grad=True)
    y = x
    for layer in layers:
        y = layer(y)
    g = torch.randn_like(y)
    y.backward(g)
    expected, pull = x.detach(), g
    for layer in layers:
        expected = expected @ layer.dense_weight().T + layer.bias
    for layer in reversed(layers):
        pull = pull @ layer.dense_weight()
    torch.testing.assert_close(y.detach(), expected)
    torch.testing.assert_close(x.grad, pull)


def test_second_derivatives_do_not_read_a_buffer_that_was_overwritten() -> None:
    """loss = Σ (x Ŵᵀ)³: its second derivative along v is 6 Ŵᵀ(y · Ŵv), taken after another layer has used the buffer."""
    torch.manual_seed(0)
    layer, other = (NF4Linear.from_linear(nn.Linear(96, 40, bias=False)) for _ in range(2))
    x, v = torch.randn(4, 96, requires_grad=True), torch.randn(4, 96)
    grad, = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    other(torch.randn(5, 96))
    second, = torch.autograd.grad((grad * v).sum(), x)
    w = layer.dense_weight()
    torch.testing.assert_close(second, (6 * (x.detach() @ w.T) * (v @ w.T)) @ w)


def test_threads_that_train_at_once_do_not_disturb_each_other() -> None:
    torch.manual_seed(0)
    layers = [NF4Linear.from_linear(nn.Linear(128, 128)) for _ in range(4)]
    inputs = [torch.randn(300, 128) for _ in layers]
    expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(30):
            if not torch.equal(layers[index](inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_x_that_does_not_fit_is_refused_by_torch_and_never_reaches_the_kernel() -> None:
    layer = NF4Linear.from_linear(nn.Linear(1024, 1024))
    for x in (torch.randn(2, 512), torch.randn(1, 2048), torch.randn(1024, 1)):
        with pytest.raises(RuntimeError, match="shape"):
            layer(x)
    with pytest.raises(RuntimeError, match="1D"):
        layer(torch.tensor(1.0))
    assert layer(torch.randn(1024)).shape == (1024,) and layer(torch.randn(0, 1024)).shape == (0, 1024)
    assert layer(torch.randn(2, 3, 1024)).shape == (2, 3, 1024)
