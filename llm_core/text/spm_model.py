"""The content of a SentencePiece model: read by the library, and changed where a folder says more than it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import sentencepiece

from llm_core.errors import UserError
from llm_core.text.folder import AddedToken, added_tokens, special_names
from llm_core.text.spm_proto import (
    CHARACTER_MAP,
    CONTROL,
    NORMALIZER,
    PIECE,
    PIECES,
    REMOVE_EXTRA_WHITESPACES,
    SPACE_IN_FRONT,
    TYPE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    bytes_field,
    fields,
    number_field,
)

# A new token far beyond the last piece is a mistake, and would fill the memory with unused ones.
_MOST_NEW_PIECES = 100_000


def open_model(path: Path, content: bytes) -> sentencepiece.SentencePieceProcessor:
    """The library's processor of a model. UserError, naming `path`, for what is no model."""
    if hasattr(sentencepiece, "set_min_log_level"):
        sentencepiece.set_min_log_level(2)  # InternLM's null piece draws a warning at every load
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, ValueError) as error:
        reason = str(error).rsplit("] ", 1)[-1].strip() or "it cannot be parsed"
        raise UserError(
            f"{path}: not a SentencePiece model, or damaged ({reason}); copy it again or name another"
        ) from None
    return processor


def with_space_in_front(content: bytes, in_front: bool) -> bytes:
    """The model, told to put a space in front of a text, or not to: of a message that is there twice both count."""
    return content + bytes_field(NORMALIZER, number_field(SPACE_IN_FRONT, int(in_front)))


def leaves_text_alone(model: bytes) -> bool:
    """Whether its normalizer leaves a text as it is: no character map, and all spaces kept."""
    normalizer: dict[int, int | bytes] = {}
    for number, value, _ in fields(model):
        if number == NORMALIZER:
            normalizer |= {inner: setting for inner, setting, _ in fields(value)}
    return not normalizer.get(CHARACTER_MAP) and normalizer.get(REMOVE_EXTRA_WHITESPACES, 1) == 0


def with_added_tokens(path: Path, content: bytes) -> bytes:
    """The model with the tokens that the folder of `path` adds to it; `content` itself where it has them all.

    Special ones become control pieces, which no text yields; others stand for themselves in every text. They have the
    ids that the folder declares, in place of what the model had there; one that is only named has the piece of that
    spelling, else the next free id. UserError for ids that cannot be.
    """
    declared = added_tokens(path.parent)
    if not declared:
        return content
    processor = open_model(path, content)
    tokens = _with_ids(declared, processor, special_names(path.parent).get("pad_token"))
    changed = {token.id: token for token in tokens if not _has(processor, token)}
    if not changed:
        return content
    size = processor.vocab_size()
    if max(changed) >= size + _MOST_NEW_PIECES:
        token = changed[max(changed)]
        raise UserError(
            f"{path.parent}: the id {token.id} of the added token {token.text!r} is far beyond the {size} pieces of "
            f"{path.name}; correct tokenizer_config.json (added_tokens_decoder) or added_tokens.json"
        )
    pieces = {number: (token.text, _type_of(token, processor)) for number, token in changed.items()}
    for number in range(size, max(changed)):
        pieces.setdefault(number, _unused(number))
    for token in changed.values():  # a piece of the same spelling elsewhere gives way
        older = _find(processor, token.text)
        if older is not None and older not in changed:
            pieces[older] = _unused(older)
    return _with_pieces(content, pieces)


def find_piece(processor: sentencepiece.SentencePieceProcessor, text: str | None) -> int:
    """The id of the piece that is spelt `text`, -1 if there is none."""
    found = None if text is None else _find(processor, text)
    return -1 if found is None else found


def _find(processor: sentencepiece.SentencePieceProcessor, text: str) -> int | None:
    number = processor.piece_to_id(text)
    return number if processor.id_to_piece(number) == text else None


def _has(processor: sentencepiece.SentencePieceProcessor, token: AddedToken) -> bool:
    """Whether the model has this token under its id, of a type that does what is asked."""
    if token.id >= processor.vocab_size() or processor.id_to_piece(token.id) != token.text:
        return False
    is_text = not (processor.is_control(token.id) or processor.is_unknown(token.id))
    return not (token.is_special and is_text)


def _with_ids(
    tokens: Sequence[AddedToken], processor: sentencepiece.SentencePieceProcessor, pad: str | None
) -> list[AddedToken]:
    """Every token with an id. Those that the model lacks follow its last one, in their order, as in transformers.

    A pad at the very end is left out: rows can be filled with any id, and the network may not have that one.
    """
    known, missing = [], []
    for token in tokens:
        number = _find(processor, token.text) if token.id is None else token.id
        (missing if number is None else known).append(replace(token, id=number))
    if missing and missing[-1].text == pad:
        missing.pop()
    end = max([processor.vocab_size() - 1, *(token.id for token in known)]) + 1
    return [*known, *(replace(token, id=number) for number, token in enumerate(missing, end))]


def _type_of(token: AddedToken, processor: sentencepiece.SentencePieceProcessor) -> int:
    if token.id < processor.vocab_size() and processor.is_unknown(token.id):
        return UNKNOWN  # a model needs one
    return CONTROL if token.is_special else USER_DEFINED


def _unused(number: int) -> tuple[str, int]:
    return f"<unused_piece_{number}>", UNUSED


def _with_pieces(content: bytes, pieces: Mapping[int, tuple[str, int]]) -> bytes:
    """The model with these pieces, id -> (text, type), in place of its own or behind its last."""
    pieces = {
        number: bytes_field(PIECES, bytes_field(PIECE, text.encode()) + number_field(TYPE, kind))
        for number, (text, kind) in pieces.items()
    }
    own, others = bytearray(), bytearray()
    count = 0
    for field, _, written in fields(content):
        if field == PIECES:
            own += pieces.pop(count, written)
            count += 1
        else:
            others += written
    behind = (pieces[number] for number in sorted(pieces))
    return bytes(own + b"".join(behind) + others)
