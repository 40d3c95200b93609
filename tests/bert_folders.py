"""Small random BERT folders in sentence-transformers' layout."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

CONFIG: dict[str, Any] = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
                          "intermediate_size": 40, "vocab_size": 60, "max_position_embeddings": 32, "type_vocab_size": 2,
                          "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ct", "mri", "knee", "brain", "abdomen", "w", "wo", "contrast", "left", "##s"]


def random_state(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of every name that transformers' BertModel has, the pooler's among them."""
    generator = torch.Generator().manual_seed(seed)
    d, w = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], d),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], d),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], d), "pooler.dense.weight": (d, d),
        "pooler.dense.bias": (d,), "embeddings.LayerNorm.weight": (d,), "embeddings.LayerNorm.bias": (d,)}
    for layer in (f"encoder.layer.{number}." for number in range(config["num_hidden_layers"])):
        for name, shape in {"attention.self.query": (d, d), "attention.self.key": (d, d), "attention.self.value": (d, d),
                            "attention.output.dense": (d, d), "attention.output.LayerNorm": (d,), "intermediate.dense": (w, d),
                            "output.dense": (d, w), "output.LayerNorm": (d,)}.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    return {name: torch.randn(shape, generator=generator) * 0.4 + (1.0 if name.endswith("LayerNorm.weight") else 0.0)
            for name, shape in shapes.items()}


def write_bert(folder: Path, state: dict[str, torch.Tensor] | None = None, bin: bool = False, pooling: str | None = "mean",
               longest: int | None = None, lower: bool = False, **changes: Any) -> Path:
    """A folder with config.json, weights, tokenizer.json and, where asked for, sentence-transformers' own files.

    Args: pooling: "mean", "cls" or "max"; None leaves modules.json and 1_Pooling out. longest: max_seq_length.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(config))
    tensors = state if state is not None else random_state(config)
    if bin:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.enable_padding(length=16)         # as all-MiniLM-L6-v2's file does
    tokenizer.enable_truncation(8)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]",
        "unk_token": "[UNK]", "model_max_length": 512}))
    if pooling is not None:
        (folder / "modules.json").write_text(json.dumps([
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({
            "word_embedding_dimension": config["hidden_size"], "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_max_tokens": pooling == "max",
            "pooling_mode_mean_sqrt_len_tokens": False}))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest, "do_lower_case": lower}))
    return folder
