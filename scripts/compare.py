#!/usr/bin/env python3
"""What 4 bits cost, what variants of LoRA change, and what a bag of words reaches: the README's tables of results.

    python scripts/compare.py --out compare-out        # half an hour on two cores; needs the extra [baseline]

Every row sees the same synthetic notes, and the test split is scored once a row with nothing tuned on it; p is McNemar's.  The
language models are the shipped one, fine-tuned with the demo's settings over three forms of its frozen weights: 16-bit (plain
LoRA), NF4, and NF4 with double-quantized constants; then over the last with one thing changed at a time.  Perplexity is that
of the untouched base on text of its own kind that it never saw: what quantization alone does.
"""
from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

from minilora.baseline import NAME, bag_of_words
from minilora.compare import p_text
from minilora.config import TrainConfig
from minilora.data.radiology import write_dataset
from minilora.data.radiology.corpus import documents, encode_documents
from minilora.data.tables import read_table
from minilora.demo import NOTES, SETTINGS
from minilora.evaluate import Evaluation
from minilora.files import check_output, write_json
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import base_only
from minilora.llama.model import LlamaForCausalLM
from minilora.loss import validation_loss
from minilora.predict import Prediction, Predictor
from minilora.score import predict_all, score_predictions
from minilora.train import train

DEMO = "QLoRA, NF4 + double quantization"
BASES: dict[str, dict[str, Any]] = {
    "LoRA on 16-bit weights": {"quantize": "none"}, "QLoRA, NF4": {"double_quant": False}, DEMO: {}}
VARIANTS: dict[str, dict[str, Any]] = {
    "rsLoRA (alpha 32: four times the update)": {"use_rslora": True}, "DoRA": {"use_dora": True},
    "LoRA+ (A at half the rate, B at twice)": {"lr": SETTINGS["lr"] / 2, "loraplus_lr_ratio": 4.0},
    "PiSSA": {"init_lora_weights": "pissa"}, "LoftQ": {"init_lora_weights": "loftq"}}
BAG_OF_WORDS = "TF-IDF + logistic regression"
HELD_OUT_SEED = 2       # of the documents for the perplexity; pretraining saw those of another seed


def bits_per_weight(model: LlamaForCausalLM) -> float:
    """Storage of the blocks' linears, in bits a weight."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    return layers[0].quantized.bits_per_param if layers else 16.0


def row(name: str, scores: Evaluation, **more: Any) -> dict[str, Any]:
    """A row of results.json."""
    low, high = scores.intervals["exact_match"]
    found = scores.comparisons.get(NAME)
    return {"name": name, "exact_match": scores.exact_match, "low": low, "high": high, "macro_f1": scores.macro_f1,
            "cosine": scores.cosine, "p": p_text(found.p_value) if found else "", "cost": scores.clinical.cost, **more}


def table(results: list[dict[str, Any]], first: str, extra: dict[str, str]) -> None:
    """Print rows as Markdown; `extra` are columns before the scores: heading -> format of the row."""
    print("| " + " | ".join([first, *extra, "exact match", "macro-F1", "cosine", "p against the bag of words"]) + " |")
    print("| --- " * (len(extra) + 5) + "|")
    for entry in results:
        more = [text.format(**entry) if "seconds" in entry else "" for text in extra.values()]
        print("| " + " | ".join([entry["name"], *more, "{exact_match:.1%} [{low:.1%}, {high:.1%}]".format(**entry),
                                 "{macro_f1:.3f}".format(**entry), "{cosine:.3f}".format(**entry), entry["p"]]) + " |")


def main() -> None:
    """Train and score each row; write results.json after each, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("compare-out"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of adapters and order; the data stay the same")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    check_output(args.out, args.overwrite)
    data = args.out / "data"
    write_dataset(data, n=NOTES, seed=0, overwrite=args.overwrite)
    pairs = {split: [(entry.text, entry.label or "") for entry in read_table(data / f"{split}.csv", "note", "label").rows]
             for split in ("train", "val", "test")}
    notes, references = [note for note, _ in pairs["test"]], [label for _, label in pairs["test"]]
    chosen, chances = bag_of_words(pairs["train"], notes, pairs["val"])
    texts = list(documents(seed=HELD_OUT_SEED, n=1000))

    results: list[dict[str, Any]] = []
    for index, ((name, changed), seed) in enumerate(itertools.product((BASES | VARIANTS).items(), args.seeds)):
        run = args.out / f"run-{index}"
        result = train(TrainConfig(**{**SETTINGS, **changed}, data=str(data / "train.csv"), val=str(data / "val.csv"),
                                   out=str(run), seed=seed, overwrite=args.overwrite))
        predictor = Predictor.load("tiny", adapter=run)
        scores = score_predictions(predictor, predict_all(predictor, notes), references, others={NAME: chosen})
        with base_only(predictor.model):
            surprise = validation_loss(predictor.model, encode_documents(predictor.tokenizer, texts), batch_size=16)
        results.append(row(name, scores, seed=seed, bits=bits_per_weight(predictor.model), perplexity=math.exp(surprise),
                           val_loss=result.val_loss, seconds=result.seconds))
        write_json(args.out / "results.json", results)
    answers = [Prediction(label, chance) for label, chance in zip(chosen, chances, strict=True)]
    results.append(row(BAG_OF_WORDS, score_predictions(predictor, answers, references)))
    write_json(args.out / "results.json", results)

    table([entry for entry in results if entry["name"] in (*BASES, BAG_OF_WORDS)], "trained on the same notes",
          {"bits a weight": "{bits:.3f}", "perplexity of the base": "{perplexity:.3f}"})
    print()
    table([entry for entry in results if entry["name"] in (DEMO, *VARIANTS)], "one change at a time",
          {"validation loss": "{val_loss:.3f}"})


if __name__ == "__main__":
    main()
