#!/usr/bin/env python3
"""Break the package on purpose, one line at a time, and see the tests notice.

    python scripts/mutate.py                    # every mutation, some minutes on two cores; exit code 1 if one survives
    python scripts/mutate.py --only nibble loss # those whose name holds one of the words

Each mutation is a mistake that people make: swapped nibbles, a lost offset, alpha without 1/r, a mask off by one.  It is made
in a copy of the project, and the tests that guard the line are run there; at least one of them must fail, and fail by its own
assertion or error, not because the copy cannot be imported.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """`before` stands exactly once in `file` and becomes `after`; `tests` are the files that should notice."""

    name: str
    file: str
    before: str
    after: str
    tests: str


REFERENCE, NF4, CODEBOOKS = "kernels/reference.py", "quant/nf4.py", "quant/codebooks.py"
LORA, LAYER, MERGE, ADAMW = "layers/lora.py", "layers/nf4_linear.py", "layers/merge.py", "optim/adamw.py"
MODEL, MASKS = "llama/model.py", "llama/masks.py"
LOSS, STEPPING = "loss.py", "stepping.py"
SAVED, FILES = "run_checkpoints.py", "files.py"
SAFETY_TESTS = "tests/test_kills.py tests/test_safety.py"
PAGER, PAGED, STARTS = "optim/paged.py", "optim/paged_adamw.py", "layers/starts.py"
PROMPTS, BATCHES, TRIE, BNB = "data/prompts.py", "data/batches.py", "trie.py", "llama/bnb_format.py"
BLOCKS, VECTORS, BLOCK = "kernels/nf4_blocks.h", "kernels/nf4_vectors.h", "kernels/block_attention.cpp"
FRUGAL = "llama/frugal.py"
KERNEL_TESTS, BLOCK_TESTS = "tests/kernels/test_equal_bits.py", "tests/kernels/test_block.py"
DECAY = "    if weight_decay:\n        param.mul_(1 - lr * weight_decay)\n"
STEP = """    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = lr / (1 - beta1 ** step)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2 ** step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-step_size)
"""
QUANT_TESTS = "tests/quant tests/test_testing.py"
LLAMA_TESTS = "tests/llama/test_model.py tests/peers/test_transformers_logits.py"
DECODING_TESTS = "tests/llama/test_decoding.py"
LORA_TESTS = "tests/layers tests/test_testing.py"
TRAIN_TESTS = "tests/test_train.py tests/test_testing.py"

MUTATIONS = (
    Mutation("nibble order when packing", REFERENCE, "codes_n[0::2] << 4 | codes_n[1::2]", "codes_n[1::2] << 4 | codes_n[0::2]",
             QUANT_TESTS),
    Mutation("nibble order when unpacking", REFERENCE, "(packed >> 4, packed & 15)", "(packed & 15, packed >> 4)", QUANT_TESTS),
    Mutation("nibble order when dequantizing", REFERENCE, "(code.repeat_interleave(16), code.repeat(16))",
             "(code.repeat(16), code.repeat_interleave(16))", QUANT_TESTS),
    Mutation("a tie goes up", REFERENCE, "out_int32=True, right=False", "out_int32=True, right=True", QUANT_TESTS),
    Mutation("absmax without abs", REFERENCE, "x_NS.abs().amax(dim=1)", "x_NS.amax(dim=1)", QUANT_TESTS),
    Mutation("scaling stops early", REFERENCE, "SMALLEST_SCALED_ABSMAX = 1e-38", "SMALLEST_SCALED_ABSMAX = 1e-30", QUANT_TESTS),
    Mutation("an odd count padded with code 0", NF4, "padding=NF4_ZERO", "padding=0", QUANT_TESTS),
    Mutation("double quantization without offset", NF4, "quantize_blockwise(absmax - offset,", "quantize_blockwise(absmax,",
             QUANT_TESTS),
    Mutation("offset not added back", NF4, "DYNAMIC_8BIT, self.blocksize) + self.offset", "DYNAMIC_8BIT, self.blocksize)",
             QUANT_TESTS),
    Mutation("offset is the largest constant", NF4, "offset = absmax.mean()", "offset = absmax.max()", QUANT_TESTS),
    Mutation("128 constants to a nested block", NF4, "NESTED_BLOCKSIZE = 256", "NESTED_BLOCKSIZE = 128", QUANT_TESTS),
    Mutation("a wrong level", CODEBOOKS, "0.07958029955625534", "0.0760", QUANT_TESTS),
    Mutation("the quantiles' offset is 0.9677", CODEBOOKS, "NF4_OFFSET = 0.9677083", "NF4_OFFSET = 0.9677", QUANT_TESTS),
    Mutation("the dynamic map starts a decade late", CODEBOOKS, "10.0 ** exponent * (", "10.0 ** (exponent - 1) * (",
                                                                                                                   QUANT_TESTS),
    Mutation("nested offset not written", BNB, '"nested_offset": weight.nested.offset}', '"nested_offset": 0.0}',
             "tests/llama/test_bnb_format.py tests/peers/test_bnb_checkpoint.py"),
    Mutation("scaling is alpha", LORA, "self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)", "self.alpha",
             LORA_TESTS),
    Mutation("rsLoRA scales like LoRA", LORA, "math.sqrt(self.r) if self.use_rslora else self.r", "self.r",
             "tests/layers tests/peers/test_peft.py"),
    Mutation("B starts like A", LORA, "self.lora_B.weight.zero_()", "nn.init.kaiming_uniform_(self.lora_B.weight)", LORA_TESTS),
    Mutation("A starts at zero too", LORA, "self.lora_A.weight.copy_(initial)", "self.lora_A.weight.zero_()", LORA_TESTS),
    Mutation("dropout on the base as well", LORA, "y = self.base_layer(x)",
             "y = self.base_layer(F.dropout(x, self.dropout, self.training))", LORA_TESTS),
    Mutation("dropout in evaluation", LORA, "F.dropout(x, self.dropout, self.training)", "F.dropout(x, self.dropout, True)",
             LORA_TESTS),
    Mutation("DoRA without normalization", LORA, "rescale = self.lora_magnitude_vector / norms.clamp(min=SMALLEST_NORM)",
             "rescale = self.lora_magnitude_vector", "tests/layers tests/peers/test_peft.py"),
    Mutation("DoRA's lengths rounded before 1 is taken off", LORA, "return (y + (rescale - 1) * base",
             "rescale = rescale.to(x.dtype); return (y + (rescale - 1) * base", "tests/layers/test_lora.py"),
    Mutation("backward through another weight", LAYER, "return dense.matmul(x, rebuilt) if transposed",
             "return dense.matmul(x, rebuilt.abs()) if transposed", LORA_TESTS),
    Mutation("a dense copy kept for backward", LAYER, "        ctx.weight, ctx.transposed = weight, transposed\n",
             "        ctx.weight, ctx.transposed, ctx.dense = weight, transposed, weight.dequantize(x.dtype)\n",
             "tests/layers"),
    Mutation("the shared buffer saved for a second derivative", LAYER,
             "NF4Product.apply(grad_y, ctx.weight, None, not ctx.transposed) if",
             "grad_y @ _rebuilt(ctx.weight, grad_y.dtype) if", "tests/layers/test_scratch.py"),
    Mutation("one buffer for all threads", "layers/scratch.py", "_local = threading.local()",
             "_local = type('Shared', (), {})()", "tests/layers/test_scratch.py"),
    Mutation("vector code: a tie goes up", "kernels/nf4_quantize.h",
             "return index + ((Words)(value > (Floats)lookup(midpoints, index)) & 1);",
             "return index + ((Words)(value >= (Floats)lookup(midpoints, index)) & 1);", KERNEL_TESTS),
    Mutation("vector code: absmax with one rounding", "kernels/build.py", "-ffp-contract=off", "-ffp-contract=fast",
             KERNEL_TESTS),
    Mutation("vector code: nibbles swapped in a block's tail", BLOCKS, "(T)entry(table, packed[first / 2] >> 4);\n        *",
             "(T)entry(table, packed[first / 2] & 15);\n        *", KERNEL_TESTS),
    Mutation("vector code: halves are cut, not rounded", VECTORS, "rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
             "rounded = bits >> 16;", KERNEL_TESTS),
    Mutation("vector code: a product's nibbles swapped", VECTORS, "    even = lookup(table, byte >> 4);",
             "    even = lookup(table, byte);", "tests/kernels/test_product.py"),
    Mutation("vector code: one row meets rounded weights", "kernels/nf4_product.cpp",
             "else if (rows == 1) one_short_row(p);", "", "tests/kernels/test_product.py"),
    Mutation("vector code: turned codes in the order of their bytes", "kernels/nf4_turned.h", ">> 4 * (c ^ 1)", ">> 4 * c",
             "tests/kernels/test_product.py"),
    Mutation("vector code: a gradient's last row of W is left out", "kernels/nf4_turned.h",
             "there = smaller(A_STEP, rows - at);", "there = smaller(A_STEP, rows - 1 - at);", "tests/kernels/test_product.py"),
    Mutation("vector code: one row's numbers are of any size", "kernels/nf4_one_row.h",
             "if (largest(wrong & 1)) return false;", "", "tests/kernels/test_product.py"),
    Mutation("vector code: a key's first row is left out", BLOCK, "const int from = i == j ? c0 : 0;",
             "const int from = i == j ? c0 + 1 : 0;", BLOCK_TESTS),
    Mutation("decoding: a token does not see itself", "kernels/block_token.h", "                        t.past + 1, d,",
             "                        t.past, d,", DECODING_TESTS),
    Mutation("decoding: an update without alpha / r", "kernels/block_token.h", "widen(low + i) * all(l.scaling)",
             "widen(low + i)", DECODING_TESTS),
    Mutation("decoding: biases forgotten beside an update", "kernels/block_token.h", "l.bias && i <", "false && i <",
             DECODING_TESTS),
    Mutation("decoding: an adapter that is switched off", "llama/decoding.py", "        if layer.active:\n",
             "        if layer is not None:\n", DECODING_TESTS),
    Mutation("update's gradient without alpha / r", "layers/low_rank.py", ".mul_(ctx.scaling)  ", "  ", "tests/layers"),
    Mutation("update's share of the gradient forgotten", "layers/low_rank.py",
             "                dense.addmm_(grad_x.view(-1, x.shape[-1]), grad_low, share).view_as(x)", "                grad_x",
             "tests/layers"),
    Mutation("an MLP's rows in another order", "llama/recompute.py",
             "for part in flat.split(rows)])", "for part in flat.split(rows)][::-1])", "tests/llama/test_recompute.py"),
    Mutation("what is offloaded is no copy", "llama/recompute.py", "_hold(_on_host(x) if on_host else x)", "_hold(x)",
             "tests/llama/test_recompute.py"),
    Mutation("recomputed with other dropout", "llama/recompute.py", "            torch.set_rng_state(self.cpu_random)\n", "",
             "tests/llama/test_recompute.py"),
    Mutation("merging subtracts", LORA, ".float() + self.update()\n", ".float() - self.update()\n", LORA_TESTS),
    Mutation("merge error measured against itself", MERGE, "error, update, kept = (merged - trained).norm()",
             "error, update, kept = (merged - merged).norm()", "tests/layers/test_merge.py"),
    Mutation("rotary with the other sign", FRUGAL, "rotated[..., :half].sub_(", "rotated[..., :half].add_(", LLAMA_TESTS),
    Mutation("rotary of interleaved pairs", FRUGAL, "rotated[..., half:].add_(x[..., :half]",
             "rotated[..., half:].add_(x[..., ::2]", LLAMA_TESTS),
    Mutation("RMSNorm without the mean", FRUGAL, "(x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to",
             "(x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + eps)).to", LLAMA_TESTS),
    Mutation("attention sees the future", FRUGAL, "causal, shared = mask is None and q.shape[2] > 1,",
             "causal, shared = False,", LLAMA_TESTS),
    Mutation("a window one token wide of the mark", MASKS, "columns > rows - window", "columns >= rows - window", LLAMA_TESTS),
    Mutation("padding is attended to", MASKS, "visible & attention_mask[:, None, None, :].bool() | (columns == rows)",
             "visible",
             LLAMA_TESTS),
    Mutation("SwiGLU gates with the other half", MODEL, "swiglu(self.gate_proj(x), self.up_proj(x))",
             "swiglu(self.up_proj(x), self.gate_proj(x))", LLAMA_TESTS),
    Mutation("loss not shifted", LOSS, "targets = batch.labels[:, 1:]", "targets = batch.labels[:, :-1]", TRAIN_TESTS),
    Mutation("mean of micro-batch means", STEPPING, "part = label_loss(model, batch) / over if",
             "part = label_loss(model, batch) / batch.label_tokens / len(batches) if", TRAIN_TESTS),
    Mutation("a checkpoint's hashes not compared", SAVED, "            _verify(path)\n", "", "tests/test_safety.py"),
    Mutation("metrics of steps done again stay", SAVED, "            cut_metrics(folder, position.metrics_bytes)\n", "",
             SAFETY_TESTS),
    Mutation("the mean over processes of what is divided already", "integrations/distributed.py", "        self._sum(flat)\n",
             "        self._sum(flat.div_(dist.get_world_size()))\n", "tests/test_distributed.py"),
    Mutation("random state not restored", SAVED, "    set_random_state(rest)\n", "", SAFETY_TESTS),
    Mutation("only the newest checkpoint kept", SAVED, "KEPT = 2", "KEPT = 1", "tests/test_safety.py tests/test_train.py"),
    Mutation("a checkpoint written in its own place", FILES,
             "temporary = Path(tempfile.mkdtemp(prefix=f\"{TEMPORARY}{final.name}-\", dir=final.parent))",
             "temporary = final; temporary.mkdir(exist_ok=True)", SAFETY_TESTS),
    Mutation("a lock that nobody takes", "locks.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
             "tests/test_safety.py"),
    Mutation("a signal that does not save", "train.py", "due = stopping or step == total or (", "due = step == total or (",
             "tests/test_safety.py"),
    Mutation("a folder that is made again", SAVED, "checkpoints.mkdir(exist_ok=True)",
             "checkpoints.mkdir(parents=True, exist_ok=True)", "tests/test_safety.py"),
    Mutation("old checkpoints of an overwritten run stay", "runs.py", "    if (folder / CHECKPOINTS).exists():\n",
             "    if False:\n", SAFETY_TESTS),
    Mutation("loss on the prompt", PROMPTS, "labels=[IGNORED] * len(prompt.input_ids) + answer",
             "labels=prompt.input_ids + answer", "tests/data tests/test_train.py"),
    Mutation("no end token", PROMPTS, "return [*tokenizer.encode(label, bos=False), tokenizer.eos_id]",
             "return [*tokenizer.encode(label, bos=False)]", "tests/data tests/test_trie.py"),
    Mutation("a begin token before the label", PROMPTS, "return [*tokenizer.encode(label, bos=False), tokenizer.eos_id]",
             "return [*tokenizer.encode(label, bos=True), tokenizer.eos_id]", "tests/data tests/test_trie.py"),
    Mutation("padding carries loss", BATCHES, "labels = torch.full_like(input_ids, IGNORED)",
             "labels = torch.zeros_like(input_ids)",
             "tests/data tests/test_testing.py"),
    Mutation("the same order every epoch", BATCHES, "np.random.SeedSequence([seed, epoch])", "np.random.SeedSequence([seed])",
             "tests/data"),
    Mutation("decay after the step", ADAMW, DECAY + STEP, STEP + DECAY, "tests/optim tests/test_testing.py"),
    Mutation("epsilon inside the root's correction", ADAMW, ".div_(math.sqrt(1 - beta2 ** step)).add_(eps)",
             ".add_(eps).div_(math.sqrt(1 - beta2 ** step))", "tests/optim tests/test_testing.py"),
    Mutation("no bias correction", ADAMW, "step_size = lr / (1 - beta1 ** step)", "step_size = lr",
             "tests/optim tests/test_testing.py"),
    Mutation("a signed map for the second moment", ADAMW, "(exp_avg_sq, DYNAMIC_8BIT_UNSIGNED, self",
             "(exp_avg_sq, DYNAMIC_8BIT, self", "tests/optim"),
    Mutation("a changed page is not written back", PAGER, "            self._dirty.add(page)\n", "            pass\n",
             "tests/optim"),
    Mutation("the page in use is put out", PAGER, "        self._resident.move_to_end(page)\n", "", "tests/optim"),
    Mutation("pages that wait are put out", PAGED, "self.pager.most_frames // 2)", "PAGES_TOGETHER)", "tests/optim"),
    Mutation("the first of many tensors is updated alone", ADAMW, "torch._foreach_copy_(tensors, [",
             "torch._foreach_copy_(tensors[:1], [", "tests/optim"),
    Mutation("moments begin where another's end", PAGED, "            self.filled += stop - start\n",
             "            self.filled += stop - start - 1\n", "tests/optim"),
    Mutation("a parameter without gradient ages", PAGED, "for param in groups:\n            self._steps",
             "for param in self._parameters():\n            self._steps", "tests/optim"),
    Mutation("PiSSA over the whole weight", STARTS, "return weight - left @ right, left, right", "return weight, left, right",
             "tests/layers/test_starts.py"),
    Mutation("LoftQ fits the weight, not what was lost", STARTS,
             "        left, right = low_rank(weight - quantize(rest), r)\n    return",
             "        left, right = low_rank(weight, r)\n    return", "tests/layers/test_starts.py"),
    Mutation("a start that forgets the scaling", STARTS, "left / math.sqrt(layer.scaling))", "left)",
             "tests/layers/test_starts.py"),
    Mutation("LoRA+ speeds up A", STEPPING, 'if name.endswith("lora_B.weight")]\n    rest',
             'if name.endswith("lora_A.weight")]\n    rest', "tests/test_own_base.py"),
    Mutation("a cosine that ends at the last step", STEPPING, "/ (total - rising + 1)))", "/ (total - rising)))",
    "tests/test_train.py"),
    Mutation("a label wins by its first token", TRIE, "for depth in range(trie.longest):", "for depth in range(1):",
             "tests/test_trie.py"),
    Mutation("what is read is overwritten", FILES, "if place in (read.resolve(), *read.resolve().parents):",
             "if place == read.resolve():", "tests/test_files.py tests/test_overwrite.py"),
    Mutation("somebody's files are overwritten", FILES, "if not is_leftover(inner) and not any(", "if False and not any(",
             "tests/test_files.py tests/test_overwrite.py"),
    Mutation("8-bit moments meet a gradient that they cannot hold", PAGED, "(torch.stack(sizes) < LARGEST_8BIT).all()",
             "(torch.stack(sizes) < torch.inf).all()", "tests/optim/test_paged_adamw.py"),
    Mutation("a merge writes infinities", MERGE, "if not bool(weight.isfinite().all()):", "if False:",
             "tests/layers/test_merge.py"),
    Mutation("decoding goes on from a NaN", "generate.py", "if not bool(logits.gather(", "if False and not bool(logits.gather(",
             "tests/test_generate.py"),
    Mutation("trie nodes see their siblings", TRIE, 'visible = torch.eye(len(nodes), dtype=torch.bool, device="cpu")',
             "visible = torch.ones(len(nodes), len(nodes), dtype=torch.bool).tril()", "tests/test_trie.py"),
    Mutation("forest: a prompt forgets what it shares", "forest.py", "np.concatenate((rows[:same], own)), total",
             "np.concatenate((rows[same:same], own)), total", "tests/test_forest.py"),
    Mutation("forest: a node does not see its ancestors", "llama/trees.py", "keys[length:][self.visible[node]]",
             "keys[length:][node : node + 1]", "tests/kernels/test_trees.py"),
    Mutation("new tokens: a pair is counted once a word", "llama/new_tokens.py", "found[pair] += counts[at]",
             "found[pair] = counts[at]", "tests/llama/test_new_tokens.py"),
    Mutation("new tokens: a row starts as one piece's", "llama/new_tokens.py", "table[ids].float().mean(0) if ids",
             "table[ids[0]].float() if ids", "tests/llama/test_new_tokens.py"),
)


def run(mutation: Mutation, work: Path) -> tuple[bool, str]:
    """Make the mistake in `work`, run the tests there, take it back; whether a test noticed, and the first that did."""
    path = work / "minilora" / mutation.file
    source = path.read_text()
    if source.count(mutation.before) != 1:
        raise SystemExit(f"{mutation.name}: the line stands {source.count(mutation.before)} times in {mutation.file}")
    path.write_text(source.replace(mutation.before, mutation.after))
    try:
        # The reference is what is broken here, so it must be what runs; tests/kernels hold the vector code against it.
        environment = {**os.environ, "PYTHONPATH": str(work), "PYTHONDONTWRITEBYTECODE": "1", "MINILORA_KERNELS": "reference"}
        imports = subprocess.run([sys.executable, "-c", "import minilora.cli, minilora.demo; print(minilora.cli.__file__)"],
                                 cwd=work, env=environment, capture_output=True, text=True, check=False)
        if imports.returncode or not imports.stdout.startswith(str(work)):
            raise SystemExit(f"{mutation.name}: the copy cannot be imported: {imports.stderr[-300:]}")
        tests = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no",
                                *mutation.tests.split()], cwd=work, env=environment, capture_output=True, text=True,
                                check=False)
    finally:
        path.write_text(source)
    first = next((line.split(" - ")[0].removeprefix("FAILED ") for line in tests.stdout.splitlines()
                  if line.startswith("FAILED ")), "")
    return tests.returncode == 1 and bool(first), first


def main() -> int:
    """Run the mutations and print the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="mutations whose name holds one of these")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if not args.only or any(word.lower() in m.name.lower() for word in args.only)]
    results, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for part in ("minilora", "tests", "scripts", "pyproject.toml", "README.md"):
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, work / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, work / part)
        for mutation in chosen:
            caught, first = run(mutation, work)
            results.append({"name": mutation.name, "file": mutation.file, "caught": caught, "first_test": first})
            print(f"{'caught  ' if caught else 'SURVIVED'} {mutation.name}: {first}", flush=True)
    score = sum(bool(result["caught"]) for result in results)
    print(f"{score} of {len(results)} mutations caught in {time.perf_counter() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if score == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
