"""Text to token ids and back, with exactly one BOS.

The `tokenizers` library does the work.  What is decided here is what model folders leave open:

- **BOS.**  Some repositories add it in the tokenizer's post-processor and some leave it to the caller.  Post-processors
  are not run here: `encode(text, bos=True)` puts one BOS in front, whatever the file says.
- **Text that spells a control token.**  "<s>" inside a note is three characters.  BOS, EOS, PAD and UNK are never read
  out of text, so text cannot smuggle in a second BOS or an early end.  Other added tokens, such as "<|im_start|>", are
  read out of text as everywhere else, because chat templates need them.  A chat template may also name the end token
  ("<|im_end|>"): `encode_prompt` reads it out of the template, and still not out of the note.
- **Which tokens they are.**  tokenizer_config.json, then special_tokens_map.json; where neither names one, config.json
  and at last the tokenizer itself.  A folder that says ``"bos_token": null`` (Qwen2) has no BOS and none is added.
- **Padding** is never the end token's stand-in: a folder that pads with EOS counts as having no PAD.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from minilora.errors import CheckpointError, ConfigError, OutputError
from minilora.files import atomic_path
from minilora.llama.chat_templates import ChatTemplates
from minilora.llama.encoders import JsonEncoder, SentencePieceEncoder
from minilora.llama.sentencepiece_folder import read_sentencepiece_folder
from minilora.llama.strict_json import parse_object, read_bytes

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "chat_template.jinja")
LONGEST_SPECIAL = 256       # characters of a special token, which messages quote
_SURROGATE = re.compile("[\ud800-\udfff]")
# Spellings of the last resort, for a folder that holds nothing but the tokenizer.
KNOWN = {"bos": ("<s>", "<|begin_of_text|>", "<bos>"), "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
         "pad": ("<pad>", "<PAD>", "[PAD]", "<|pad|>"), "unk": ("<unk>", "[UNK]")}


class Tokenizer:
    """A model's tokenizer; made by `read_tokenizer`.

    Attributes:
        bos_id, eos_id, pad_id: token ids, or None where the model has no such token.
        vocab_size: one more than the largest id, added tokens included.
        special_ids: ids that `decode` leaves out.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None, pad_id: int | None,
                 special_ids: Iterable[int], files: dict[str, bytes], control: Iterable[int] = (),
                 encoder: JsonEncoder | SentencePieceEncoder | None = None) -> None:
        backend.encode_special_tokens = True        # control tokens spelled in text stay text
        backend.no_padding()                        # Trap: a tokenizer.json may carry its trainer's padding and truncation
        backend.no_truncation()
        self._backend, self._files = backend, files
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.special_ids = frozenset(special_ids) | {token for token in (bos_id, eos_id, pad_id) if token is not None}
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._encoder = JsonEncoder(backend) if encoder is None else encoder
        self._templates = ChatTemplates(backend, self._encoder, control, bos_id)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of `text`, in front of them one BOS if `bos` and the model has one.

        Guarantee: BOS stands nowhere else; every id is below `vocab_size`; no EOS is added.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes one text (str), not a {type(text).__name__}")
        return self._with_bos(self._encoder, text, bos)

    def encode_prompt(self, before: str, note: str, after: str) -> list[int]:
        """Token ids of ``before + note + after``, one text, with one BOS in front.

        EOS, PAD and UNK spelled in `before` or `after` are those tokens, as in transformers; in `note` they stay text.  Where
        neither spells one, this is `encode` of the whole.

        Raises: ConfigError: `before` or `after` spells BOS.
        Guarantee: the ids of transformers, unless `note` spells a special token (tests/peers/test_chat_templates.py).
        """
        if not self._templates.names_one(before, after):
            return self.encode(before + note + after)
        with _library("the tokenizer cannot be written again"):
            encoder = self._templates.encoder()
        return self._with_bos(encoder, self._templates.marked(before, note, after), bos=True)

    def _with_bos(self, encoder: JsonEncoder | SentencePieceEncoder, text: str, bos: bool) -> list[int]:
        with _library("the tokenizer cannot read a text"):
            try:
                ids = encoder.ids(text)
            except (TypeError, UnicodeEncodeError):     # a lone surrogate, which UTF-8 cannot hold: U+FFFD instead
                ids = encoder.ids(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        if self.bos_id is None:
            return ids
        if self.bos_id in ids:                      # a vocabulary that spells BOS as an ordinary word
            ids = [token for token in ids if token != self.bos_id]
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids, without BOS, EOS, PAD and the other special tokens unless asked for.

        Bytes that form no character come out as U+FFFD.  A SentencePiece decoder drops the one leading space that its
        encoder added.  An id past the vocabulary (a table padded to more rows than tokens may yield one) has no text.

        Raises: ConfigError: a negative id, such as the -100 of labels without loss.
        """
        kept = [int(token) for token in ids]
        if min(kept, default=0) < 0:
            raise ConfigError(f"token id {min(kept)} is negative; take out what is no token before decoding")
        if skip_special:
            kept = [token for token in kept if token not in self.special_ids]
        with _library("the tokenizer cannot write a text"):
            return str(self._backend.decode(kept, skip_special_tokens=False))

    def token(self, token_id: int | None) -> str | None:
        """The spelling of a token in the vocabulary, or None."""
        return None if token_id is None else self._backend.id_to_token(token_id)

    def spell(self, token: str) -> list[int]:
        """Ids of the tokens that spell one of a larger vocabulary; `token` is written as in tokenizer.json."""
        return [part.id for part in self._backend.model.tokenize(token)]

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer's files into `folder`, so that `load_tokenizer(folder)` is this tokenizer again.

        The original files are copied byte for byte; tokenizer_config.json also gets the special tokens that were found
        elsewhere, since the folder's config.json may be another or none.

        Raises: OutputError: the folder cannot be written.
        """
        files = dict(self._files)
        config = parse_object(files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
        missing = {f"{name}_token": self.token(token) for name, token in
                   (("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id)) if config.get(f"{name}_token") is None}
        if any(name not in config or config[name] != token for name, token in missing.items()):
            config = {**config, **missing}
            if "tokenizer.json" in files:
                config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
            files["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror or error}; check the path") from error
        for name, content in files.items():
            with atomic_path(Path(folder) / name) as temporary:
                temporary.write_bytes(content)


@contextmanager
def _library(what: str) -> Iterator[None]:
    """Errors of the library inside a text, which tells nothing of it: they are damage to the tokenizer.

    Trap: a panic of its Rust code is no `Exception`.
    """
    try:
        yield
    except (TypeError, UnicodeError):       # the caller's own
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what} ({type(error).__name__}); fetch its files again") from None


def _spelling(value: object, source: str, key: str) -> str | None:
    """A special token's text: a string, or an object with "content", or null."""
    if isinstance(value, dict):
        value = value.get("content")
    if isinstance(value, str) and len(value) > LONGEST_SPECIAL:
        raise CheckpointError(f"{source}: {key} has {len(value):,} characters; fetch the file again")
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if value is None:
        return value
    raise CheckpointError(f"{source}: {key} must be a text, found {type(value).__name__}")


def _find_specials(folder: Path, files: dict[str, bytes], backend: tokenizers.Tokenizer) -> dict[str, int | None]:
    """The ids of bos, eos, pad and unk, as the module docstring orders the sources."""
    def settings(name: str) -> dict[str, Any]:
        return parse_object(files[name], str(folder / name)) if name in files else {}

    sources = {name: settings(name) for name in ("tokenizer_config.json", "special_tokens_map.json")}
    config_file = folder / "config.json"
    config = parse_object(read_bytes(config_file), str(config_file)) if config_file.is_file() else {}
    found: dict[str, int | None] = {}
    for name, spellings in KNOWN.items():
        key = f"{name}_token"
        named = {source: _spelling(values[key], str(folder / source), key)
                 for source, values in sources.items() if key in values}
        source, text = next(((s, t) for s, t in named.items() if t is not None), ("", None))
        if text is not None:
            found[name] = backend.token_to_id(text)
            if found[name] is None and name in ("bos", "eos"):
                raise CheckpointError(f"{folder / source}: {key} {text!r} is not in the vocabulary; fetch the tokenizer's "
                                      "files of one upload")
        elif named:
            found[name] = None                          # said to be absent
        else:
            found[name] = _from_config(config, name, backend)
            if found[name] is None:
                found[name] = next((i for i in map(backend.token_to_id, spellings) if i is not None), None)
    if found["pad"] == found["eos"]:
        found["pad"] = None
    return found


def _from_config(config: dict[str, Any], name: str, backend: tokenizers.Tokenizer) -> int | None:
    # Trap: Qwen2's config.json gives a bos_token_id, yet the model never saw a BOS; its tokenizer says null.
    if name == "bos" and config.get("model_type") == "qwen2":
        return None
    value = config.get(f"{name}_token_id")
    if isinstance(value, list) and value:               # Llama 3 lists several end tokens, the end of text first
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or backend.id_to_token(value) is None:
        return None
    return value


def _from_json(folder: Path, name: str, files: dict[str, bytes]) -> tuple[tokenizers.Tokenizer, set[int]]:
    """The encoder of a tokenizer.json, and the special ids."""
    path = folder / name
    content = parse_object(files[name], str(path))
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) and isinstance(token.get("id"), int) for token in added):
        raise CheckpointError(f"{path}: added_tokens is malformed; fetch the file again")
    _check_model(content.get("model"), added, str(path))
    try:
        return tokenizers.Tokenizer.from_buffer(files[name]), {token["id"] for token in added if token.get("special")}
    except BaseException as error:                      # the library raises plain Exception, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        detail = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path}: not a tokenizer ({detail}); fetch it again") from error


def _check_model(model: object, added: list[dict[str, Any]], source: str) -> None:
    """Refuse what the library would only stumble over in a text, or panic at: a missing UNK, merges of unknown tokens."""
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        return                                          # no Llama's; the library says what is wrong with it, if anything
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise CheckpointError(f"{source}: a BPE with prefixes or suffixes is not read; no Llama has one")
    unknown, vocab, merges = model.get("unk_token"), model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        return
    if unknown is not None and not (isinstance(unknown, str) and
                                    (unknown in vocab or any(token.get("content") == unknown for token in added))):
        raise CheckpointError(f"{source}: its unk_token {unknown!r:.60} is not in the vocabulary; fetch the file again")
    ids = [token_id for token_id in vocab.values() if isinstance(token_id, int)]
    if len(set(ids)) != len(ids):
        raise CheckpointError(f"{source}: two tokens of the vocabulary have the same id; fetch the file again")
    for number, merge in enumerate(merges):
        halves = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(halves, list) or len(halves) != 2 or not all(isinstance(half, str) for half in halves) or \
                "".join(halves) not in vocab or halves[0] not in vocab or halves[1] not in vocab:
            raise CheckpointError(f"{source}: merge {number} is of what is not in the vocabulary; fetch the file again")


def _only_control_is_special(backend: tokenizers.Tokenizer, control: set[int]) -> tokenizers.Tokenizer:
    """The same encoder, in which exactly the control tokens are never read out of text (`encode_special_tokens`)."""
    if all(token.special == (token_id in control) for token_id, token in backend.get_added_tokens_decoder().items()):
        return backend
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["id"] in control
    with _library("the tokenizer cannot be written again"):
        return tokenizers.Tokenizer.from_str(json.dumps(content))


def read_tokenizer(path: Path | str) -> Tokenizer:
    """Read a model folder's tokenizer, or one tokenizer.json or tokenizer.model file.

    Args:
        path: a folder (tokenizer.json is preferred to tokenizer.model), or the file.

    Raises: CheckpointError: no tokenizer there, or a file of it is broken; names the file.
    Guarantee: a tokenizer.model gives the ids of the sentencepiece library (tests/peers/test_sentencepiece.py); with added
        tokens or "legacy" those of transformers, but for what `encoders` says (tests/peers/test_legacy.py).
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder")
    files = {name: read_bytes(folder / name) for name in FILES if (folder / name).is_file()}
    if path.is_file():
        files[path.name] = read_bytes(path)
        name = path.name
    else:
        name = next((name for name in FILES[:2] if name in files), "")
    if not name:
        raise CheckpointError(f"{folder}: no tokenizer: neither tokenizer.json nor tokenizer.model; fetch one of them")
    if name.endswith(".model"):
        pieces = read_sentencepiece_folder(folder, name, files)
        backend, special = pieces.backend, pieces.special
    else:
        pieces, (backend, special) = None, _from_json(folder, name, files)
    found = _find_specials(folder, files, backend)
    control = {token for token in found.values() if token is not None}
    backend = _only_control_is_special(backend, control)
    return Tokenizer(backend, found["bos"], found["eos"], found["pad"], special | control, files, control,
                     pieces.encoder(control) if pieces else None)
