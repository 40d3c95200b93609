"""Exercise 14.  Write the functions, then run:  minilora check 14

`label_loss(model, batch)` (minilora.loss) gives the *sum* of -log p over a batch's label tokens; `batch.label_tokens` counts
them.
"""
from minilora.data.batches import Batch
from minilora.llama.model import LlamaForCausalLM


def accumulate(model: LlamaForCausalLM, batches: list[Batch]) -> float:
    """Forward and backward of one optimizer step that is cut into micro-batches.

    The gradients, which are left in the parameters, and the loss are those of all the batches at once: the mean over the label
    tokens of the whole step.  The parameters have no gradients before.

    Returns: the step's loss.
    """
    raise NotImplementedError


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """The rate of step 1 ... total: a straight line up to the peak, then half a cosine down.

    The line takes w = round(total * warmup) steps, at least one unless warmup is 0, and its last step has the peak.  The cosine
    goes from the peak at step w, which is 0 without warm-up, to 0 at step total + 1: no step of the run has the rate 0.
    """
    raise NotImplementedError
