"""AdamW over 8-bit moments against bitsandbytes' own update in plain torch (its CPU build has no kernel for it)."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minilora.optim.adamw import Moments8bit, adamw_update_8bit
from minilora.quant.codebooks import DYNAMIC_8BIT, DYNAMIC_8BIT_UNSIGNED

pytest.importorskip("bitsandbytes", reason="extra [peers] is not installed")
kernels = pytest.importorskip("bitsandbytes.backends.triton.kernels_optim", reason="bitsandbytes needs triton for it")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Their functions are compiled when they are first called; here they run as they are written."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def assert_within_one_code(ours: Tensor, theirs: Tensor, moment: str) -> None:
    apart = (ours.int() - theirs.int()).abs()
    assert int(apart.max()) <= 1, f"{moment}: element {int(apart.argmax())} is {int(apart.max())} codes away"
    assert float((apart > 0).float().mean()) < 0.001, f"{moment}: more than rounding apart"


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_step_leaves_their_states_within_one_code(n: int, weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(n)
    blocks, betas, eps, lr = -(-n // 256), (0.9, 0.99), 1e-8, 1e-2
    param = torch.randn(n, generator=generator)
    state = (torch.zeros(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8), torch.zeros(blocks), torch.zeros(blocks))
    for step in range(1, 11):
        # Over many orders of magnitude, with exact zeros, and one outlier.
        grad = torch.randn(n, generator=generator) * 10 ** torch.randint(-4, 2, (n,), generator=generator).float()
        grad[3::7] = 0
        grad[n // 2] *= 1000
        theirs, their_state = param.clone(), [part.clone() for part in state]
        kernels.optimizer_update_8bit_blockwise_pytorch(
            theirs, grad, their_state[0], their_state[1], betas[0], betas[1], 0.0, 0.0, eps, step, lr, DYNAMIC_8BIT,
            DYNAMIC_8BIT_UNSIGNED, their_state[2], their_state[3], weight_decay, 1.0, False, optimizer_name="adam")
        moments = Moments8bit(*(part.clone() for part in state))
        ours = param.clone()
        adamw_update_8bit(ours, grad, moments, step, lr, betas, eps, weight_decay)
        assert_within_one_code(moments.exp_avg, their_state[0], "first moment")
        assert_within_one_code(moments.exp_avg_sq, their_state[1], "second moment")
        torch.testing.assert_close(moments.exp_avg_absmax, their_state[2])
        torch.testing.assert_close(moments.exp_avg_sq_absmax, their_state[3])
        # The same float32 formula in another order of roundings.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float((theirs - param).abs().max()))
        param, state = theirs, tuple(their_state)       # the next step starts from theirs, so that roundings don't add up
