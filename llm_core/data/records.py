"""Token records on disk: MindRecord files, each with a manifest of counts and hashes beside it.

    with RecordWriter("out/wiki.mindrecord", columns={"input_ids": 257}, manifest={...}) as writer:
        writer.write_rows({"input_ids": ids})                 # int32 [N, 257], any number of times
    records = RecordFile("out/wiki.mindrecord")
    records.read(np.array([7, 0]))["input_ids"]               # int32 [2, 257]

Under a final name there is either nothing, the former whole file, or the new whole file. Files written by
MindFormers (no manifest) are read as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.data.manifest import SUFFIX, read_manifest
from llm_core.data.mindrecord import Damaged, Shard, read_header
from llm_core.data.record_writer import RecordWriter
from llm_core.disk import sha256
from llm_core.errors import EnvironmentFault, UserError

__all__ = ["RecordFile", "RecordWriter"]

_RECORD_NAME = re.compile(r"mindrecord\d*$")


class RecordFile:
    """All records of one MindRecord (any of its shards, or their common name), or of a folder of MindRecords.

    A folder is searched, like MindFormers does, through its subfolders for names that end in `mindrecord` and
    digits; records are numbered file by file in the order of the sorted names. Opening checks existence,
    sizes, indexes and that all files have the same columns, without reading the data; `verify` hashes it.

    num_records: int. columns: name -> width (int32 values a record, as in the first record). files: the data
    files in order. manifests: manifest file -> its content (none for files of MindFormers).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with _environment_faults(self.path):
            self.files = _find_files(self.path)
            self.manifests = _find_manifests(self.files)
            self._check_sizes()
            self._shards = [Shard(file) for file in self.files]
        self._ends = np.cumsum([shard.num_records for shard in self._shards])
        self.num_records = int(self._ends[-1])
        if self.num_records == 0:
            raise UserError(f"{self.path}: no records in it. Write the data set again from more text.")
        self.columns = self._common_columns()

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Records by number, int [n] (0 <= number < num_records, any order) -> {name: int32 [n, width]}.

        UserError names file and record where the data is damaged or a record has another width;
        EnvironmentFault where the disk fails.
        """
        numbers = np.asarray(indices, np.int64).reshape(-1)
        batch = {name: np.empty((len(numbers), width), np.int32) for name, width in self.columns.items()}
        for position, number in enumerate(numbers):
            shard, row = self._locate(int(number))
            try:
                with _environment_faults(shard.path):
                    record = shard.row(row)
            except Damaged as error:
                raise UserError(
                    f"{shard.path}: record {row} is damaged: {error}. Copy the file again, or write the data set again."
                ) from None
            for name, width in self.columns.items():
                batch[name][position] = _checked(record[name], name, width, shard.path, row)
        return batch

    def describe(self, number: int) -> str:
        """`FILE: record ROW` of the record with this number, for messages."""
        shard, row = self._locate(number)
        return f"{shard.path}: record {row}"

    @property
    def fingerprint(self) -> str | None:
        """A hash of the files' contents by their manifests; None where a file has none (MindFormers' own)."""
        hashes = sorted(file["sha256"] for manifest in self.manifests.values() for file in manifest["files"].values())
        return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16] if hashes else None

    def verify(self) -> int:
        """Hash every file that a manifest lists; returns how many. UserError names the first that differs."""
        checked = 0
        for manifest_path, manifest in self.manifests.items():
            for name, facts in manifest["files"].items():
                with _environment_faults(manifest_path.parent / name):
                    found = sha256(manifest_path.parent / name)
                if found != facts["sha256"]:
                    raise UserError(
                        f"{manifest_path.parent / name}: damaged: its sha256 is not the one in "
                        f"{manifest_path.name}. Copy it again, or write the data set again."
                    )
                checked += 1
        return checked

    def close(self) -> None:
        """Close the files."""
        for shard in self._shards:
            shard.close()

    def _locate(self, number: int) -> tuple[Shard, int]:
        if not 0 <= number < self.num_records:
            raise IndexError(f"record {number} of {self.num_records}")
        which = int(np.searchsorted(self._ends, number, side="right"))
        return self._shards[which], number - int(self._ends[which - 1] if which else 0)

    def _check_sizes(self) -> None:
        for manifest_path, manifest in self.manifests.items():
            for name, facts in manifest["files"].items():
                file = manifest_path.parent / name
                if not file.exists():
                    raise UserError(f"{file}: missing, but {manifest_path.name} lists it. Copy it.")
                if file.stat().st_size != facts["bytes"]:
                    raise UserError(
                        f"{file}: {file.stat().st_size} bytes, but {manifest_path.name} says "
                        f"{facts['bytes']}: cut or replaced. Copy it again, or write the data set again."
                    )

    def _common_columns(self) -> dict[str, int]:
        first = next(shard for shard in self._shards if shard.num_records)
        if not first.columns:
            raise UserError(f"{first.path}: no column of int32 or int64 arrays in it (input_ids is needed).")
        for shard in self._shards:
            if set(shard.columns) != set(first.columns):
                raise UserError(
                    f"{shard.path}: columns {sorted(shard.columns)}, but {first.path} has "
                    f"{sorted(first.columns)}: files of one data set must have the same columns. Put them "
                    "into different folders."
                )
        try:
            record = first.row(0)
        except Damaged as error:
            raise UserError(f"{first.path}: record 0 is damaged: {error}. Write the data set again.") from None
        return {name: len(record[name]) for name in first.columns}


@contextlib.contextmanager
def _environment_faults(path: Path) -> Iterator[None]:
    """No permission, a disk that fails -> EnvironmentFault."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(f"{error.filename or path}: cannot read: {error.strerror or error}") from error


def _checked(values: np.ndarray, name: str, width: int, path: Path, row: int) -> np.ndarray:
    if len(values) != width:
        raise UserError(
            f"{path}: record {row} has {len(values)} {name}, the first record {width}: all records must "
            "have one length. Write the data set again."
        )
    if len(values) and (values.min() < -(2**31) or values.max() >= 2**31):
        raise UserError(f"{path}: record {row}: a value of {name} does not fit int32. Write the data set again.")
    return values


def _find_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = []
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            found += [Path(folder) / name for name in names if _RECORD_NAME.search(name)]
        if not found:
            raise UserError(f"{path}: no *.mindrecord in this folder. Give the folder or file of the records.")
        return sorted(found)
    if not path.exists():
        shards = sorted(f for f in path.parent.iterdir() if re.fullmatch(re.escape(path.name) + r"\d+", f.name))
        if not shards:
            raise UserError(f"{path}: no such file or folder. Give a MindRecord file or a folder of them.")
        path = shards[0]
    return _with_its_shards(path)


def _with_its_shards(path: Path) -> list[Path]:
    names = [str(name) for name in read_header(path)["shard_addresses"]]
    if len(names) < 2 or path.name not in names:
        return [path]
    for name in names:
        if not (path.parent / name).exists():
            raise UserError(f"{path.parent / name}: missing: {path.name} is one of {len(names)} shards. Copy them all.")
    return [path.parent / name for name in names]


def _find_manifests(files: list[Path]) -> dict[Path, dict[str, Any]]:
    """Each data file's manifest lies beside it, under its own name or the name that its shards share."""
    manifests = {}
    for file in files:
        for base in (file.name, re.sub(r"\d+$", "", file.name)):
            manifest_path = file.with_name(base + SUFFIX)
            manifest = read_manifest(manifest_path)
            if manifest.get("incomplete"):
                raise UserError(
                    f"{file}: its writer was stopped while it moved the files into place. Write the data set again."
                )
            if file.name in manifest.get("files", {}):
                manifests[manifest_path] = manifest
                break
    return manifests
