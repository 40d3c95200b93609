"""The other half of `memory`: the same table, measured in a run of random weights and tokens.

Each kind of run has a process of its own, whose peak is read over the last of three optimizer steps.  Weights, constants,
adapters, gradients and moments are the bytes of the tensors that are there; activations and logits those that autograd keeps;
scratch is what is left of the peak.
"""
from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.data.batches import Batch
from minilora.data.prompts import IGNORED
from minilora.errors import MiniloraError
from minilora.layers.lora import LoRAConfig
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import add_lora
from minilora.llama.config import LlamaConfig
from minilora.llama.model import MLP_ROWS, LlamaDecoderLayer, LlamaForCausalLM
from minilora.loss import label_loss
from minilora.memory import Memory, Peaks, Workload
from minilora.optim.adamw import AdamW
from minilora.optim.paged_adamw import PagedAdamW
from minilora.runs import peak_bytes
from minilora.shapes import SHAPES, random_model, shape_of
from minilora.stepping import compute_gradients

STEPS = 3


def random_batch(config: LlamaConfig, work: Workload, seed: int = 0) -> Batch:
    """Notes of random tokens, the last of which carry loss."""
    ids = torch.randint(0, config.vocab_size, (work.batch, work.seq), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, IGNORED)
    last = slice(max(0, work.seq - work.label_tokens), None)
    labels[:, last] = ids[:, last]
    return Batch(ids, torch.ones_like(ids), labels, work.asked, list(range(work.batch)))


def make_model(config: LlamaConfig, work: Workload, device: str | torch.device = "cpu") -> LlamaForCausalLM:
    """A random model, ready to train."""
    model = random_model(config, "nf4" if work.kind == "qlora" else None, work.compute, device, work.blocksize,
                         work.double_quant)
    if work.kind != "full":
        add_lora(model, LoRAConfig(work.r, target_modules=work.target_modules), torch.Generator().manual_seed(0))
    model.gradient_checkpointing, model.activation_offloading = work.gradient_checkpointing, work.activation_offloading
    return model.train()


@contextmanager
def kept_for_backward(model: LlamaForCausalLM, offloaded: dict[int, int] | None = None) -> Iterator[dict[int, int]]:
    """Storages that autograd keeps of what is computed inside, but for the model's own: address -> bytes.

    Args: offloaded: where those are noted that lie elsewhere than the model.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.device != model.device:
            if offloaded is not None:
                offloaded[storage.data_ptr()] = storage.nbytes()
        elif storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def kept_by_forward(model: LlamaForCausalLM, batch: Batch) -> tuple[int, int, int]:
    """Bytes of activations and of logits that one forward keeps or makes, and of activations that it offloads.

    Activations are what is kept until the head is done; with checkpointing, the inside of half a block as well.  Logits are the
    head's result where it is 16-bit, and what the loss keeps of it, twice: in the forward beside its input, in the backward
    beside its gradient.
    """
    seen: dict[str, int] = {}
    offloaded: dict[int, int] = {}
    with kept_for_backward(model, offloaded) as kept:
        def after_head(_: nn.Module, __: object, logits: Tensor) -> None:
            seen.update(activations=sum(kept.values()), head=logits.nbytes if logits.element_size() < 4 else 0)

        handle = model.lm_head.register_forward_hook(after_head)
        label_loss(model, batch)
        handle.remove()
    inside = 0
    if model.gradient_checkpointing:        # cosines and sines the blocks hold themselves, which no hook sees
        inside = largest_part(model, batch) + 2 * batch.input_ids.numel() * model.config.head_dim * model.dtype.itemsize
    return (seen["activations"] + inside, seen["head"] + 2 * (sum(kept.values()) - seen["activations"]),
            sum(offloaded.values()))


def largest_part(model: LlamaForCausalLM, batch: Batch) -> int:
    """Bytes that the forward of one block keeps where it is not recomputed; with checkpointing, of the larger of its halves.

    Of an MLP with more rows than are recomputed at a time, those of so many.
    """
    at: list[int] = []
    rows: list[int] = []
    recompute, model.gradient_checkpointing = model.gradient_checkpointing, False
    with kept_for_backward(model) as kept:
        def note(*_: object) -> None:
            at.append(sum(kept.values()))

        def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for shared in args[1:3]:                # cosines and sines belong to no block
                kept[shared.untyped_storage().data_ptr()] = shared.untyped_storage().nbytes()
            note()

        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows.append(args[0][..., 0].numel())

        handles = []
        for layer in model.model.layers:
            assert isinstance(layer, LlamaDecoderLayer)
            handles += [layer.register_forward_pre_hook(enter), layer.post_attention_layernorm.register_forward_pre_hook(note),
                        layer.register_forward_hook(note), layer.mlp.register_forward_pre_hook(count)]
        label_loss(model, batch)
    for handle in handles:
        handle.remove()
    model.gradient_checkpointing = recompute
    halves = [(middle - start, end - middle) for start, middle, end in zip(at[::3], at[1::3], at[2::3], strict=True)]
    if not recompute:
        return max(map(sum, halves))
    return max(max(attention, mlp * min(count, MLP_ROWS) // count)
               for (attention, mlp), count in zip(halves, rows, strict=True))


@dataclass(frozen=True)
class Measured:
    """What a run took beyond Python and torch, in bytes: its parts, and the peaks of backward and step; and its losses."""

    parts: Memory
    backward: int
    step: int
    losses: tuple[float, ...] = ()

    @property
    def peak(self) -> int:
        """The larger of both."""
        return max(self.backward, self.step)


def run(config: LlamaConfig, work: Workload, device: str = "cpu", folder: str | None = None) -> Measured:
    """Take `STEPS` optimizer steps here and read what the last one took; meant for a process of its own.

    Args: folder: where a page file may lie.
    Raises: MiniloraError: the system does not tell the peak.
    """
    on, config = torch.device(device), work.shape(config)
    small = LlamaConfig.from_dict({**SHAPES["110m"], "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
                                   "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 64})
    for warm in (small, config):        # torch takes memory of its own at its first step
        before = restart_peak(on, trim=True)
        model, batch = make_model(warm, work, on), random_batch(warm, work).to(on)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer: AdamW = AdamW(trained) if work.resident_bytes is None else PagedAdamW(
            trained, state_bits=8 if work.state_bits == 8 else 32, resident_bytes=work.resident_bytes,
            backing="host" if on.type == "cuda" else "disk", folder=folder)
        losses = []
        for _ in range(STEPS):
            restart_peak(on)
            losses.append(compute_gradients(model, [batch] * work.accumulate, optimizer).loss)
            backward = peak_bytes(on) - before
            gradients = sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
            restart_peak(on)
            optimizer.step()
            step = peak_bytes(on) - before
            optimizer.zero_grad(set_to_none=True)
    absmax = sum(buffer.nbytes for layer in model.modules() if isinstance(layer, NF4Linear)
                 for name, buffer in layer.named_buffers() if name != "packed")
    adapters = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - absmax - adapters
    moments = sum(moment.nbytes for state in optimizer.state_dict()["state"].values()
                  for name, moment in state.items() if name != "step")
    resident = moments if work.resident_bytes is None else min(moments, work.resident_bytes)
    activations, logits, offloaded = kept_by_forward(model, batch)
    parts = Memory(weights, absmax, adapters, gradients, resident, activations, logits, 0, moments - resident,
                   largest_part(model, batch), offloaded)
    scratch = max(0, backward - max(Peaks.of(parts, work.accumulate)))
    return Measured(parts._replace(scratch=scratch), backward, step, tuple(losses))


def measure(model: str, work: Workload, device: str = "cpu", folder: str | None = None) -> Measured:
    """`run` in a process of its own.

    Raises: MiniloraError: it did not come to its end.
    """
    asked = {"model": model, "work": {**asdict(work), "compute": str(work.compute).removeprefix("torch.")}, "device": device,
             "folder": folder}
    # glibc keeps freed memory for later, and how much depends on what was freed in which order.  Mapped one by one, tensors
    # are given back as they are freed, and the peak is that of what was alive at once: on a GPU, torch counts the same.
    done = subprocess.run([sys.executable, "-m", "minilora.measured"], input=json.dumps(asked), capture_output=True, text=True,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    if done.returncode:
        reason = (done.stderr.splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise MiniloraError(f"measuring {work.kind} of {model} failed: {reason:.200}")
    told = json.loads(done.stdout)
    return Measured(Memory(*told["parts"]), told["backward"], told["step"], tuple(told["losses"]))


def restart_peak(device: torch.device, trim: bool = False) -> int:
    """Forget the peak so far, and return the bytes taken now.

    Args: trim: give freed memory back to the system before.
    Raises: MiniloraError: no GPU, and no Linux, where a process can do this.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return peak_bytes(device)
    gc.collect()
    try:
        if trim:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError) as error:
        raise MiniloraError(f"the peak of a run is measured on a GPU, or on Linux with glibc ({error})") from error
    return peak_bytes(device)


def main() -> None:
    """Read what to run from the standard input as JSON, run it, and write what it took."""
    asked = json.load(sys.stdin)
    asked["work"] |= {"compute": getattr(torch, asked["work"]["compute"]),
                      "target_modules": tuple(asked["work"]["target_modules"])}
    done = run(shape_of(asked["model"]), Workload(**asked["work"]), asked["device"], asked["folder"])
    print(json.dumps({"parts": list(done.parts), "backward": done.backward, "step": done.step,
                      "losses": done.losses}))


if __name__ == "__main__":
    main()
