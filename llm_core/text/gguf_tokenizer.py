"""The tokenizer and the chat template that a GGUF file carries, as the files of a Hugging Face folder.

Byte-level BPE (`tokenizer.ggml.model` gpt2) becomes a tokenizer.json, SentencePiece (llama) a tokenizer.model: the same
pieces and scores in SentencePiece's own format, so the same library encodes them. Both get a tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_core.errors import UserError
from llm_core.report.console import console
from llm_core.text.spm_proto import (
    BYTE,
    CHARACTER_MAP,
    CONTROL,
    NORMAL,
    NORMALIZER,
    PIECE,
    PIECES,
    REMOVE_EXTRA_WHITESPACES,
    SCORE,
    SPACE_IN_FRONT,
    TRAINER,
    TYPE,
    UNKNOWN,
    USER_DEFINED,
    bytes_field,
    float_field,
    number_field,
)

_PREFIX = "tokenizer.ggml."
# (GGUF has taken SentencePiece's numbers for the kinds of a token.)
# How the text is cut before BPE, by llama.cpp's names of it (`tokenizer.ggml.pre`): a pattern for pieces, or None
# for GPT-2's own cut; and whether each digit stands alone before that.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, False),
    "smollm": (None, True),
    "starcoder": (None, True),
    "refact": (None, True),
    "command-r": (None, True),
    "llama-bpe": (_LLAMA3 % "1,3", False),
    "qwen2": (_LLAMA3 % "1", False),
}
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # a piece that is a token stays one, whatever the merges say
_BOS_BY_DEFAULT = ("llama-bpe",)


def tokenizer_files(fields: Mapping[str, Any], source: str) -> dict[str, bytes]:
    """The tokenizer's files, name -> content; {} with one warning where the file's kind of tokenizer is not known.

    fields: the GGUF's metadata. source: named in messages. UserError for lists that contradict each other.
    """
    kind, pre = fields.get(f"{_PREFIX}model"), fields.get(f"{_PREFIX}pre")
    if kind == "llama":
        files = {"tokenizer.model": sentencepiece_model(fields, source)}
    elif kind == "gpt2" and pre in _CUTS:
        content = json.dumps(bpe_tokenizer(fields, source), ensure_ascii=False, indent=1)
        files = {"tokenizer.json": content.encode()}
    else:
        what = f"{_PREFIX}model is {kind!r}" if kind != "gpt2" else f"{_PREFIX}pre (how text is cut) is {pre!r}"
        console.warn(
            f"{source}: {what}, which is not known: no tokenizer is written; copy the model's own tokenizer.json (or "
            "tokenizer.model) and tokenizer_config.json into the folder"
        )
        return {}
    _check_loads(files, source)
    config = json.dumps(_tokenizer_config(fields, kind), ensure_ascii=False, indent=2) + "\n"
    return files | {"tokenizer_config.json": config.encode()}


def _check_loads(files: Mapping[str, bytes], source: str) -> None:
    """UserError, naming the GGUF file, when the library refuses the tokenizer that was made of it."""
    from llm_core.text.hf import HfTokenizer
    from llm_core.text.spm import SentencePieceTokenizer

    for name, content in files.items():
        kind = HfTokenizer if name == "tokenizer.json" else SentencePieceTokenizer
        kind(Path(source) / name, content)


def _tokens(fields: Mapping[str, Any], source: str) -> tuple[list[str], list[int]]:
    """Pieces and their kinds."""
    tokens = fields.get(f"{_PREFIX}tokens") or []
    kinds = fields.get(f"{_PREFIX}token_type") or [NORMAL] * len(tokens)
    if not tokens or len(kinds) != len(tokens):
        raise UserError(f"{source}: {_PREFIX}tokens has {len(tokens)} entries and {_PREFIX}token_type {len(kinds)}")
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise UserError(f"{source}: {_PREFIX}tokens: {twice!r} is there twice")
    return tokens, kinds


def _special_id(fields: Mapping[str, Any], name: str) -> int | None:
    """The id of "bos", "eos", "padding" or "unknown", None where the file names none."""
    value = fields.get(f"{_PREFIX}{name}_token_id")
    return value if value is not None and 0 <= value < len(fields[f"{_PREFIX}tokens"]) else None


def _tokenizer_config(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    tokens = fields[f"{_PREFIX}tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if kind == "llama" else "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(fields, kind),
        "add_eos_token": bool(fields.get(f"{_PREFIX}add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
    }
    if kind == "llama":
        config |= _where_spaces_come(fields) | _control_tokens(fields)
    for theirs, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = _special_id(fields, theirs)
        if token is not None:
            config[f"{name}_token"] = tokens[token]
    if fields.get("llama.context_length"):
        config["model_max_length"] = fields["llama.context_length"]
    if fields.get("tokenizer.chat_template"):
        config["chat_template"] = fields["tokenizer.chat_template"]
    return config


def _where_spaces_come(fields: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp puts a space before every text between special tokens, or before none: `legacy`, in HF's word."""
    return {"legacy": True, "add_prefix_space": bool(fields.get(f"{_PREFIX}add_space_prefix", True))}


def _control_tokens(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The control pieces as special tokens, which transformers does not look for in a tokenizer.model."""
    kinds = fields.get(f"{_PREFIX}token_type") or []
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    texts = fields[f"{_PREFIX}tokens"]
    special = {token for token, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN)}
    special |= {token for name in _IDS if (token := _special_id(fields, name)) is not None}
    return {"added_tokens_decoder": {str(token): {"content": texts[token], **flags} for token in sorted(special)}}


def _adds_bos(fields: Mapping[str, Any], kind: str) -> bool:
    default = kind == "llama" or fields.get(f"{_PREFIX}pre") in _BOS_BY_DEFAULT
    return bool(fields.get(f"{_PREFIX}add_bos_token", default))


# ---- byte-level BPE


def bpe_tokenizer(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The content of a tokenizer.json for the `tokenizers` library. UserError for lists that contradict each other."""
    tokens, kinds = _tokens(fields, source)
    pre = fields[f"{_PREFIX}pre"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(token, text, kinds[token])
            for token, text in enumerate(tokens)
            if kinds[token] in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": _cut(*_CUTS[pre]),
        "post_processor": _bos_in_front(fields) if _adds_bos(fields, "gpt2") else None,
        "decoder": _byte_level(cut=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS_FIRST,
            "vocab": {text: token for token, text in enumerate(tokens)},
            "merges": fields.get(f"{_PREFIX}merges") or [],
        },
    }


def _added_token(token: int, text: str, kind: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": text, **flags, "special": kind == CONTROL}


def _byte_level(cut: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cut}


def _cut(pattern: str | None, single_digits: bool) -> dict[str, Any]:
    steps = [{"type": "Digits", "individual_digits": True}] if single_digits else []
    if pattern is not None:
        steps.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": [*steps, _byte_level(cut=pattern is None)]}


def _bos_in_front(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """What puts bos before a text for those who ask the library for special tokens."""
    token = _special_id(fields, "bos")
    if token is None:
        return None
    text = fields[f"{_PREFIX}tokens"][token]
    bos, first, second = (
        {"SpecialToken": {"id": text, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 0}},
    )
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


# ---- SentencePiece

# field numbers beside those of `spm_proto`
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35  # in TrainerSpec
_IDS = {"unknown": (40, 45), "bos": (41, 46), "eos": (42, 47), "padding": (43, 48)}  # id, piece
_NAME = 1  # in NormalizerSpec
_BPE = 2


def sentencepiece_model(fields: Mapping[str, Any], source: str) -> bytes:
    """The content of a tokenizer.model: a BPE model whose scores order the merges, as llama.cpp reads them."""
    tokens, kinds = _tokens(fields, source)
    scores = fields.get(f"{_PREFIX}scores") or []
    if len(scores) != len(tokens):
        raise UserError(f"{source}: {_PREFIX}tokens has {len(tokens)} entries and {_PREFIX}scores {len(scores)}")
    special = {name: _special_id(fields, name) for name in _IDS}
    special = {name: token for name, token in special.items() if token is not None}
    if special.get("padding") == special.get("unknown"):
        special.pop("padding", None)  # a piece is of one kind
    kinds = list(kinds)
    for name, token in special.items():
        kinds[token] = UNKNOWN if name == "unknown" else CONTROL
    message = bytearray()
    for text, score, kind in zip(tokens, scores, kinds, strict=True):
        piece = bytes_field(PIECE, text.encode()) + float_field(SCORE, score) + number_field(TYPE, kind)
        message += bytes_field(PIECES, piece)
    trainer = number_field(_MODEL_TYPE, _BPE) + number_field(_VOCAB_SIZE, len(tokens))
    trainer += number_field(_BYTE_FALLBACK, int(BYTE in kinds))
    for name, token in special.items():
        id_field, piece_field = _IDS[name]
        trainer += number_field(id_field, token) + bytes_field(piece_field, tokens[token].encode())
    normalizer = bytes_field(_NAME, b"identity") + bytes_field(
        CHARACTER_MAP, bytes(fields.get(f"{_PREFIX}precompiled_charsmap") or b"")
    )
    normalizer += number_field(SPACE_IN_FRONT, int(fields.get(f"{_PREFIX}add_space_prefix", True)))
    normalizer += number_field(REMOVE_EXTRA_WHITESPACES, int(fields.get(f"{_PREFIX}remove_extra_whitespaces", False)))
    return bytes(message + bytes_field(TRAINER, trainer) + bytes_field(NORMALIZER, normalizer))
