"""SentencePiece's model file: protocol buffers' wire format, and the numbers in sentencepiece_model.proto.

(The protobuf package is no dependency of sentencepiece.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

# Fields.
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # in ModelProto
PIECE, SCORE, TYPE = 1, 2, 3  # in SentencePiece
CHARACTER_MAP, SPACE_IN_FRONT, REMOVE_EXTRA_WHITESPACES = 2, 3, 4  # in NormalizerSpec
# Types of a piece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def fields(message: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """(field number, value, the field as it is written) of a message; values are bytes for strings and messages."""
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
        start = position
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            value: int | bytes = varint()
        else:
            length = {1: 8, 5: 4}[wire_type] if wire_type != 2 else varint()
            value = message[position : position + length]
            position += length
        yield number, value, message[start:position]


def number_field(field: int, value: int) -> bytes:
    """A field with an integer, a truth value or a member of an enumeration."""
    return _varint(field << 3) + _varint(value)


def bytes_field(field: int, value: bytes) -> bytes:
    """A field with a string or a message."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def float_field(field: int, value: float) -> bytes:
    """A field with a float32."""
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])
