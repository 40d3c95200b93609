"""Files for a loader that a stranger might have made: valid ones, and mutations of them that know the format.

A mutation of bytes rarely comes past a format's first check, so each kind is taken apart, changed inside, and put together
again with lengths and sums that are right: JSON by its tree, safetensors by its header, .bin by its pickle and by what torch
can pickle, SentencePiece by its fields.  Every choice comes from one `random.Random`, so a seed and a number make the same
input again.
"""
from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from minilora.llama.bnb_format import STATE, pending_nf4
from minilora.quant.nf4 import quantize_nf4

Files = dict[str, bytes]
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 4095, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64,
           10 ** 30, -(1 << 63), 0.5, -0.0, 1e-300, 1e300, 10 ** 400)
TEXTS = ("", " ", "\0", "../x", "/etc/passwd", "a/b", "..", "\ud83d", "é" * 3, "a" * 2000, "bfloat16", "float32", "nf4",
         "llama", "NaN", "1", "true", "\n", "model.safetensors", "config.json", "__metadata__", "F32", "U8", "[1]")
SHAPE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
                         "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "float32",
                         "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
CONFIGS: tuple[dict[str, Any], ...] = (
    {"model_type": "llama", **SHAPE}, {"model_type": "llama", **SHAPE, "rope_scaling": LLAMA3, "attention_bias": True},
    {"model_type": "mistral", **SHAPE, "sliding_window": 8}, {"model_type": "llama", **SHAPE, "rope_parameters": LLAMA3},
    {"model_type": "qwen2", **SHAPE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0,
     "layer_types": ["sliding_attention"]},
    {"model_type": "llama", **SHAPE, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True,
                                                             "bnb_4bit_quant_type": "nf4"}})


# Bytes


def mutate_bytes(draw: random.Random, content: bytes) -> bytes:
    """Flip, overwrite, insert, remove, repeat or cut, once or a few times."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        how = draw.randrange(7)
        if how == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[at:at + 1] = bytes([draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))])
        elif how == 2:
            number = int(draw.choice(NUMBERS[:16])) & ((1 << 64) - 1)
            width = draw.choice((2, 4, 8))
            data[at:at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, draw.choice(("little", "big")))
        elif how == 3:
            data[at:at] = draw.randbytes(draw.choice((1, 3, 40)))
        elif how == 4:
            del data[at:at + draw.choice((1, 2, 8, 100))]
        elif how == 5:
            other = draw.randrange(len(data) + 1)
            data[at:at] = data[other:other + draw.choice((1, 8, 64))]
        else:
            del data[at:]
    return bytes(data)


# JSON


def _value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return draw.choice(NUMBERS)
    if kind == 2:
        return draw.choice(TEXTS)
    if kind == 3:
        return draw.choice((None, True, False, float("nan"), float("inf"), -float("inf")))
    if kind == 4:
        return draw.randrange(100)
    if kind == 5:
        return [_value(draw, depth + 1) for _ in range(draw.choice((0, 1, 3, 50)))]
    return {draw.choice(TEXTS): _value(draw, depth + 1) for _ in range(draw.choice((0, 1, 3)))}


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        container = waiting.pop()
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            found.append((container, key))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    return found


def mutate_tree(draw: random.Random, tree: Any) -> Any:
    """Change a copy of a JSON value in a few places."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.choice((1, 1, 2, 5))):
        places = _places(tree)
        if not places:
            return _value(draw)
        container, key = draw.choice(places)
        how, value = draw.randrange(7), container[key]
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[draw.choice((*TEXTS, *container))] = container.pop(key)
        elif how == 2 and isinstance(container, dict):
            container[draw.choice(TEXTS)] = _value(draw)
        elif how == 3:
            other, place = draw.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                container[key] = json.loads(json.dumps(other[place]))
        elif how == 4 and isinstance(value, (int, float)) and not isinstance(value, bool):
            half = value / 2 if abs(value) < 1 << 60 else value
            container[key] = draw.choice((value + 1, value - 1, value * 2, -value, half))
        else:
            container[key] = _value(draw)
    return tree


def to_json(draw: random.Random, tree: Any) -> bytes:
    """The text of a JSON value; now and then with a key twice, nested too deep, in another encoding, with changed bytes."""
    text = json.dumps(tree).encode()
    how = draw.randrange(40)
    if how == 0:
        text = text.replace(b"{", b'{"hidden_size": 1, "hidden_size": 2, ', 1)
    elif how == 1:
        text = text.replace(b": ", b": " + b"[" * draw.choice((500, 100_000)), 1)
    elif how == 2:
        text = json.dumps(tree).encode(draw.choice(("utf-16", "utf-8-sig", "utf-32")))
    elif how == 3:
        text = text.replace(b": ", b": " + b"9" * draw.choice((300, 5000)), 1)
    elif how < 7:
        text = mutate_bytes(draw, text)
    return text


# The kinds of files


def config(draw: random.Random) -> Files:
    """A config.json."""
    return {"config.json": to_json(draw, mutate_tree(draw, draw.choice(CONFIGS)))}


def random_tensors(shape: dict[str, Any] = CONFIGS[0]) -> dict[str, Tensor]:
    """The weights of a model, by Hugging Face's names."""
    h, inner, rows = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    at, draw = "model.layers.0.", torch.Generator().manual_seed(0)
    sizes = {"model.embed_tokens.weight": (rows, h), "lm_head.weight": (rows, h), "model.norm.weight": (h,),
             f"{at}input_layernorm.weight": (h,), f"{at}post_attention_layernorm.weight": (h,),
             f"{at}self_attn.q_proj.weight": (h, h), f"{at}self_attn.k_proj.weight": (kv, h),
             f"{at}self_attn.v_proj.weight": (kv, h), f"{at}self_attn.o_proj.weight": (h, h),
             f"{at}mlp.gate_proj.weight": (inner, h), f"{at}mlp.up_proj.weight": (inner, h),
             f"{at}mlp.down_proj.weight": (h, inner)}
    return {name: torch.randn(size, generator=draw) for name, size in sizes.items()}


TENSORS = random_tensors()
HALVES = ({key: TENSORS[key] for key in list(TENSORS)[0::2]}, {key: TENSORS[key] for key in list(TENSORS)[1::2]})
SHARDS = {f"model-{number + 1:05d}-of-00002.safetensors": save(half) for number, half in enumerate(HALVES)}
WEIGHT_MAP = {key: name for name, half in zip(SHARDS, HALVES, strict=True) for key in half}
SMALL = save({key: TENSORS[key] for key in list(TENSORS)[2:6]})
WHOLE = save(TENSORS)


def index(draw: random.Random) -> Files:
    """Two shards and their index."""
    tree = {"metadata": {"total_size": 1}, "weight_map": WEIGHT_MAP}
    files = {"model.safetensors.index.json": to_json(draw, mutate_tree(draw, tree)), **SHARDS}
    if not draw.randrange(6):
        del files[draw.choice(list(SHARDS))]
    return files


def mutate_safetensors(draw: random.Random, content: bytes) -> bytes:
    """Change the header's tree, its length, or any bytes."""
    if not draw.randrange(4):
        return mutate_bytes(draw, content)
    length = int.from_bytes(content[:8], "little")
    tree = mutate_tree(draw, json.loads(content[8:8 + length]))
    header = to_json(draw, tree)
    header += b" " * (-len(header) % 8 if draw.randrange(4) else draw.randrange(9))
    said = draw.choice(NUMBERS[:16]) if not draw.randrange(12) else len(header)
    data = content[8 + length:]
    if not draw.randrange(8):
        data = mutate_bytes(draw, data)
    return (int(said) & ((1 << 64) - 1)).to_bytes(8, "little") + header + data


def safetensors(draw: random.Random) -> Files:
    """One safetensors file."""
    return {"model.safetensors": mutate_safetensors(draw, SMALL)}


def _saved(value: Any, new_format: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=new_format)
    return file.getvalue()


def _odd_tensors() -> list[Any]:
    """What torch can pickle and read back with weights_only, and no weight may be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [torch.zeros(1).expand(1 << 40), torch.zeros(9).as_strided((4, 4), (1, 1)), torch.eye(3).to_sparse(),
                torch.eye(3).to_sparse_csr(), torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
                torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64).conj(),
                torch.empty(3, device="meta"), torch.nn.Parameter(torch.ones(2)), torch.zeros(0, 3), torch.tensor(3.0),
                torch.ones(2, 3).t(), torch.ones(2, 3)[:, 1], torch.zeros(3, dtype=torch.bool),
                torch.zeros(2, dtype=torch.float8_e4m3fn), torch.nested.nested_tensor([torch.ones(2)]),
                {"a": torch.ones(1)}, [torch.ones(1)], 3, None, "text"]


ODD = _odd_tensors()
BIN_KEYS: tuple[Any, ...] = ("model.norm.weight", "", "a" * 3000, "\n", 7, None, ("a", 1))
BINS = tuple(_saved({key: TENSORS[key] for key in list(TENSORS)[2:5]}, new_format) for new_format in (True, True, False))


def _repacked(draw: random.Random, content: bytes) -> bytes:
    """A zip whose pickle was changed and whose sums are right; now and then with records compressed, missing or doubled."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as again:
        for entry in archive.infolist():
            record = archive.read(entry)
            if entry.filename.endswith("data.pkl") or not draw.randrange(10):
                record = mutate_bytes(draw, record)
            how = draw.randrange(30)
            if how == 0:
                continue
            packed = zipfile.ZIP_DEFLATED if how == 1 else zipfile.ZIP_STORED
            # An entry that is made by name alone would hold the time of day.
            named = zipfile.ZipInfo(draw.choice(archive.namelist()) if how == 2 else entry.filename)
            again.writestr(named, record, packed)
    return out.getvalue()


def bin_file(draw: random.Random) -> Files:
    """One .bin file, of either format torch has had."""
    content = draw.choice(BINS)
    how = draw.randrange(8)
    if how < 2:
        content = mutate_bytes(draw, content)
    elif how < 6 and content[:2] == b"PK":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of names that stand twice
            content = _repacked(draw, content)
    elif how < 6:
        content = mutate_bytes(draw, content)
    else:
        odd = {draw.choice(BIN_KEYS): draw.choice(ODD) for _ in range(draw.choice((1, 2)))}
        content = _saved(odd if draw.randrange(8) else draw.choice(ODD))
    return {"pytorch_model.bin": content}


# SentencePiece


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def charsmap() -> bytes:
    """A table of replacements: "a" becomes "bc", and "é" becomes "e"."""
    units = [0] * 1024
    units[0] = 1 << 18                                          # the root's children lie from 256 on
    units[256 ^ 0x61] = 0x61 | 1 << 8 | (512 ^ 256 ^ 0x61) << 10        # "a", a leaf at 512
    units[512] = 1 << 31
    units[256 ^ 0xC3] = 0xC3 | (768 ^ 256 ^ 0xC3) << 10
    units[768 ^ 0xA9] = 0xA9 | 1 << 8 | (513 ^ 768 ^ 0xA9) << 10        # "é", a leaf at 513
    units[513] = 1 << 31 | 3
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + b"bc\0e\0"


MERGED = ("▁t", "he", "the", "▁the", "in", "ing", *"abcdehing▁é", "ab", "abc")
PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(0, 256, 16)),
          *((text, -float(number), 1) for number, text in enumerate(dict.fromkeys(MERGED)))]


def sentencepiece(draw: random.Random) -> Files:
    """A tokenizer.model."""
    pieces = list(PIECES)
    trainer: list[tuple[int, Any]] = [(3, 2), (35, 1), (40, 0), (41, 1), (42, 2)]
    normalizer: list[tuple[int, Any]] = [(1, b"identity"), (3, 1), (4, draw.randrange(2)), (5, 1)]
    table = charsmap() if not draw.randrange(3) else b""
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        how, at = draw.randrange(8), draw.randrange(len(pieces))
        text, score, kind = pieces[at]
        if how == 0:
            pieces[at] = (draw.choice((*TEXTS, "▁" * 300, "ab" * 20)), score, kind)
        elif how == 1:
            pieces[at] = (text, draw.choice((float("nan"), float("inf"), -1e30, 0.0, 3.4e38)), kind)
        elif how == 2:
            pieces[at] = (text, score, draw.choice((0, 1, 2, 3, 4, 5, 6, 7, 1 << 40)))
        elif how == 3:
            del pieces[at]
        elif how == 4:
            pieces.insert(at, draw.choice(pieces))
        elif how == 5:
            trainer[draw.randrange(len(trainer))] = (draw.choice((3, 35, 40, 41, 42, 43)),
                                                     draw.choice((0, 1, 2, 30, 1 << 63, b"x")))
        elif how == 6:
            normalizer[draw.randrange(len(normalizer))] = (draw.choice((1, 2, 3, 4, 5)),
                                                           draw.choice((0, 1, 1 << 63, b"", b"xyz")))
        elif table:
            table = _units_changed(draw, charsmap()) if draw.randrange(2) else mutate_bytes(draw, table)
    if table:
        normalizer.append((2, table))
    encoded = [_field(1, _field(1, text.encode("utf-8", "surrogatepass")) + _field(2, score) + _field(3, kind))
               for text, score, kind in pieces]
    content = b"".join([*encoded, _field(2, b"".join(_field(*pair) for pair in trainer)),
                        _field(3, b"".join(_field(*pair) for pair in normalizer))])
    return {"tokenizer.model": mutate_bytes(draw, content) if not draw.randrange(3) else content}


def _units_changed(draw: random.Random, table: bytes) -> bytes:
    """A table with one of the units that a text leads to pointing elsewhere."""
    data = bytearray(table)
    unit = draw.choice((0, 256 ^ 0x61, 512, 256 ^ 0xC3, 768 ^ 0xA9, 513, draw.randrange(1024)))
    struct.pack_into("<I", data, 4 + 4 * unit, draw.choice((draw.getrandbits(32), 1 << draw.randrange(32), 0xFFFFFFFF)))
    return bytes(data)


TOKENIZER = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [
    {"id": 0, "content": "<unk>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True},
    {"id": 1, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True},
    {"id": 2, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}],
    "normalizer": {"type": "Prepend", "prepend": "▁"},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
    "post_processor": None, "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
              "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6, "▁a": 7},
              "merges": [["a", "b"], ["▁", "a"]]}}
SPECIALS = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None,
            "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}}}


def tokenizer(draw: random.Random) -> Files:
    """A tokenizer.json and its settings."""
    both: list[Any] = [TOKENIZER, SPECIALS]
    which = draw.choice((0, 0, 1))
    both[which] = mutate_tree(draw, both[which])
    return {"tokenizer.json": to_json(draw, both[0]), "tokenizer_config.json": to_json(draw, both[1])}


# Adapters and 4-bit weights

ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none", "use_dora": False,
                  "target_modules": ["q_proj", "up_proj"], "use_rslora": False, "init_lora_weights": True, "rank_pattern": {}}
EXTRA = {"base_quantization": {"blocksize": 64, "double_quant": True, "quant_type": "nf4"}, "base_digest": "0" * 64,
         "template": "{input}", "max_length": 64, "init_lora_weights": "lora", "base_model": "tiny"}
AT = "base_model.model.model.layers.0."
LORA = save({f"{AT}{name}.lora_{side}.weight": torch.ones((2, 4) if side == "A" else (6, 2))
             for name in ("self_attn.q_proj", "mlp.up_proj") for side in "AB"})


def adapter(draw: random.Random) -> Files:
    """An adapter folder for a module of two linears, q_proj and up_proj, both (6, 4)."""
    which = draw.randrange(4)
    return {"adapter_config.json": to_json(draw, mutate_tree(draw, ADAPTER_CONFIG)) if which < 2 else
            json.dumps(ADAPTER_CONFIG).encode(),
            "adapter_model.safetensors": mutate_safetensors(draw, LORA) if which in (1, 2) else LORA,
            "minilora.json": to_json(draw, mutate_tree(draw, EXTRA)) if which == 3 else json.dumps(EXTRA).encode()}


def _four_bit(double_quant: bool) -> dict[str, Tensor]:
    weight = quantize_nf4(torch.randn(32, 40, generator=torch.Generator().manual_seed(0)), 64, double_quant)
    return {pending.key: pending.make() for pending in pending_nf4("q_proj", weight)}


FOUR_BIT = (_four_bit(True), _four_bit(False))


def quant_state(draw: random.Random) -> Files:
    """One linear of (32, 40) in 4 bits: its description changed, or what it describes."""
    whole = draw.choice(FOUR_BIT)
    tensors, state = dict(whole), "q_proj.weight" + STATE
    for _ in range(draw.choice((1, 1, 2))):
        how, key = draw.randrange(6), draw.choice(list(tensors))
        if how < 2 and tensors.get(state) is whole[state]:
            text = to_json(draw, mutate_tree(draw, json.loads(bytes(tensors[state].tolist()))))
            tensors[state] = torch.tensor(list(text[:200_000]), dtype=torch.uint8)
        elif how == 2:
            tensors[draw.choice((key + "x", "q_proj.weight.absmax", state.replace("nf4", "fp4")))] = tensors.pop(key)
        elif how == 3:
            tensors[key] = tensors[key].reshape(-1)[: draw.randrange(1, 4) * tensors[key].numel() // 4].clone()
        elif how == 4:
            tensors[key] = tensors[key].to(draw.choice((torch.uint8, torch.float32, torch.float16, torch.int64)))
        elif tensors[key].dtype == torch.float32:
            tensors[key] = torch.full_like(tensors[key], draw.choice((float("nan"), float("inf"), 0.0, 1e38)))
    content = save(tensors)
    return {"model.safetensors": mutate_safetensors(draw, content) if not draw.randrange(3) else content}


def folder(draw: random.Random) -> Files:
    """A whole model: config, weights, tokenizer, one of them changed."""
    files = {"config.json": json.dumps(CONFIGS[0]).encode(), "model.safetensors": WHOLE,
             "tokenizer.json": json.dumps(TOKENIZER).encode(), "tokenizer_config.json": json.dumps(SPECIALS).encode()}
    which = draw.randrange(3)
    if which == 0:
        return files | {"config.json": to_json(draw, mutate_tree(draw, CONFIGS[0]))}
    return files | (tokenizer(draw) if which == 1 else {"model.safetensors": mutate_safetensors(draw, WHOLE)})


KINDS: dict[str, Callable[[random.Random], Files]] = {
    "config": config, "index": index, "safetensors": safetensors, "bin": bin_file, "sentencepiece": sentencepiece,
    "tokenizer": tokenizer, "adapter": adapter, "quant_state": quant_state, "folder": folder}
