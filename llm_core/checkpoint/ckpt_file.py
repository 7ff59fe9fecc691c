"""MindSpore's .ckpt files, without MindSpore and without protobuf's 2 GiB limit on a message.

A .ckpt is a sequence of protobuf messages `Checkpoint{value: {tag, tensor: {dims, tensor_type, tensor_content}}}`;
a tensor above 512 MiB is several such messages in a row under one tag. Optionally the last 17 bytes are
`crc_num` and the crc32 of all before, big-endian. (Format: mindspore/train/serialization.py, checkpoint.proto.)
Only the few field kinds that occur are parsed, by offset, so that a tensor is read when it is asked for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llm_core.checkpoint.dtypes import BY_MINDSPORE, Head, decode, encode
from llm_core.checkpoint.protobuf import DamagedMessageError, field_start, fields, number_field, read_varint
from llm_core.checkpoint.staged import StagedFile
from llm_core.errors import UserError

_PIECE_BYTES = 512 * 2**20  # upstream's slice: MindSpore reads these back as one tensor
_CRC_MARK = b"crc_num"
_CRC_BYTES = len(_CRC_MARK) + 10


class CkptFile:
    """A .ckpt file opened for reading. `heads` is known at once; `read(name)` reads one tensor.

    Raises UserError naming the file when it is cut short, encrypted or no .ckpt at all.
    """

    metadata: dict[str, str] = {}

    def __init__(self, path: Path):
        self.path = path
        self.heads: dict[str, Head] = {}
        self._pieces: dict[str, list[tuple[int, int]]] = {}
        self._dims: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}
        self._file = open(path, "rb")
        try:
            size = path.stat().st_size
            self._crc = self._read_crc(size)
            self._end = size - (_CRC_BYTES if self._crc is not None else 0)
            self._file.seek(0)
            for number, start, length in fields(self._file, self._end):
                if number != 1 or length < 0:
                    raise DamagedMessageError
                self._take_value(start, start + length)
            if not self._pieces:
                raise DamagedMessageError
            for name in self._pieces:
                self._take_head(name)
        except (DamagedMessageError, UnicodeDecodeError):
            self._file.close()
            raise UserError(f"{path}: cut short, encrypted, or not a MindSpore .ckpt file") from None
        except BaseException:
            self._file.close()
            raise

    def _read_crc(self, size: int) -> int | None:
        if size < _CRC_BYTES:
            return None
        self._file.seek(size - _CRC_BYTES)
        tail = self._file.read(_CRC_BYTES)
        return int.from_bytes(tail[len(_CRC_MARK):], "big") if tail.startswith(_CRC_MARK) else None

    def _text(self, start: int, length: int) -> str:
        if length > 4096:
            raise DamagedMessageError
        self._file.seek(start)
        return self._file.read(length).decode()

    def _take_value(self, start: int, end: int) -> None:
        self._file.seek(start)
        name, tensor = None, None
        for number, offset, length in fields(self._file, end):
            if length < 0 or number not in (1, 2):
                raise DamagedMessageError  # 3 is a MapTensor, a hash table: no language model has one
            if number == 1:
                name = self._text(offset, length)
            else:
                tensor = (offset, offset + length)
        if name is None or tensor is None:
            raise DamagedMessageError
        self._take_tensor(name, *tensor)

    def _take_tensor(self, name: str, start: int, end: int) -> None:
        dims: list[int] = []
        kind, content = None, None
        self._file.seek(start)
        for number, offset, length in fields(self._file, end):
            if number == 1 and length < 0:
                dims.append(offset)
            elif number == 1:  # the packed form of a repeated field
                self._file.seek(offset)
                while self._file.tell() < offset + length:
                    dims.append(read_varint(self._file, offset + length))
            elif number == 2 and length >= 0:
                kind = self._text(offset, length)
            elif number == 3 and length >= 0:
                content = (offset, length)
        if kind is None or content is None:
            raise DamagedMessageError
        self._dims[name], self._types[name] = tuple(dims), kind
        self._pieces.setdefault(name, []).append(content)

    def _take_head(self, name: str) -> None:
        kind, dims = self._types[name], self._dims[name]
        if kind == "str":
            return  # a line of text that a callback added (append_dict), no tensor
        if kind not in BY_MINDSPORE:
            raise UserError(f"{self.path}: {name} has element type {kind}, which is not supported")
        dtype = BY_MINDSPORE[kind]
        stored = sum(length for _, length in self._pieces[name])
        if dims == (0,) and stored:
            dims = ()  # upstream's form of a scalar
        head = Head(dtype, dims)
        if head.nbytes != stored:
            raise UserError(f"{self.path}: the file is damaged: {name} {list(dims)} does not fit its {stored} bytes")
        self.heads[name] = head

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a new array (bfloat16 as float32)."""
        head = self.heads[name]
        words = np.empty(head.size, head.dtype.stored)
        target = words.view(np.uint8)
        filled = 0
        for offset, length in self._pieces[name]:
            self._file.seek(offset)
            if length and self._file.readinto(target[filled:filled + length]) != length:
                raise UserError(f"{self.path}: the file was cut short while it was read")
            filled += length
        return decode(words, head.dtype, head.shape)

    def verify(self) -> None:
        """Check the file's crc32, where it has one."""
        if self._crc is None:
            return
        self._file.seek(0)
        crc, left = 0, self._end
        while left:
            block = self._file.read(min(left, 1 << 20))
            crc = zlib.crc32(block, crc)
            left -= len(block)
        if crc != self._crc:
            raise UserError(f"{self.path}: the file is damaged (its crc does not match); use another copy")

    def close(self) -> None:
        self._file.close()


def _message_start(name: str, head: Head, content_bytes: int) -> bytes:
    """All of one `Checkpoint` message but the tensor's content, which ends it."""
    tag, kind = name.encode(), head.dtype.mindspore.encode()
    tensor = b"".join(number_field(1, n) for n in head.shape or (0,))
    tensor += field_start(2, len(kind)) + kind + field_start(3, content_bytes)
    value = field_start(1, len(tag)) + tag + field_start(2, len(tensor) + content_bytes) + tensor
    return field_start(1, len(value) + content_bytes) + value


def _piece_sizes(head: Head) -> list[int]:
    whole, rest = divmod(head.nbytes, _PIECE_BYTES)
    return [_PIECE_BYTES] * whole + ([rest] if rest or not whole else [])


def ckpt_size(heads: Mapping[str, Head]) -> int:
    """Bytes that the file will have."""
    return _CRC_BYTES + sum(
        len(_message_start(name, head, piece)) + piece for name, head in heads.items() for piece in _piece_sizes(head)
    )


def write_ckpt(staged: StagedFile, heads: Mapping[str, Head], read: Callable[[str], np.ndarray]) -> None:
    """Write the tensors that `heads` lists into `staged`, with a crc; `read(name)` is called once each, in order."""
    crc = 0
    for name, head in heads.items():
        data = encode(read(name), head.dtype).view(np.uint8)
        position = 0
        for piece in _piece_sizes(head):
            start = _message_start(name, head, piece)
            content = data[position:position + piece]
            staged.write(start)
            staged.write(content)
            crc = zlib.crc32(content, zlib.crc32(start, crc))
            position += piece
    staged.write(_CRC_MARK + crc.to_bytes(10, "big"))
