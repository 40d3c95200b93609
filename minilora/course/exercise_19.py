"""Exercise 19: one gradient of several processes, what crosses the network, what a process holds, and a Spark worker."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from minilora.course.grading import Mistake, Task
from minilora.memory import Workload, predict
from minilora.quant.nf4 import quantize_nf4
from minilora.shapes import shape_of

Model = Callable[[str], str]


def _weighted(gradients: list[Tensor], factors: list[float]) -> Tensor:
    return torch.stack([factor * gradient for factor, gradient in zip(factors, gradients, strict=True)]).sum(0)


def _step_gradient(gradients: list[Tensor], label_tokens: list[int]) -> Tensor:
    return _weighted(gradients, [count / sum(label_tokens) for count in label_tokens])


def _draw_gradients(generator: torch.Generator) -> tuple[list[Tensor], list[int]]:
    counts = torch.randint(1, 50, (3,), generator=generator).tolist()
    return [torch.randn(6, generator=generator) for _ in counts], counts


def _ring(numbers: int, processes: int) -> float:
    return 2 * (processes - 1) / processes * 4 * numbers


def _bits() -> float:
    return quantize_nf4(torch.ones(64 * 256)).bits_per_param


def _shared(linear: int, other: int, processes: int) -> float:
    return linear * _bits() / 8 / processes + 2 * other


def _of_a_7b() -> tuple[int, int, int]:
    shape = shape_of("7b")
    numbers = predict(shape, Workload("lora", compute=torch.float32)).weights // 4
    linears = shape.num_hidden_layers * sum(rows * columns for rows, columns in shape.linear_shapes().values())
    return linears, numbers - linears, 4


def _label(batches: Iterator[list[str]], load: Callable[[], Model]) -> Iterator[list[str]]:
    model = None
    for batch in batches:
        model = model or load()
        yield [model(note) for note in batch]


def _label_eagerly(batches: Iterator[list[str]], load: Callable[[], Model]) -> Iterator[list[str]]:
    model = load()
    for batch in batches:
        yield [model(note) for note in batch]


def _label_loading(batches: Iterator[list[str]], load: Callable[[], Model]) -> Iterator[list[str]]:
    for batch in batches:
        model = load()
        yield [model(note) for note in batch]


def _label_loading_each(batches: Iterator[list[str]], load: Callable[[], Model]) -> Iterator[list[str]]:
    for batch in batches:
        yield [load()(note) for note in batch]


def _label_all(batches: Iterator[list[str]], load: Callable[[], Model]) -> list[list[str]]:
    held = list(batches)
    model = load() if held else None
    return [[model(note) for note in batch] for batch in held] if model else []


def _label_flat(batches: Iterator[list[str]], load: Callable[[], Model]) -> Iterator[str]:
    for answers in _label(batches, load):
        yield from answers


def _watched(answer: Callable[..., Any], partition: list[list[str]]) -> dict[str, Any]:
    """The labels, how often the model was loaded, and how many batches had been asked for at the first answer."""
    loads, taken = 0, 0

    def load() -> Model:
        nonlocal loads
        loads += 1
        return str.upper

    def batches() -> Iterator[list[str]]:
        nonlocal taken
        for batch in partition:
            taken += 1
            yield batch

    answers = iter(answer(batches(), load))
    first = next(answers, None)
    at_first = taken
    return {"labels": [] if first is None else [first, *answers], "loads of the model": loads,
            "batches asked for before the first answer": at_first}


PARTITION = [["ct", "mr", "us"], ["xr"], ["nm", "cta"]]
TASKS = (
    Task("step_gradient", _step_gradient, fixed=(([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [12, 48]),),
         random=_draw_gradients, mistakes=(
        Mistake("that is the mean of means: a label token counts for more where a process has few. Weigh by label tokens",
                lambda gradients, counts: _weighted(gradients, [1 / len(counts)] * len(counts))),
        Mistake("you added the gradients of means: each process's first has to be weighed by its share of the label tokens",
                lambda gradients, counts: _weighted(gradients, [1.0] * len(counts))),
        Mistake("that is the gradient of the *sum* of losses: divide by the label tokens of all",
                lambda gradients, counts: _weighted(gradients, counts)),
        Mistake("the weights already add up to 1: do not divide by the number of processes once more",
                lambda gradients, counts: _step_gradient(gradients, counts) / len(counts)),
        Mistake("the weights are upside down: a process with more label tokens counts for more",
                lambda gradients, counts: _weighted(gradients, [(1 / count) / sum(1 / each for each in counts)
                                                                for count in counts])))),
    Task("all_reduce_bytes", _ring, fixed=((1_000_000, 4), (39_976_960, 2), (39_976_960, 100), (1000, 1)), mistakes=(
        Mistake("that is everyone sending everything to everyone: in a ring each sends pieces of 1 / processes",
                lambda numbers, processes: (processes - 1) * 4.0 * numbers),
        Mistake("that is the first round alone: the finished sums have to be handed around as well, which is as much again",
                lambda numbers, processes: _ring(numbers, processes) / 2),
        Mistake("you counted numbers: a float32 has four bytes", lambda numbers, processes: _ring(numbers, processes) / 4),
        Mistake("of each piece a process sends all but its own: processes - 1 in each round, not processes",
                lambda numbers, processes: 8.0 * numbers),
        Mistake("that is what all processes send together", lambda numbers, processes: processes * _ring(numbers, processes)))),
    Task("sharded_bytes", _shared, fixed=(_of_a_7b(), (68_451_041_280, 525_606_912, 2), (1 << 20, 1 << 16, 1)), tolerance=1e-4,
         mistakes=(
        Mistake("embeddings, head and norms are whole in each process: only the linears are shared",
                lambda linear, other, processes: (linear * _bits() / 8 + 2 * other) / processes),
        Mistake("that is 4 bits a weight: constants cost 8/64 + 32/(64 * 256) bits more (lesson 06)",
                lambda linear, other, processes: linear / 2 / processes + 2 * other),
        Mistake("the constants of the constants are missing: 32/(64 * 256) bits more (lesson 06)",
                lambda linear, other, processes: linear * (4 + 8 / 64) / 8 / processes + 2 * other),
        Mistake("that is without double quantization: a constant takes 8 bits, and one in 256 a float32 (lesson 06)",
                lambda linear, other, processes: linear * 4.5 / 8 / processes + 2 * other),
        Mistake("the linears are in 4 bits, not in 16", lambda linear, other, processes: 2 * linear / processes + 2 * other),
        Mistake("that is a process which holds the whole base: share the linears",
                lambda linear, other, processes: linear * _bits() / 8 + 2 * other),
        Mistake("embeddings, head and norms stay in 16 bits: two bytes a weight",
                lambda linear, other, processes: linear * _bits() / 8 / processes + other * _bits() / 8))),
    Task("label_partition", _label, fixed=((PARTITION,), ([],), ([["ct"]],)), probe=_watched, mistakes=(
        Mistake("you load the model for every batch: load it at the first one, and keep it", _label_loading),
        Mistake("you load the model for every note: load it at the first batch, and keep it", _label_loading_each),
        Mistake("a partition may be empty, and its worker then loads a model for nothing: load at the first batch",
                _label_eagerly),
        Mistake("you take all batches before you answer the first: a partition may be larger than memory. Yield batch by batch",
                _label_all),
        Mistake("you yield labels: yield a list of labels for each batch", _label_flat))),
)
