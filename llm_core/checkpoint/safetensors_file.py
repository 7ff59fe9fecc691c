"""safetensors files, a tensor at a time.

The format is eight bytes of header length, a JSON header, and the tensors' bytes; it is read and written here
because the `safetensors` package wants a file's tensors all in memory at once, has no bfloat16 under numpy, and
writes the raw memory of a strided array. The tests hold both directions against that package.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llm_core.checkpoint.dtypes import BY_SAFETENSORS, Head, decode, encode
from llm_core.checkpoint.staged import StagedFile
from llm_core.errors import UserError

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # the safetensors package's own limit


class SafetensorsFile:
    """A safetensors file opened for reading. `heads` is known at once; `read(name)` reads one tensor.

    Raises UserError naming the file when it is cut short or is not safetensors.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "rb")
        try:
            self._data_start, header = self._read_header()
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self.heads: dict[str, Head] = {}
            self._offsets: dict[str, int] = {}
            for name, entry in header.items():
                self._take_entry(name, entry)
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> tuple[int, dict]:
        size = self.path.stat().st_size
        length = int.from_bytes(self._file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > _LARGEST_HEADER:
            raise UserError(f"{self.path}: not a safetensors file")
        start = _LENGTH_BYTES + length
        if size < start:
            raise UserError(f"{self.path}: the file is cut short: {size} bytes, its header alone has {length}")
        try:
            header = json.loads(self._file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = start + max(ends, default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise self._damaged(str(error)) from error
        if size != expected:
            what = "cut short" if size < expected else "longer than its header says"
            raise UserError(f"{self.path}: the file is {what}: {size} bytes instead of {expected}")
        return start, header

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: not a safetensors file, or its header is damaged: {what}")

    def _take_entry(self, name: str, entry: dict) -> None:
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
            dtype = BY_SAFETENSORS.get(kind)
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(f"{name}: {error}") from error
        if dtype is None:
            raise UserError(
                f"{self.path}: {name} has element type {kind}, which is not supported "
                f"(supported: {', '.join(BY_SAFETENSORS)}); dequantize the weights first"
            )
        head = Head(dtype, shape)
        if min(begin, *shape, 0) < 0 or end - begin != head.nbytes:
            raise self._damaged(f"{name} {list(shape)} does not fit its {end - begin} bytes")
        self.heads[name] = head
        self._offsets[name] = self._data_start + begin

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a new array (bfloat16 as float32)."""
        return decode(self._words(name), self.heads[name].dtype, self.heads[name].shape)

    def _words(self, name: str) -> np.ndarray:
        head = self.heads[name]
        words = np.empty(head.size, head.dtype.stored)
        self._file.seek(self._offsets[name])
        if head.nbytes and self._file.readinto(words.view(np.uint8)) != head.nbytes:
            raise UserError(f"{self.path}: the file was cut short while it was read")
        return words

    def verify(self) -> None:
        """Check the crc that MindSpore writes when asked (`crc_check=True`); other files carry none."""
        if "crc_num" not in self.metadata:
            return
        crc = 0
        for name in sorted(self.heads):
            crc = zlib.crc32(self._words(name), zlib.crc32(name.encode(), crc))
        if str(crc) != self.metadata["crc_num"]:
            raise UserError(f"{self.path}: the file is damaged (its crc does not match); use another copy")

    def close(self) -> None:
        self._file.close()


def _layout(heads: Mapping[str, Head], metadata: Mapping[str, str]) -> tuple[list[str], bytes]:
    """Order of the tensors (wide types first, so that each starts aligned) and the header's bytes."""
    order = sorted(heads, key=lambda name: -heads[name].dtype.stored.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        head = heads[name]
        end = offset + head.nbytes
        header[name] = {
            "dtype": head.dtype.safetensors, "shape": list(head.shape), "data_offsets": [offset, end]
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return order, text + b" " * (-len(text) % 8)


def safetensors_size(heads: Mapping[str, Head], metadata: Mapping[str, str]) -> int:
    """Bytes that the file will have."""
    _, header = _layout(heads, metadata)
    return _LENGTH_BYTES + len(header) + sum(head.nbytes for head in heads.values())


def write_safetensors(
    staged: StagedFile, heads: Mapping[str, Head], read: Callable[[str], np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write the tensors that `heads` lists into `staged`; `read(name)` is called once each, in file order."""
    order, header = _layout(heads, metadata)
    staged.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
    for name in order:
        staged.write(encode(read(name), heads[name].dtype))
