"""Several processes that take one training's steps together: what the loop asks of them.

Each holds the whole adapter, its gradients and moments, and makes the forward and backward of its share of every micro-batch.
The loss is a sum over label tokens, divided by those of the whole step; so the gradients of the shares need only be added:

    g = Σ_processes g_p          g_p: of its rows, over the N label tokens of all

Then every process takes the same step, and their adapters stay the same to the bit.  What is frozen is never summed.  One
process, number 0, writes the run folder; the others read what it has made ready.

This is the team of one, which asks nobody; `integrations.distributed` has those of more.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Team:
    """A process among others. Attributes: rank: its number. size: of the team."""

    rank, size = 0, 1
    gathers = False         # whether a forward or backward asks the others for something, so that none is done alone
    device: torch.device | None = None          # that it has to use, where the team says
    reads_to: torch.device | None = None        # where the base is read to before it is shared out, if not there

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> tuple[list[int], bool]:
        """Its rows of a micro-batch, every `size`-th; and whether they count.

        Where a micro-batch has fewer rows than the team processes, the others compute one that does not count: in a team whose
        base is sharded all of them have to come by every layer.
        """
        mine = list(rows[self.rank :: self.size])
        return (mine, True) if mine else ([rows[0]], False)

    def shard(self, model: torch.nn.Module) -> None:
        """Keep only a share of the frozen weights here, if that is what the team does."""

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over the team, in place."""

    def totals(self, *numbers: float) -> list[float]:
        """Sums over the team."""
        return [float(number) for number in numbers]

    def wait(self) -> None:
        """Until all are here."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Steps are taken in the block: one that fails because another process is gone says so."""
        yield

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The block is run by the one that leads, then by the others, who find what it has left on the disk."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()
