"""Which model was it?  A hash of the weights in memory, cheap enough to take of 7 billion.

A file's hash says what was read; this says what answers: base, storage, adapter, merged or not.  Of each tensor a thousand
elements go in, evenly spread, with its name, shape and type: whatever training, merging or quantizing touches shows there.
It is made to tell models apart, not to withstand somebody who forges one.
"""
from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLED = 1024          # elements of each tensor


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hex SHA-256 of a sample of a model's parameters and buffers.

    Guarantee: one changed tensor changes it (tests/test_identity.py); device, training mode and gradients do not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
