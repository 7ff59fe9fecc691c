"""What the files beside a tokenizer say of it: tokenizer_config.json and its older neighbours, in Hugging Face's way.

transformers 4.57.1 is the measure: which file wins, which tokens are added to those of a tokenizer.model, which begin
and end a text, and where a space is put in front. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from llm_core.errors import UserError

CONFIG = "tokenizer_config.json"
MODEL, JSON = FILE_NAMES = ("tokenizer.model", "tokenizer.json")
_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
# In the order in which transformers gives ids to those that have none.
_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_MORE = "additional_special_tokens"
# Families whose tokenizer is LlamaTokenizer where tokenizer_config.json names none.
_LLAMA_TYPES = ("llama", "mistral")


class Spaces(Enum):
    """Which texts get a space in front: EVERY one between special tokens, the FIRST alone, or NONE."""

    EVERY = "every"
    FIRST = "first"
    NONE = "none"


@dataclass(frozen=True)
class AddedToken:
    """A token that the folder declares. id: None where it names the token alone.

    is_special: only a template writes it; another one is found in any text. takes_*: see SpecialToken.
    """

    text: str
    id: int | None
    is_special: bool = True
    takes_space_before: bool = False
    takes_space_behind: bool = False


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} where there is no such file. UserError, naming the file, for anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, and is a {type(content).__name__}")
    return content


def special_names(folder: Path) -> dict[str, str | None]:
    """{"bos_token": "<s>", ...} as far as the folder says; null, for none, where it says that."""
    names = {key: _text(value) for key, value in _said(folder).items() if key.endswith("_token")}
    return {key: name for key, name in names.items() if name is None or isinstance(name, str)}


def added_tokens(folder: Path) -> list[AddedToken]:
    """Every token that the folder declares beside its tokenizer.model, those with ids first.

    added_tokens_decoder of tokenizer_config.json has them all; where it is missing they are in added_tokens.json and in
    tokenizer.json. A token that is only named (bos_token, additional_special_tokens ...) comes without an id.
    """
    tokens = {token.text: token for token in _declared(folder)}
    for value in _named(_said(folder)):
        tokens.setdefault(_text(value), _added(value, None))
    return list(tokens.values())


def tokenizer_file(folder: Path) -> Path | None:
    """The folder's tokenizer, None if it has none: tokenizer.model, if it spells all tokens or there is no other.

    Else tokenizer.json, which has the added ones, unless transformers would not read it either (see `spaces`).
    """
    model, other = folder / MODEL, folder / JSON
    if not model.is_file():
        return other if other.is_file() else None
    if other.is_file() and read_json(folder / CONFIG).get("add_prefix_space") is None:
        content = model.read_bytes()
        if not all(_spells(content, token.text) for token in added_tokens(folder)):
            return other
    return model


def adds_ends(file: Path) -> tuple[bool | None, bool | None]:
    """Whether transformers puts bos before and eos behind a text; None where the tokenizer.json itself says it.

    add_bos_token and add_eos_token of tokenizer_config.json; where they are missing LlamaTokenizer, and any other that
    reads a tokenizer.model, adds bos.
    """
    config = read_json(file.with_name(CONFIG))
    silent = (None, None) if file.suffix == ".json" and not _is_llama(file.parent, config) else (True, False)
    said = (config.get("add_bos_token"), config.get("add_eos_token"))
    return tuple(its if isinstance(its, bool) else default for its, default in zip(said, silent, strict=True))


def spaces(folder: Path) -> Spaces | None:
    """Where texts get a space in front; None where the folder leaves that to the tokenizer.model itself.

    A tokenizer.json beside it knows, unless add_prefix_space is set, which makes transformers convert the model anew;
    else `legacy`: false is one space a text, true or nothing the model's own way for every text between special tokens.
    """
    config = read_json(folder / CONFIG)
    in_front = config.get("add_prefix_space")
    if in_front is None and (folder / JSON).is_file():
        return _spaces_of(read_json(folder / JSON))
    if config.get("legacy") is not False:
        return None
    return Spaces.NONE if in_front is False else Spaces.FIRST


# ---- names and added tokens


def _said(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, under special_tokens_map.json where that still counts: where there is no newer list."""
    config = read_json(folder / CONFIG)
    if "added_tokens_decoder" in config:
        return config
    older = read_json(folder / _MAP)
    more = [*(config.get(_MORE) or []), *(older.get(_MORE) or [])]
    return config | older | ({_MORE: more} if more else {})


def _named(said: Mapping[str, Any]) -> Iterator[Any]:
    """The special tokens as they stand there: a text, or an object with flags."""
    for value in (*(said.get(key) for key in _NAMED), *(said.get(_MORE) or [])):
        if isinstance(_text(value), str) and _text(value):
            yield value


def _declared(folder: Path) -> Iterator[AddedToken]:
    """Those with an id; of several with one text the last counts."""
    config = read_json(folder / CONFIG)
    listed = config.get("added_tokens_decoder")
    if listed is not None:
        if not isinstance(listed, dict) or not all(str(key).isdecimal() and _text(v) for key, v in listed.items()):
            raise UserError(f"{folder / CONFIG}: added_tokens_decoder: must map ids to tokens with their content")
        for number, value in listed.items():
            yield _added(value, int(number), special=False)
        return
    special = {_text(value) for value in _named(_said(folder))}
    for text, number in read_json(folder / _ADDED).items():
        if not isinstance(number, int) or number < 0 or not text:
            raise UserError(f"{folder / _ADDED}: {text!r}: must have an id, and has {number!r}")
        yield AddedToken(text, number, text in special)
    for value in read_json(folder / JSON).get("added_tokens") or []:
        if isinstance(value, dict) and isinstance(value.get("id"), int) and _text(value):
            yield _added(value, value["id"], special=False)


def _added(value: Any, number: int | None, special: bool = True) -> AddedToken:
    flags = value if isinstance(value, dict) else {}
    is_special = special or bool(flags.get("special"))
    return AddedToken(_text(value), number, is_special, bool(flags.get("lstrip")), bool(flags.get("rstrip")))


def _text(value: Any) -> Any:
    """A token's text, whether it stands there by itself or as {"content": "<s>", "lstrip": ...}."""
    return value.get("content") if isinstance(value, dict) else value


def _spells(model: bytes, text: str) -> bool:
    """Whether a piece of this SentencePiece model is `text` (field 1 of the piece, by its bytes)."""
    from llm_core.text.spm_proto import PIECE, bytes_field

    return bytes_field(PIECE, text.encode()) in model


# ---- bos, eos and spaces


def _is_llama(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether LlamaTokenizer reads this folder: it adds bos itself, whatever tokenizer.json has."""
    kind = config.get("tokenizer_class")
    if kind is not None:
        return str(kind).removesuffix("Fast") in ("LlamaTokenizer", "CodeLlamaTokenizer")
    return read_json(folder / "config.json").get("model_type") in _LLAMA_TYPES


def _spaces_of(content: Mapping[str, Any]) -> Spaces:
    """A tokenizer.json puts a space in front by its normalizer (every text) or its pre-tokenizer (by `scheme`)."""
    if any(step.get("type") == "Prepend" for step in _steps(content, "normalizer")):
        return Spaces.EVERY
    for step in _steps(content, "pre_tokenizer"):
        if step.get("type") == "Metaspace":
            older = "always" if step.get("add_prefix_space", True) else "never"
            schemes = {"always": Spaces.EVERY, "first": Spaces.FIRST}
            return schemes.get(step.get("prepend_scheme", older), Spaces.NONE)
    return Spaces.NONE


def _steps(content: Mapping[str, Any], stage: str) -> list[Mapping[str, Any]]:
    first = content.get(stage) or {}
    return [first, *(first.get(f"{stage}s") or first.get("pretokenizers") or [])]
