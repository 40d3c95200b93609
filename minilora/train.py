"""The training loop: plain, from top to bottom.

One optimizer step takes `accumulate` micro-batches.  Its loss is the mean over all label tokens of the step,

    L = (1 / N) Σ_micro-batches Σ_label tokens  −log p(token),        N = label tokens of the whole step

so how a batch is split changes the gradient by rounding only (the mean of micro-batch means does not have that property;
transformers issues 34191, 35203).  The prompt carries no loss, and logits are computed only where there is a label.

Rate: linear warm-up, then a cosine to zero.  Base: frozen, 4-bit or dense.  Adapters, gradients and moments: float32.
With ``tune = "full"`` there are no adapters: all weights are float32 and trained; with ``new_tokens`` the tokenizer learns
the notes' words before (`llama.new_tokens`).

Lesson 14 explains it.
"""
from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from minilora.adapters import base_digest, save_adapter, save_extra
from minilora.card import write_model_card
from minilora.config import TrainConfig, check_offloading
from minilora.data.batches import Batch, collate, epoch_batches, steps_per_epoch
from minilora.data.prompts import Example, check_ids, clean_note, encode_example, load_template, longest_label
from minilora.data.tables import label_set, training_examples, write_labels
from minilora.errors import TO_TAKE_LESS, CheckpointError, ConfigError, DataError, MiniloraError, StoppedError, memory_reason
from minilora.files import file_sha256
from minilora.hub import resolve_model, split_revision
from minilora.layers.qlora import add_lora, trainable_parameters
from minilora.llama import checkpoint
from minilora.llama.config import LlamaConfig
from minilora.llama.new_tokens import add_rows, learn_tokens, of_language, pieces, tokens_a_word
from minilora.llama.tokenizer import Tokenizer, read_tokenizer
from minilora.loading import load_model, pick_device, pick_dtype
from minilora.locks import Unlocked
from minilora.loss import PADDING, validation_loss
from minilora.malloc import keep_freed_memory
from minilora.optim.paged_adamw import PagedAdamW
from minilora.own_base import FOLDER, save_base, start_adapters
from minilora.run_checkpoints import (
    Position,
    has_checkpoint,
    last_checkpoint,
    length_changed,
    load_checkpoint,
    save_checkpoint,
    seed_member,
    trained_parameters,
)
from minilora.runs import append_metrics, check_run, last_metrics, open_run, peak_bytes
from minilora.stepping import compute_gradients, learning_rate, make_optimizer, peak_learning_rate, rate_groups
from minilora.stopping import asked_to_stop
from minilora.table_check import warn_of_shared_notes
from minilora.team import Team

ROWS_NAMED = 64         # of a batch, in a message


@dataclass
class TrainResult:
    """What a run did.

    Attributes:
        out: the run folder. steps: optimizer steps. loss: of the last step. val_loss: the last one measured, if any.
        trained, parameters: how many numbers were trained, of how many. seconds: of this call. peak_bytes: of memory.
    """

    out: Path
    steps: int
    loss: float
    val_loss: float | None
    trained: int
    parameters: int
    seconds: float
    peak_bytes: int


def encode_table(path: str, config: TrainConfig, tokenizer: Tokenizer, labels: list[str] | None, vocab_rows: int
                 ) -> tuple[list[Example], list[str]]:
    """Read a table and turn its rows into examples.

    Args:
        labels: None takes the table's own label set; a list must hold every label of the table (validation).
        vocab_rows: of the embedding; a token id past it is refused.

    Returns: examples and the label set.
    Raises: DataError, ConfigError, CheckpointError.
    """
    rows = training_examples(path, config.input_column, config.label_column, min_labels=2 if labels is None else 1)
    template = load_template(config.template)
    known = label_set(label for _, label, _ in rows) if labels is None else labels
    allowed = set(known)
    for _, label, number in rows:
        if label not in allowed:
            # Not quoted: where the columns were mixed up, the "label" is a patient's note.
            raise DataError(f"{path} row {number}: its label does not occur in the training table {config.data}; correct it, "
                            "or train on notes of that label as well")
    asked = labels is None and not config.quiet and not config.new_tokens
    if asked and (language := of_language(tokens_a_word(tokenizer, (note for note, *_ in rows)))):
        warnings.warn(f"{path}: {language}", stacklevel=2)
    reserve = longest_label(tokenizer, known)
    examples = []
    for note, label, number in tqdm(rows, desc="tokenize", unit="row", disable=config.quiet or len(rows) < 5000, leave=False):
        example = encode_example(tokenizer, template, note, label, config.max_length, row=number, reserve=reserve)
        check_ids(example.input_ids, vocab_rows)
        examples.append(example)
    cut = sum(example.cut for example in examples)
    if cut:
        warnings.warn(f"{path}: {cut:,} of {len(examples):,} notes are longer than max_length {config.max_length} has room "
                      "for: of each the first two thirds and the last third of the tokens that fit are kept", stacklevel=2)
    return examples, known


def _with_new_tokens(tokenizer: Tokenizer, config: TrainConfig, rows: int) -> tuple[Tokenizer, list[list[int]]]:
    """The run's tokenizer, and what each token past the `rows` of the base's embedding was before: its ids."""
    if not config.new_tokens:
        return tokenizer, []
    if config.resume and has_checkpoint(Path(config.out)):      # what it learnt, even where the table has changed since
        grown = read_tokenizer(config.out)
    else:
        table = training_examples(config.data, config.input_column, config.label_column)
        # A space in front: a note's first word follows one, as the others do.
        grown = learn_tokens(tokenizer, (" " + clean_note(note) for note, *_ in table), config.new_tokens, rows)
    return grown, pieces(tokenizer, grown, rows)


def _steps(examples: list[Example], config: TrainConfig, first: int, total: int) -> Iterator[list[list[int]]]:
    """Optimizer steps `first` … `total` - 1 as lists of micro-batches of example indices."""
    lengths = [len(example.input_ids) for example in examples]
    per_epoch = steps_per_epoch(len(examples), config.batch_size, config.accumulate)
    step, epoch = first, first // per_epoch
    while step < total:
        plan = epoch_batches(lengths, config.batch_size, config.accumulate, config.seed, epoch)
        for micro_batches in plan[step - epoch * per_epoch :][: total - step]:
            yield micro_batches
            step += 1
        epoch += 1


def train(config: TrainConfig, team: Team | None = None) -> TrainResult:
    """Fine-tune a model on a table of notes and labels.

    Everything that can be wrong with the input is found before the run folder is made.

    Args: team: of processes that do it together, every one with the same config; default this one alone.
    Returns: figures of the run; the adapter (or, after full tuning, the model), tokenizer, label set, metrics and model
        card stand in ``config.out``.
    Raises: MiniloraError: bad input, an output in use, or a loss that is not finite. StoppedError: a signal asked for it; the
        checkpoint is written.
    Guarantee: the same config writes the same adapter, byte for byte, on one machine; resumed or not (test_train.py).
    """
    began, team = time.perf_counter(), team or Team()
    out, full, reads = Path(config.out), config.tune == "full", (config.model, config.data, config.val, config.template)
    if team.leads:
        check_run(out, config.resume, config.overwrite, reads)
    earlier = config.check_resumes(out / "config.toml") if config.resume else config
    with team.leader_first():
        folder = resolve_model(config.model, progress=not config.quiet)
    tokenizer = read_tokenizer(folder)
    device = team.device or pick_device(config.device)
    check_offloading(config.activation_offloading, config.gradient_checkpointing, device.type)
    dtype = torch.float32 if full else pick_dtype(config.dtype, device)
    # The tables come before the weights: a wrong column should not cost the minutes in which a large model is quantized.
    llama = LlamaConfig.from_json(folder / "config.json")
    if config.max_length > llama.max_position_embeddings:
        raise ConfigError(f"max_length {config.max_length} exceeds the model's {llama.max_position_embeddings} positions")
    table = file_sha256(config.data) if Path(config.data).is_file() else ""
    tokenizer, made_of = _with_new_tokens(tokenizer, config, llama.vocab_size)
    vocabulary = llama.vocab_size + len(made_of)
    examples, labels = encode_table(config.data, config, tokenizer, None, vocabulary)
    validation = encode_table(config.val, config, tokenizer, labels, vocabulary)[0] if config.val else []
    if team.leads and config.val:
        warn_of_shared_notes(config.data, config.val, config.input_column)
    an_epoch = steps_per_epoch(len(examples), config.batch_size, config.accumulate)
    total = config.steps(an_epoch)
    remark = length_changed(out, earlier.steps(an_epoch), total) if config.resume and team.leads else ""

    # PiSSA and LoftQ change the base.  That is not done twice: a resumed run goes on over the base that it saved.
    start = None if full or config.init_lora_weights == "lora" else config.init_lora_weights
    started = start is not None and config.resume and has_checkpoint(out)
    with team.leader_first() if config.cache else nullcontext():
        model = load_model(out / FOLDER if started else folder, quantize=None if config.quantize == "none" else "nf4",
                           double_quant=config.double_quant, blocksize=config.blocksize, dtype=dtype,
                           device=team.reads_to or device, pad_vocab=config.pad_vocab, progress=not config.quiet,
                           cache=config.cache)
    if made_of:
        add_rows(model, made_of)
    torch.manual_seed(config.seed)
    if not full:
        add_lora(model, config.lora(), generator=torch.Generator().manual_seed(config.seed))
    if start and not started:
        start_adapters(model, folder, start, config.quiet)
    model.gradient_checkpointing, model.activation_offloading = config.gradient_checkpointing, config.activation_offloading
    model.train()
    trained, parameters = trainable_parameters(model)
    digest = None if full else base_digest(model)
    now = {"data_sha256": (config.data, table), "base_digest": (f"what the model {config.model} holds", digest or ""),
           "template": (f"the template {config.template}", load_template(config.template).text)}
    team.shard(model)
    groups = rate_groups(model, config.loraplus_lr_ratio)
    optimizer = make_optimizer(groups, config, device)
    peak_rate = peak_learning_rate(config, llama.hidden_size)

    with open_run(out, config.resume, config.overwrite, reads) if team.leads else Unlocked() as lock:
        if team.leads:
            config.save(out / "config.toml", remark)
            if start and not started:
                save_base(model, tokenizer, out)
                save_checkpoint(out, Position().sees(**now), model, optimizer)
            write_labels(out / "labels.txt", labels)
            tokenizer.save(out)
        team.wait()
        position = load_checkpoint(out, model, optimizer, cut=team.leads) if config.resume else Position()
        if team.totals(position.step)[0] != team.size * position.step:
            raise CheckpointError(f"process {team.rank} goes on from step {position.step} and another one from another: is "
                                  f"{out} the same folder, and readable, everywhere?")
        position.sees(**now)

        keep_freed_memory()
        before = last_metrics(out)
        loss, val_loss = before.get("loss", math.nan), before.get("val_loss")
        tokens_done, training_seconds = 0, 1e-9
        with (_saying_what_is_left(out), asked_to_stop(config.quiet) as request, team.together(),
              tqdm(total=total, initial=position.step, desc="train", unit="step", disable=config.quiet) as progress):
            for micro_batches in _steps(examples, config, position.step, total):
                step_started = time.perf_counter()
                step = position.step + 1
                batches = [_batch(examples, rows, team).to(device) for rows in micro_batches]
                asked = sum(examples[index].label_tokens for rows in micro_batches for index in rows)
                if team.size > 1:
                    seed_member(config.seed, step, team.rank)
                rate = learning_rate(step, total, peak_rate, config.warmup)
                for group, (_, relative) in zip(optimizer.param_groups, groups, strict=True):
                    group["lr"] = rate * relative
                gradients = compute_gradients(model, batches, optimizer, asked, again=not team.gathers)
                team.add_up([parameter.grad for parameter in trained_parameters(model).values() if parameter.grad is not None])
                loss, seen = team.totals(gradients.loss, sum(int(batch.attention_mask.sum()) for batch in batches))
                if gradients.evicted_bytes:
                    warnings.warn(f"step {step}: out of memory; {gradients.evicted_bytes / 1e6:,.1f} MB of optimizer pages "
                                  "were put out, and the step was done again", stacklevel=2)
                norm = float(torch.nn.utils.clip_grad_norm_([parameter for parameters, _ in groups for parameter in parameters],
                                                            config.max_grad_norm or math.inf))
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    rows = list(gradients.broken_rows) or [examples[index].row for rows in micro_batches for index in rows]
                    raise MiniloraError(f"step {step}: loss {loss} with gradient norm {norm} on rows {_named(rows)} of "
                                        f"{config.data}; start again with a lower --lr, or with --dtype float32")
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

                position.step, tokens = step, int(seen)
                seconds = time.perf_counter() - step_started
                tokens_done, training_seconds = tokens_done + tokens, training_seconds + seconds
                line = {"step": step, "loss": loss, "lr": rate, "tokens": tokens, "seconds": round(seconds, 4),
                        "peak_bytes": peak_bytes(device), "grad_norm": norm}
                if isinstance(optimizer, PagedAdamW):
                    line |= {"evicted_bytes": gradients.evicted_bytes, **asdict(optimizer.counters)}
                if validation and (step == total or (config.eval_every and step % config.eval_every == 0)):
                    line["val_loss"] = val_loss = validation_loss(model, validation, config.batch_size)
                    if not math.isfinite(val_loss):
                        raise MiniloraError(f"step {step}: validation loss {val_loss} on {config.val}; start again with a "
                                            "lower --lr, or with --dtype float32")
                lock.check()
                if team.leads:
                    position.metrics_bytes = append_metrics(out, line)
                stopping = team.totals(request.signal is not None) != [0.0] and step < total    # one that is asked stops all
                due = stopping or step == total or (config.save_every and step % config.save_every == 0)
                if due and team.leads:
                    save_checkpoint(out, position, model, optimizer)
                if stopping:
                    by = request.signal or signal.SIGTERM
                    raise StoppedError(f"stopped by {by.name} after step {step} of {total}; go on with --resume", by)
                progress.set_postfix_str(f"loss {loss:.3f}, {tokens_done / training_seconds:,.0f} tokens/s"
                                         + (f", val {val_loss:.3f}" if val_loss is not None else ""), refresh=False)
                progress.update()
        lock.check()
        result = TrainResult(out, position.step, loss, val_loss, trained, parameters, time.perf_counter() - began,
                             peak_bytes(device))
        if not team.leads:
            return result
        extra = {"template": load_template(config.template).text, "max_length": config.max_length, "base_model": config.model}
        if full:
            checkpoint.save_checkpoint(model, out, progress=not config.quiet)
            save_extra(model, out, extra)
        else:
            base, revision = (str(out / FOLDER), None) if start else split_revision(config.model)
            save_adapter(model, out, base_model=base, revision=revision, digest=digest,
                         extra={**extra, "init_lora_weights": config.init_lora_weights})
        write_model_card(result, config, labels, len(examples))
    return result


def _batch(examples: list[Example], rows: list[int], team: Team) -> Batch:
    """The team's member's share of a micro-batch; one that does not count says that it has no label tokens."""
    mine, counts = team.share(rows)
    batch = collate([examples[index] for index in mine], PADDING)
    return batch if counts else replace(batch, label_tokens=0)


def _named(rows: list[int]) -> str:
    """Row numbers for a message: all of them, as far as anybody would read them."""
    listed = ", ".join(map(str, rows[:ROWS_NAMED]))
    return f"[{listed}]" if len(rows) <= ROWS_NAMED else f"[{listed}, …] ({len(rows)} rows)"


@contextmanager
def _saying_what_is_left(out: Path) -> Iterator[None]:
    """Whatever ends the steps early, its line ends with the last good checkpoint."""
    try:
        yield
    except StoppedError:
        raise
    except MiniloraError as error:
        raise type(error)(f"{error}; {last_checkpoint(out)}") from error
    except (MemoryError, RuntimeError) as error:
        reason = memory_reason(error)
        if reason is None:
            raise
        raise MiniloraError(f"out of memory ({reason}): {TO_TAKE_LESS}; {last_checkpoint(out)}") from error
