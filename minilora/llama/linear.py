"""The model's dense linears: torch's, and fast in 16 bits also on a CPU without instructions for them (`layers.dense`)."""
from __future__ import annotations

from torch import Tensor, nn

from minilora.layers import dense


class Linear(nn.Linear):
    """`torch.nn.Linear`, its product made by `dense.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return dense.linear(x, self.weight, self.bias)


PLAIN = nn.Linear, Linear       # a call of one is a product and no more
