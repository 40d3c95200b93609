#!/usr/bin/env python3
"""What 4 bits cost, and what a bag of words reaches: the README's table of results.

    python scripts/compare_bases.py --out compare-out        # some ten minutes on two cores; needs the extra [baseline]

Every row sees the same synthetic notes, and the test split is scored once a row with nothing tuned on it.  The language
models are the shipped one, fine-tuned with the demo's settings over three forms of its frozen weights: 16-bit (plain
LoRA), NF4, and NF4 with double-quantized constants.  Perplexity is that of the untouched base on text of its own kind
that it never saw: what quantization alone does.
"""
from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any, Literal

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

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
from minilora.predict import Prediction, Predictor
from minilora.score import predict_all, score_predictions
from minilora.train import train, validation_loss

BASES: dict[str, tuple[Literal["none", "nf4"], bool]] = {
    "LoRA on 16-bit weights": ("none", False), "QLoRA, NF4": ("nf4", False), "QLoRA, NF4 + double quantization": ("nf4", True)}
HELD_OUT_SEED = 2       # of the documents for the perplexity; pretraining saw those of another seed


def bits_per_weight(model: LlamaForCausalLM) -> float:
    """Storage of the blocks' linears, in bits a weight."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    return layers[0].quantized.bits_per_param if layers else 16.0


def bag_of_words(data: Path) -> tuple[list[str], list[float]]:
    """TF-IDF over words and pairs, then logistic regression; its strength is chosen on the validation split."""
    tables = {split: read_table(data / f"{split}.csv", "note", "label").rows for split in ("train", "val", "test")}
    texts = {split: [row.text for row in rows] for split, rows in tables.items()}
    labels = {split: [row.label for row in rows] for split, rows in tables.items()}
    fitted = []
    for pairs, strength in itertools.product((1, 2), (10.0, 100.0)):
        model = make_pipeline(TfidfVectorizer(ngram_range=(1, pairs), sublinear_tf=True, min_df=2),
                              LogisticRegression(C=strength, max_iter=300))
        model.fit(texts["train"], labels["train"])
        fitted.append((model.score(texts["val"], labels["val"]), model))
    best = max(fitted, key=lambda entry: entry[0])[1]
    return list(best.predict(texts["test"])), best.predict_proba(texts["test"]).max(axis=1).tolist()


def main() -> None:
    """Train and score each row; write results.json and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("compare-out"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of adapters and order; the data stay the same")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    check_output(args.out, args.overwrite)
    data = args.out / "data"
    write_dataset(data, n=NOTES, seed=0, overwrite=args.overwrite)
    test = read_table(data / "test.csv", "note", "label").rows
    references = [row.label or "" for row in test]
    texts = list(documents(seed=HELD_OUT_SEED, n=1000))

    results: list[dict[str, Any]] = []

    def record(name: str, scores: Evaluation, **more: Any) -> None:
        low, high = scores.intervals["exact_match"]
        results.append({"name": name, "exact_match": scores.exact_match, "low": low, "high": high, "macro_f1": scores.macro_f1,
                        "cosine": scores.cosine, **more})

    for name, (quantize, double_quant) in BASES.items():
        for seed in args.seeds:
            run = args.out / f"run-{quantize}-{'dq' if double_quant else 'plain'}-{seed}"
            result = train(TrainConfig(**SETTINGS, data=str(data / "train.csv"), val=str(data / "val.csv"), out=str(run),
                                       seed=seed, quantize=quantize, double_quant=double_quant, overwrite=args.overwrite))
            predictor = Predictor.load("tiny", adapter=run)
            scores = score_predictions(predictor, predict_all(predictor, [row.text for row in test]), references)
            with base_only(predictor.model):
                surprise = validation_loss(predictor.model, encode_documents(predictor.tokenizer, texts), batch_size=16)
            record(name, scores, seed=seed, bits=bits_per_weight(predictor.model), perplexity=math.exp(surprise),
                   val_loss=result.val_loss, seconds=round(result.seconds))
    chosen, chances = bag_of_words(data)
    answers = [Prediction(label, chance) for label, chance in zip(chosen, chances, strict=True)]
    record("TF-IDF + logistic regression", score_predictions(predictor, answers, references))

    write_json(args.out / "results.json", results)
    print("| trained on the same notes | bits a weight | perplexity of the base | exact match | macro-F1 | cosine |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in results:
        storage = f"{row['bits']:.3f} | {row['perplexity']:.3f}" if "bits" in row else "|"
        print(f"| {row['name']} | {storage} | {row['exact_match']:.1%} [{row['low']:.1%}, {row['high']:.1%}] "
              f"| {row['macro_f1']:.3f} | {row['cosine']:.3f} |")


if __name__ == "__main__":
    main()
