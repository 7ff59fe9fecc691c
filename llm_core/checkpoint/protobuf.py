"""As much of protobuf's wire format as MindSpore's files need: varints and length-delimited fields, by offset.

MindSpore's .ckpt passes protobuf's limit of 2 GiB a message, so its fields are found without being read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

_VARINT, _LENGTH_DELIMITED = 0, 2
_SIGN = 1 << 63


class DamagedMessageError(Exception):
    """The bytes are no message of this kind."""


def read_varint(file: BinaryIO, end: int) -> int:
    """The unsigned number at the file's position, which ends before `end`."""
    value = shift = 0
    while True:
        byte = file.read(1)
        if not byte or file.tell() > end or shift > 63:
            raise DamagedMessageError
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
        shift += 7


def fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, offset, length) of each length-delimited field up to `end`; a varint has length -1 and its
    value in the offset's place. After each yield the file may be anywhere."""
    position = file.tell()
    while position < end:
        file.seek(position)
        key = read_varint(file, end)
        number, kind = key >> 3, key & 7
        value = read_varint(file, end)
        if kind == _VARINT:
            position = file.tell()
            yield number, value, -1
        elif kind == _LENGTH_DELIMITED:
            start = file.tell()
            position = start + value
            if position > end:
                raise DamagedMessageError
            yield number, start, value
        else:
            raise DamagedMessageError


def parse(message: bytes) -> dict[int, list]:
    """A small message: field number -> its values in order, bytes or signed numbers."""
    values: dict[int, list] = {}
    for number, offset, length in fields(io.BytesIO(message), len(message)):
        value = message[offset : offset + length] if length >= 0 else _signed(offset)
        values.setdefault(number, []).append(value)
    return values


def numbers(values: list) -> list[int]:
    """The numbers of a repeated field, packed (one value of bytes) or not."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        file = io.BytesIO(value)
        while file.tell() < len(value):
            found.append(_signed(read_varint(file, len(value))))
    return found


def _signed(value: int) -> int:
    return value - 2 * _SIGN if value >= _SIGN else value


def varint(value: int) -> bytes:
    """A number; a negative one as its 64-bit complement."""
    value &= 2 * _SIGN - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number_field(number: int, value: int) -> bytes:
    """A field that holds a number."""
    return varint(number << 3 | _VARINT) + varint(value)


def field_start(number: int, length: int) -> bytes:
    """What stands before the `length` bytes of a field."""
    return varint(number << 3 | _LENGTH_DELIMITED) + varint(length)


def bytes_field(number: int, content: bytes) -> bytes:
    """A field that holds bytes, text or a message."""
    return field_start(number, len(content)) + content
