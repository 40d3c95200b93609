"""The main job on what ships: base scores, QLoRA training, scores after, the worked example.

Everything is made here and now: data by its seed, the adapter by training.  The test split is looked at twice, before and
after, with the same decoding; nothing is tuned on it.
"""
from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from minilora.config import TrainConfig
from minilora.data.radiology import PROTOCOLS, RULES, labels, write_dataset
from minilora.data.radiology.notes import WORKED_EXAMPLE
from minilora.data.tables import read_table, write_labels
from minilora.evaluate import Evaluation, format_table
from minilora.files import Kind, check_output, write_json
from minilora.layers.nf4_linear import NF4Linear
from minilora.plots import draw_demo
from minilora.predict import Predictor
from minilora.score import read_beside, score_table
from minilora.train import train

NOTES = 20_000
KIND = Kind("data/train.csv", ("data", "run", "before", "after", "before.json", "after.json", "demo.png"))
SETTINGS: dict[str, Any] = {"model": "tiny", "input_column": "note", "label_column": "label", "max_length": 256,
                            "template": "tiny", "epochs": 1, "batch_size": 16, "lr": 2e-3}
EXPECTED = "CT Abdomen W Contrast"


def _score(predictor: Predictor, data: Path, out: Path, quiet: bool) -> Evaluation:
    """Scores in `out`.json; in the folder `out` the same, with every answer."""
    test, train = data / "test.csv", data / "train.csv"
    beside = read_beside(read_table(test, "note", "label"), train=(train, "note", "label"))
    evaluation = score_table(predictor, test, "note", "label", out, quiet=quiet, beside=beside)
    write_json(out.with_suffix(".json"), evaluation.to_dict())
    return evaluation


def _line(name: str, scores: Evaluation) -> str:
    low, high = scores.intervals["exact_match"]
    return (f"{name:<12} exact {scores.exact_match:6.1%}  [{low:.1%}, {high:.1%}]   macro-F1 {scores.macro_f1:.3f}   "
            f"cosine {scores.cosine:.3f}")


def demo(out: str | Path = "demo-out", seed: int = 0, overwrite: bool = False, quiet: bool = False) -> Path:
    """Run the demo; scores, run folder and picture stand in `out`.

    Raises: OutputError: `out` exists, and is no earlier demo to be overwritten.
    """
    out, started = Path(out), time.perf_counter()
    check_output(out, overwrite, kind=KIND)
    if out.is_dir():
        shutil.rmtree(out)
    print("1. Data: order notes and protocol labels, written from clinical rules")
    counts = write_dataset(out / "data", n=NOTES, seed=seed)
    print(f"   {counts['train']:,} notes to train on, {counts['val']:,} to watch, {counts['test']:,} to test, in phrasings "
          f"that training never saw; {len(PROTOCOLS)} protocols, {len(RULES)} rules")

    print("2. The base model, before: a small Llama that has read notes, but never which protocol one asks for")
    write_labels(out / "data" / "labels.txt", labels())
    base = Predictor.load("tiny", labels=out / "data" / "labels.txt", template=SETTINGS["template"],
                          max_length=SETTINGS["max_length"])
    layers = [module for module in base.model.modules() if isinstance(module, NF4Linear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    packed = sum(layer.quantized.nbytes for layer in layers)
    print(f"   {len(layers)} linears, {weights:,} weights in NF4 with double quantization: {packed:,} bytes, "
          f"{layers[0].quantized.bits_per_param:.3f} bits a weight (16-bit: {2 * weights:,} bytes)")
    before = _score(base, out / "data", out / "before", quiet)
    print("   " + _line("before", before))

    print("3. QLoRA: frozen 4-bit base, low-rank updates on all seven linears of each block")
    result = train(TrainConfig(**SETTINGS, data=str(out / "data" / "train.csv"), val=str(out / "data" / "val.csv"),
                               out=str(out / "run"), seed=seed, quiet=quiet))
    print(f"   {result.trained:,} of {result.parameters:,} numbers trained in {result.steps} steps and {result.seconds:.0f} s; "
          f"loss {result.loss:.3f}, validation {result.val_loss or float('nan'):.3f}")

    print("4. After: the same notes, the same decoding")
    tuned = Predictor.load("tiny", adapter=out / "run")
    after = _score(tuned, out / "data", out / "after", quiet)
    print("   " + _line("before", before))
    print("   " + _line("after", after))
    print("\n".join("   " + line for line in format_table(after).splitlines()))

    answer, = tuned.predict([WORKED_EXAMPLE])
    print(f"5. The worked example, a sentence that stands in no generated file\n   note:  {WORKED_EXAMPLE}\n"
          f"   label: {answer.label} (probability {answer.probability or 0:.2f}; right is {EXPECTED})")
    picture = draw_demo(out, before, after)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Scores, answers (before/ and after/), run folder"
          + (" and demo.png" if picture else "") + f" in {out}.")
    print(f"As a page: minilora report {out / 'run'}")
    print("The same for Meditron-7B, on your own notes (columns are named by flags):\n"
          "   minilora train --model epfl-llm/meditron-7b --data notes.csv --input-column note --label-column label \\\n"
          "                  --template inst --gradient-checkpointing --batch-size 1 --accumulate 16 --out run")
    return out
