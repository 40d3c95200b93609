"""Teams of several processes, on one machine or many, by torch.distributed.

    torchrun --nproc-per-node 4 -m minilora train --distributed ddp …
    torchrun --nproc-per-node 4 -m minilora train --distributed fsdp …

ddp     every process holds the 4-bit base.  A step sends the adapters' gradients, once: 4 bytes a trained number to each.
fsdp    every process holds its share of the base's bytes, and a layer is gathered when it is computed with and dropped behind
        that (FSDP2): once for the forward, once for the backward, under which a recomputation comes.  Adapters, embedding and
        head are whole everywhere.

GPUs talk by NCCL, CPUs by gloo.  The base is read by every process, with fsdp to host memory, and sharded block by block.
Source: ZeRO (arXiv 1910.02054), stage 3 for what is frozen; FSDP (arXiv 2304.11277).

Lesson 19 explains it.
"""
from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.errors import ConfigError, MiniloraError
from minilora.layers.nf4_linear import NF4Linear
from minilora.team import Team

BUCKET_BYTES = 64 << 20             # of gradients that are summed at a time
BACKENDS = ("gloo", "NCCL")         # named in the plain RuntimeErrors of lost connections
PATIENCE = timedelta(hours=2)       # the others wait while one reads, validates or saves


class ProcessGroup(Team):
    """This process in the group that torchrun has started.

    Args: kind: "ddp" or "fsdp". device: "auto", "cpu", or "cuda", of which each process of a machine takes its own.

    Raises: ConfigError: not started by torchrun, or there are fewer GPUs than processes.
    """

    def __init__(self, kind: Literal["ddp", "fsdp"], device: str = "auto") -> None:
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise ConfigError("--distributed wants several processes: start with torchrun --nproc-per-node N -m minilora "
                              "train and the rest")
        self.gathers = kind == "fsdp"
        on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if on_gpu and local >= torch.cuda.device_count():
            raise ConfigError(f"process {local} of this machine finds {torch.cuda.device_count()} GPUs; start as many "
                              "processes as there are, or give --device cpu")
        self.device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        if self.gathers:            # no GPU need hold the whole base; in host memory a mapped 4-bit checkpoint stands once
            self.reads_to = torch.device("cpu")
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def shard(self, model: nn.Module) -> None:
        """With fsdp: of each block's 4-bit weights keep a share, gathered when the block is called; the rest to the device."""
        if not self.gathers:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (self.size,))
        for block in model.get_submodule("model.layers").children():
            kept = set()
            for module in block.modules():
                if isinstance(module, NF4Linear):
                    module.share_out()
                kept |= {parameter for name, parameter in module.named_parameters(recurse=False)
                         if not (isinstance(module, NF4Linear) and name in NF4Linear.SHARED)}
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        model.to(self.device)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """In buckets of many tensors: a small one takes as long to be sent as a larger."""
        bucket: list[Tensor] = []
        for tensor in tensors:
            bucket.append(tensor)
            if sum(one.nbytes for one in bucket) >= BUCKET_BYTES:
                self._add_up(bucket)
                bucket = []
        if bucket:
            self._add_up(bucket)

    def _add_up(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.view(-1) for tensor in tensors])
        self._sum(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def totals(self, *numbers: float) -> list[float]:
        """In float64."""
        found = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self._sum(found)
        return [float(number) for number in found]

    def wait(self) -> None:
        """By a sum, which every backend has."""
        self.totals(0.0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What torch.distributed raises becomes one line.

        Raises: MiniloraError: another process is gone, or has not come for two hours.
        """
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or any(name in str(error) for name in BACKENDS)):
                raise
            # This process ends anyway: torchrun, which tells it to, must not come in between before it has said why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise MiniloraError("another process of the team has ended, so this one ends too; what went wrong stands in its "
                                "own line, and the run goes on with --resume") from error

    def _sum(self, tensor: Tensor) -> None:
        with self.together():
            dist.all_reduce(tensor)

    def close(self) -> None:
        """Leave the group."""
        # Trap: a sharded model's hooks form cycles, which hold the group; gloo's threads, still running when the process
        # ends, end it by SIGABRT.
        gc.collect()
        dist.destroy_process_group()
