"""Small random checkpoints with a tokenizer, in Hugging Face's layout, for tests that need a whole model folder."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minilora.llama.config import LlamaConfig
from minilora.llama.model import LlamaForCausalLM

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258, "torch_dtype": "float32",
}


def byte_tokenizer() -> Tokenizer:
    """One token a byte, then <s>, </s>, <pad>: no merges, so a test can count tokens by counting bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return tokenizer


def write_model(folder: Path, seed: int = 0, std: float = 0.05, **overrides: Any) -> Path:
    """A random Llama of some 100,000 parameters; `overrides` change its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {**SHAPE, **overrides}
    (folder / "config.json").write_text(json.dumps(raw))
    model = LlamaForCausalLM(LlamaConfig.from_dict(raw))
    model.init_weights(torch.Generator().manual_seed(seed), std)
    state = {name: tensor for name, tensor in model.state_dict().items()
             if not (raw["tie_word_embeddings"] and name == "lm_head.weight")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
