"""Random access to the integer columns of one MindRecord file, read directly from the file and its index.

MindSpore's own reader streams; a single batch costs it 8-16 ms for a fresh pipeline, it starts threads that
compete with the train step, and it trusts damaged files. Here a row is one `pread` and one vectorized decode,
every length in the file is checked against the others, and MindSpore need not be imported.

The layout, MindRecord 3.0 (what `mindspore.mindrecord.FileWriter` of 1.x and 2.x writes; a test compares this
reader with MindSpore's):

    data file   u64 (little endian) length of a JSON header, the header, zeros to `header_size`, then pages of
                `page_size` bytes. A row in a blob page: u64 (little endian) length of what follows, then the
                array columns in the header's `blob_fields` order, each after its own u64 (big endian) length
                unless it is the only one.
    int column  u32 (big endian) count; 2 bits per value (first value in the highest bits) saying that it
                takes 1, 2, 4 or 8 bytes; the values, little endian, signed.
    <file>.db   SQLite: table INDEXES holds page and offsets of each row.
"""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import numpy as np

from llm_core.errors import UserError

# Of each bitmap byte's four values: width in bytes; which bytes of an int64 they fill when they are pushed to its
# high end (so that shifting back extends the sign); and that shift.
_WIDTHS = 1 << ((np.arange(256)[:, None] >> np.array([6, 4, 2, 0])) & 3)
_FILLED = (np.arange(8) >= 8 - _WIDTHS[:, :, None]).reshape(256, 32)
_SHIFTS = 64 - 8 * _WIDTHS
_MAX_HEADER_BYTES = 128 << 20


class Damaged(ValueError):
    """Bytes of a row contradict each other; the caller knows which file and record."""


def decode_integers(blob: np.ndarray) -> np.ndarray:
    """One compressed integer column (uint8 [bytes]) -> int64 [count]. Raises `Damaged`."""
    if blob.size < 4:
        raise Damaged("a column is shorter than its count")
    count = int.from_bytes(blob[:4].tobytes(), "big")
    first_value = 4 + (count + 3) // 4
    if first_value > blob.size:
        raise Damaged(f"a column of {blob.size} bytes claims {count} values")
    bitmap, values = blob[4:first_value], blob[first_value:]
    filled = _FILLED[bitmap].reshape(-1)[: 8 * count]
    if np.count_nonzero(filled) != values.size:
        raise Damaged(f"{count} values should take {np.count_nonzero(filled)} bytes and take {values.size}")
    wide = np.zeros(8 * count, np.uint8)
    wide[filled] = values
    return wide.view("<i8") >> _SHIFTS[bitmap].reshape(-1)[:count]


def read_header(path: Path) -> dict:
    """The header of a data file; `shard_addresses` are the names of all files of its data set, in order.

    UserError where the file is absent, empty or no MindRecord.
    """
    size = _size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if not 2 <= length <= min(size, _MAX_HEADER_BYTES) - 8:
                raise ValueError("no header")
            header = json.loads(file.read(length))
            header["header_size"], header["page_size"], header["page"], header["shard_addresses"]
            header["schema"][0]["schema"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise UserError(
                f"{path}: not a MindRecord file (no readable header), or damaged. Write it with "
                "tools/dataset_preprocess, or give the right file."
            ) from None
    if str(header.get("version")) != "3.0":
        raise UserError(
            f"{path}: MindRecord version {header.get('version')}; only 3.0 can be read. Write the data set again "
            "with tools/dataset_preprocess."
        )
    return header


class Shard:
    """One data file with its `.db`: `num_records`, `columns` (names of integer array columns), `row(i)`.

    Opening checks existence, header, index, and that every row lies inside the file. UserError otherwise.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None
        size = _size(path)
        if not _index_path(path).exists():
            raise UserError(
                f"{path}: its index {_index_path(path).name} is missing. A MindRecord is two files that "
                f"belong together: copy {_index_path(path).name} beside it, or write the data set again."
            )
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        header = read_header(path)
        self._blob_fields: list[str] = list(header["schema"][0].get("blob_fields", []))
        fields = header["schema"][0]["schema"]
        self.columns = [n for n in self._blob_fields if fields[n].get("type") in ("int32", "int64")]
        self._starts, self._lengths = self._read_index(header, size)

    @property
    def num_records(self) -> int:
        """Number of rows in this file."""
        return len(self._starts)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Integer columns of row `index` (0-based within this file), each int64 [width]. Raises `Damaged`."""
        length = int(self._lengths[index])
        raw = os.pread(self._file, length, int(self._starts[index]))
        if len(raw) != length:
            raise Damaged("the file ends inside the record")
        if int.from_bytes(raw[:8], "little") != length - 8:
            raise Damaged("its length in the data file is not its length in the index")
        blob = np.frombuffer(raw, np.uint8)[8:]
        if len(self._blob_fields) == 1:
            return {self._blob_fields[0]: decode_integers(blob)}
        return self._split(blob)

    def _split(self, blob: np.ndarray) -> dict[str, np.ndarray]:
        columns = {}
        position = 0
        for name in self._blob_fields:
            length = int.from_bytes(blob[position : position + 8].tobytes(), "big")
            position += 8
            if position + length > blob.size:
                raise Damaged(f"column {name} reaches past the end of the record")
            if name in self.columns:
                columns[name] = decode_integers(blob[position : position + length])
            position += length
        if position != blob.size:
            raise Damaged("the columns do not fill the record")
        return columns

    def _read_index(self, header: dict, size: int) -> tuple[np.ndarray, np.ndarray]:
        """File offset int64 [rows] and length int64 [rows] (with the leading u64) of every row."""
        index = _index_path(self.path)
        query = "SELECT PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END FROM INDEXES ORDER BY ROW_ID"
        try:
            # immutable: nobody writes it, and no journal is looked for on a read-only disk
            connection = sqlite3.connect(f"{index.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
            try:
                rows = np.array(connection.execute(query).fetchall(), np.int64).reshape(-1, 3)
            finally:
                connection.close()
        except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"{index}: not the index of a MindRecord, or damaged ({error}). Write the data set again."
            ) from None
        starts = header["header_size"] + rows[:, 0] * header["page_size"] + rows[:, 1]
        lengths = rows[:, 2] - rows[:, 1]
        expected = max((p["end_row_id"] for p in header["page"] if p["page_type"] == "BLOB_DATA"), default=0)
        if len(rows) != expected:
            raise UserError(
                f"{self.path}: its header counts {expected} records and its index {index.name} {len(rows)}: "
                "the two do not belong together, or one is cut. Copy both, or write the data set again."
            )
        if len(rows) and ((starts + lengths).max() > size or lengths.min() < 8):
            raise UserError(
                f"{self.path}: truncated: {size} bytes, but its index reaches to {(starts + lengths).max()}. "
                "Copy it again, or write the data set again."
            )
        return starts, lengths

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.close()


def _index_path(path: Path) -> Path:
    return path.with_name(path.name + ".db")


def _size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give a MindRecord file or a folder of them.") from None
    if size == 0:
        raise UserError(f"{path}: empty (0 bytes). Write the data set again.")
    return size
