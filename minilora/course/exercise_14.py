"""Exercise 14: a step that is cut into micro-batches, and the learning rate over a run."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minilora.course.grading import Mistake, Task
from minilora.data.batches import Batch, collate
from minilora.data.prompts import IGNORED, Example
from minilora.llama.config import LlamaConfig
from minilora.llama.model import LlamaForCausalLM
from minilora.loss import label_loss
from minilora.optim.adamw import AdamW
from minilora.stepping import compute_gradients, learning_rate

SHAPE = {"model_type": "llama", "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "rms_norm_eps": 1e-5}


def _example(label_tokens: int, seed: int) -> Example:
    ids = torch.randint(0, 31, (4 + label_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [IGNORED] * 4 + ids[4:])


def _run(answer: Callable[[LlamaForCausalLM, list[Batch]], float], label_tokens: tuple[int, ...]) -> dict[str, Any]:
    """The loss that the reader's function returns, and the gradients that it leaves; a micro-batch for each count."""
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE))
    model.init_weights(torch.Generator().manual_seed(0), 0.3)
    loss = answer(model, [collate([_example(count, seed), _example(count, seed + 50)], 0)
                          for seed, count in enumerate(label_tokens)])
    grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return {"gradients": torch.cat(grads) if grads else None, "loss": float(loss)}


def _package(model: LlamaForCausalLM, batches: list[Batch]) -> float:
    return compute_gradients(model, batches, AdamW(model.parameters())).loss


def _weighted(weight: Callable[[Batch, list[Batch]], float], forget: bool = False
              ) -> Callable[[LlamaForCausalLM, list[Batch]], float]:
    """Each micro-batch's summed loss times a weight."""
    def accumulate(model: LlamaForCausalLM, batches: list[Batch]) -> float:
        total = 0.0
        for batch in batches:
            if forget:
                model.zero_grad()
            loss: Tensor = label_loss(model, batch) * weight(batch, batches)
            loss.backward()
            total += float(loss.detach())
        return total
    return accumulate


def _tokens(batches: list[Batch]) -> int:
    return sum(batch.label_tokens for batch in batches)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _rising(total: int, warmup: float) -> int:
    return max(1, round(total * warmup)) if warmup else 0


def _rises_for(steps: Callable[[float], int]) -> Callable[[int, int, float, float], float]:
    """The right rate, but for how a number of warm-up steps is rounded."""
    def rate(step: int, total: int, peak: float, warmup: float) -> float:
        return learning_rate(step, total, peak, max(1, steps(total * warmup)) / total if warmup else 0.0)
    return rate


def _begins_at_one(step: int, total: int, peak: float, warmup: float) -> float:
    begin = max(1, _rising(total, warmup))
    return learning_rate(step, total, peak, warmup) if step < begin else peak * _half_cosine(
        (step - begin) / (total - begin + 1))


def _reaches_zero(step: int, total: int, peak: float, warmup: float) -> float:
    rising = _rising(total, warmup)
    return peak * step / rising if step <= rising else peak * _half_cosine((step - rising) / max(1, total - rising))


def _from_zero(step: int, total: int, peak: float, warmup: float) -> float:
    rising = _rising(total, warmup)
    return peak * (step - 1) / rising if step <= rising else learning_rate(step, total, peak, warmup)


def _linear(step: int, total: int, peak: float, warmup: float) -> float:
    rising = _rising(total, warmup)
    return peak * step / rising if step <= rising else peak * (1 - (step - rising) / (total - rising + 1))


def _ignores_warmup(step: int, total: int, peak: float, warmup: float) -> float:
    rising = _rising(total, warmup)
    return peak * step / rising if step <= rising else peak * _half_cosine(step / (total + 1))


TASKS = (
    Task("accumulate", _package, probe=_run, fixed=(((3, 3),), ((1, 9),), ((2, 5, 1),), ((4,),)), tolerance=1e-4, mistakes=(
        Mistake("that is the mean of the micro-batches' means: a label token in a short micro-batch then counts more. Divide "
                "each sum by the label tokens of the whole step",
                _weighted(lambda batch, batches: 1 / (len(batches) * batch.label_tokens))),
        Mistake("the sum is not divided: the gradient grows with the number of label tokens",
                _weighted(lambda batch, batches: 1.0)),
        Mistake("you divided by the number of micro-batches: divide by the label tokens of the whole step",
                _weighted(lambda batch, batches: 1 / len(batches))),
        Mistake("each micro-batch is averaged by itself, and the averages are added: divide by the label tokens of them all",
                _weighted(lambda batch, batches: 1 / batch.label_tokens)),
        Mistake("you cleared the gradients between micro-batches: only the last one is left",
                _weighted(lambda batch, batches: 1 / _tokens(batches), forget=True)),
        Mistake("you divided by all positions, padding and prompt included: count the label tokens",
                _weighted(lambda batch, batches: 1 / sum(each.labels.numel() for each in batches))))),
    Task("learning_rate", learning_rate,
         fixed=((1, 100, 1.0, 0.1), (10, 100, 1.0, 0.1), (11, 100, 1.0, 0.1), (55, 100, 2e-4, 0.1), (100, 100, 1.0, 0.1),
                (1, 1, 1.0, 0.0), (1, 10, 1.0, 0.0), (10, 10, 1.0, 0.03), (2, 10, 1.0, 0.17), (2, 10, 1.0, 0.24)), mistakes=(
        Mistake("the last step has the rate 0, so it does nothing: let the cosine reach 0 one step after it", _reaches_zero),
        Mistake("the first step has the rate 0, so it does nothing: step 1 of w warm-up steps has peak / w", _from_zero),
        Mistake("the rate falls in a straight line: it is half a cosine", _linear),
        Mistake("the cosine begins where the warm-up *ends*, at the peak", _ignores_warmup),
        Mistake("without warm-up the cosine begins at step 0, one step before the first: so it reaches 0 one after the last",
                _begins_at_one),
        Mistake("you cut the number of warm-up steps off: it is round(total * warmup)", _rises_for(int)),
        Mistake("you rounded the number of warm-up steps up: it is round(total * warmup)", _rises_for(math.ceil)),
        Mistake("there is no warm-up: for the first warmup * total steps the rate rises from 0 to the peak",
                lambda step, total, peak, warmup: learning_rate(step, total, peak, 0.0)))),
)
