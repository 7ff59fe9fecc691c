"""SentencePiece models (Llama, InternLM): offsets at the speed of plain encoding, byte-exact streaming."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from llm_core.errors import UserError
from llm_core.text.tokenizer import SpecialToken, Tokenizer

_SPACE = "▁"

# Field numbers of sentencepiece_model.proto.
_NORMALIZER_SPEC = 3  # in ModelProto
_CHARACTER_MAP, _REMOVE_EXTRA_WHITESPACES = 2, 4  # in NormalizerSpec


class SentencePieceTokenizer(Tokenizer):
    """A .model file. Works with sentencepiece 0.1.99 to 0.2.3, whose Python interfaces differ."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        if hasattr(sentencepiece, "set_min_log_level"):
            sentencepiece.set_min_log_level(2)  # InternLM's null piece draws a warning at every load
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(content)
        except (RuntimeError, ValueError) as error:
            reason = str(error).rsplit("] ", 1)[-1].strip() or "it cannot be parsed"
            raise UserError(
                f"{path}: not a SentencePiece model, or damaged ({reason}); copy it again or name another"
            ) from None
        self._has_numpy = hasattr(self._sp, "EncodeAsNumpy")
        self._has_offset_mapping = hasattr(self._sp, "EncodeAsOffsetMapping")
        self.vocab_size = self._sp.vocab_size()
        self.bos_id, self.eos_id = self._sp.bos_id(), self._sp.eos_id()
        self.pad_id, self.unk_id = self._sp.pad_id(), self._sp.unk_id()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer."""
        return self._sp.encode(list(texts), num_threads=1)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer."""
        if self._has_numpy:
            return self._sp.encode(list(texts), num_threads=1, return_type="numpy")
        return super().encode_arrays(texts)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See Tokenizer. Of the byte pieces of one character the last has its span, the others are empty."""
        if self._has_offset_mapping:
            found = self._sp.encode(text, return_type="offset_mapping")
            return found["ids"], found["offsets"]
        # the immutable proto counts characters, the plain one bytes
        pieces = self._sp.encode(text, out_type="immutable_proto").pieces
        return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]

    def encode_parts(self, rows: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """See Tokenizer.

        Asking the library for offsets triples the time of encoding. But where a model leaves the text as it is, the
        pieces tile it, and offsets are the running sum of the pieces' lengths; where it normalizes the text, or the
        lengths don't add up (an unknown character), the library is asked.
        """
        if rows and self._tiles_text:
            parts = self._parts_by_lengths(rows)
            if parts is not None:
                return parts
            if len(rows) > 1:  # row by row: only those that need it take the slow way
                each = [self.encode_parts([row]) for row in rows]
                return tuple(np.concatenate(arrays) for arrays in zip(*each, strict=True))
        return super().encode_parts(rows)

    def _parts_by_lengths(self, rows: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray] | None:
        """All rows at once; None if in one of them the lengths don't add up."""
        if not all(row and row[0] for row in rows):
            return None
        arrays = self.encode_arrays(["".join(parts) for parts in rows])
        ids = np.concatenate(arrays)
        token_ends = np.cumsum(self._piece_lengths[ids])
        lengths = np.array([_utf8_length(part) for row in rows for part in row])
        next_rows = np.cumsum([len(row) for row in rows])
        lengths[np.append(0, next_rows[:-1])] += self._prefix_length
        part_ends = np.cumsum(lengths)
        row_ends = token_ends[np.cumsum([len(array) for array in arrays]) - 1]
        if not np.array_equal(row_ends, part_ends[next_rows - 1]):
            return None
        before = np.searchsorted(token_ends, part_ends, side="right")
        return ids, np.diff(before, prepend=0)

    def id_to_piece(self, token: int) -> str:
        """See Tokenizer."""
        self._check_ids([token])
        return self._sp.id_to_piece(int(token))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """See Tokenizer."""
        self._check_ids(ids)
        stream = SentencePieceStream(self, skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    @cached_property
    def special_tokens(self) -> list[SpecialToken]:
        """See Tokenizer. Control pieces; the unknown piece is none: no template writes it."""
        controls = [token for token in range(self.vocab_size) if self._sp.is_control(token)]
        return [SpecialToken(self._sp.id_to_piece(token), (token,)) for token in controls]

    def stream(self) -> SentencePieceStream:
        """See Tokenizer."""
        return SentencePieceStream(self)

    @cached_property
    def _piece_lengths(self) -> np.ndarray:
        """Bytes of text that each piece stands for, int64 [vocab]; of the unknown piece that is not known."""
        lengths = np.array([len(self._bytes_of(token)) for token in range(self.vocab_size)], np.int64)
        lengths[self.unk_id] = 1 << 32  # no sum with it in it is right
        return lengths

    @cached_property
    def _prefix_length(self) -> int:
        """1 if encoding puts a space before a text, else 0."""
        return int(self._sp.id_to_piece(self._sp.encode("a")[0]).startswith(_SPACE))

    @cached_property
    def _tiles_text(self) -> bool:
        """Whether the model's normalizer leaves a text as it is: no character map, and all spaces kept."""
        model = dict(_protobuf_fields(self._sp.serialized_model_proto()))
        normalizer = dict(_protobuf_fields(model.get(_NORMALIZER_SPEC, b"")))
        return not normalizer.get(_CHARACTER_MAP) and normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1) == 0

    def _bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes of a piece; control pieces have none, the unknown piece has the library's ' ⁇ '."""
        if self._sp.is_control(token):
            return b""
        if self._sp.is_unknown(token):
            return self._sp.decode([token]).encode()
        piece = self._sp.id_to_piece(token)
        if self._sp.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        return piece.replace(_SPACE, " ").encode()

    @cached_property
    def _leading_spaces_dropped(self) -> int:
        """How many spaces decoding takes from the front: 0, the 1 that encoding put there, or all (-1)."""
        if self._sp.decode([_SPACE, _SPACE + "a"]) == "a":
            return -1
        return 1 if self._sp.decode([_SPACE + "a"]) == "a" else 0


class SentencePieceStream:
    """See TextStream. The pieces' bytes through an incremental UTF-8 decoder, less the space in front."""

    def __init__(self, tokenizer: SentencePieceTokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._spaces_to_drop = tokenizer._leading_spaces_dropped

    def push(self, token: int) -> str:
        """See TextStream."""
        tokenizer = self._tokenizer
        tokenizer._check_ids([token])
        if not self._skip_special and tokenizer._sp.is_control(int(token)):
            return self._utf8.decode(b"", final=True) + tokenizer.id_to_piece(token)
        return self._drop_spaces(self._utf8.decode(tokenizer._bytes_of(int(token))))

    def flush(self) -> str:
        """See TextStream."""
        return self._utf8.decode(b"", final=True)

    def _drop_spaces(self, text: str) -> str:
        if not text or not self._spaces_to_drop:
            return text
        if self._spaces_to_drop < 0:
            text = text.lstrip(" ")
            self._spaces_to_drop = 0 if text else -1
            return text
        self._spaces_to_drop = 0
        return text.removeprefix(" ")


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; bytes for strings and messages. (The format in one function: the
    protobuf package is no dependency of sentencepiece.)"""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}[wire_type] if wire_type != 2 else varint()
        yield number, message[position : position + length]
        position += length
