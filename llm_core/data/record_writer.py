"""Writes records: a MindRecord with a manifest beside it, under its final name only when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llm_core.data.manifest import FORMAT, SUFFIX, read_manifest, write_json
from llm_core.data.mindrecord import Damaged, Shard
from llm_core.disk import fsync, sha256
from llm_core.errors import EnvironmentFault, UserError

_ROWS_PER_CALL = 500  # FileWriter costs the same for 1 row as for hundreds
_LEAST_FREE_BYTES = 32 << 20  # below this the disk counts as full
_FORBIDDEN_IN_NAME = set("\\/:*?\"<>|`&';")  # mindspore.mindrecord refuses them


class RecordWriter:
    """Writes equally long records to the MindRecord `path` (shards `path0`, `path1` ... if num_shards > 1).

    columns: name -> number of int32 values a record. manifest: JSON-able facts to keep beside the data
    (tokenizer, counts, ...); `writer.manifest` may be filled until `close`. `records`, `columns`, `files` and
    `format` in it are the writer's own.

    Rows go to a temporary folder beside the target, under the final file name (a MindRecord carries its name
    inside). `close` makes them durable and moves data, `.db` and manifest into place; `abort`, and leaving
    the `with` block by an exception, removes them. With several shards each call's rows are spread over all
    of them, so that the order of records on disk is not the order of writing.

    UserError: an impossible file name, nothing written. EnvironmentFault: the disk is full or refuses.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Mapping[str, int],
        manifest: Mapping[str, Any] | None = None,
        num_shards: int = 1,
    ):
        self.path = Path(path)
        self.columns = dict(columns)
        self.manifest: dict[str, Any] = dict(manifest or {})
        self.num_records = 0
        self._checksum = 0  # sum of the rows' CRCs: shards may hold them in any order
        _check_name(self.path)
        self._pending: list[dict[str, np.ndarray]] = []
        with _environment_faults(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale_folders(self.path)
            self._folder = Path(tempfile.mkdtemp(prefix=_temporary_prefix(self.path), dir=self.path.parent))
            self._folder_lock = _lock(self._folder)
        self._num_shards = num_shards
        self._writer: Any = self._open()

    def _open(self) -> Any:
        from mindspore.mindrecord import FileWriter

        with _environment_faults(self.path):
            writer = FileWriter(str(self._folder / self.path.name), self._num_shards, overwrite=True)
            writer.add_schema(
                {name: {"type": "int32", "shape": [-1]} for name in self.columns}, "token records"
            )
        return writer

    def write_rows(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append N records: rows[name] is an integer array [N, width] for every column, or ValueError."""
        arrays = {name: _as_int32(name, rows[name], width) for name, width in self.columns.items()}
        lengths = {len(array) for array in arrays.values()}
        if len(lengths) != 1 or set(rows) != set(self.columns):
            raise ValueError(f"columns {list(rows)} with {lengths} rows; wanted {list(self.columns)}")
        self.num_records += max(lengths)
        self._pending.extend({name: arrays[name][i] for name in arrays} for i in range(lengths.pop()))
        while len(self._pending) >= _ROWS_PER_CALL:
            self._flush(_ROWS_PER_CALL)

    def _flush(self, count: int) -> None:
        with _environment_faults(self.path):
            if shutil.disk_usage(self._folder).free < _LEAST_FREE_BYTES:
                raise OSError("the disk is full")
            self._writer.write_raw_data(self._pending[:count])
        self._checksum += sum(_row_checksum(row) for row in self._pending[:count])
        del self._pending[:count]

    def close(self) -> None:
        """Write what is pending, make it durable, and move data, `.db` and, last, the manifest into place."""
        if self._writer is None:
            return
        try:
            if self._pending:
                self._flush(len(self._pending))
            if self.num_records == 0:
                raise UserError(
                    f"{self.path}: not one record to write: the input has too little text for a record of "
                    f"{max(self.columns.values())} tokens. Give more text or a smaller --seq_length."
                )
            with _environment_faults(self.path):
                self._writer.commit()
                self._check_whole()
                self._move_into_place()
        finally:
            self.abort()

    def _check_whole(self) -> None:
        """Read everything back: MindSpore does not notice a failed write (disk quota, full disk)."""
        checksum = 0
        for name in self._shard_names():
            try:
                shard = Shard(self._folder / name)
                checksum += sum(_row_checksum(shard.row(index)) for index in range(shard.num_records))
                shard.close()
            except (UserError, Damaged) as error:
                raise OSError(
                    f"what was written cannot be read back (disk or quota full?): {error}"
                ) from None
        if checksum != self._checksum:
            raise OSError("what was written is read back differently (disk or quota full?)")

    def _shard_names(self) -> list[str]:
        if self._num_shards == 1:
            return [self.path.name]
        digits = len(str(self._num_shards - 1))
        return [f"{self.path.name}{index:0{digits}d}" for index in range(self._num_shards)]

    def _move_into_place(self) -> None:
        names = [name for shard in self._shard_names() for name in (shard, shard + ".db")]
        mark = self._folder / "mark"
        write_json(mark, {"format": FORMAT, "incomplete": True})
        files = {}
        for name in names:
            shutil.copymode(mark, self._folder / name)  # as the umask says; MindSpore makes them private
            fsync(self._folder / name)
            files[name] = {
                "bytes": (self._folder / name).stat().st_size,
                "sha256": sha256(self._folder / name),
            }
        final = {
            **self.manifest,
            "format": FORMAT,
            "records": self.num_records,
            "columns": self.columns,
            "files": files,
        }
        parent = self.path.parent
        manifest_name = self.path.name + SUFFIX
        lock = _lock(parent, wait=True)  # of two writers that finish together, one after the other
        try:
            replaced = _files_of(parent / manifest_name)
            # From here to the last replace a crash leaves a mixture: this mark makes every reader refuse it.
            os.replace(mark, parent / manifest_name)
            fsync(parent)
            for name in names:
                os.replace(self._folder / name, parent / name)
            for name in replaced - set(names):
                (parent / Path(name).name).unlink(missing_ok=True)
            write_json(self._folder / manifest_name, final)
            fsync(parent)
            os.replace(self._folder / manifest_name, parent / manifest_name)
            fsync(parent)
        finally:
            os.close(lock)

    def abort(self) -> None:
        """Remove everything temporary. After `close` this does nothing."""
        if self._writer is None:
            return
        self._writer = None
        self._pending.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._folder_lock)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close() if kind is None else self.abort()


def _check_name(path: Path) -> None:
    bad = sorted(set(path.name) & _FORBIDDEN_IN_NAME)
    if bad or path.name != path.name.strip() or not path.name:
        raise UserError(
            f"{path}: a MindRecord's file name cannot hold {' '.join(bad) or 'outer spaces'}: rename it."
        )
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file name, such as {path / 'train.mindrecord'}.")


def _files_of(manifest: Path) -> set[str]:
    """Names of the files that a manifest lists; none if it is damaged, for it is about to be replaced."""
    try:
        return set(read_manifest(manifest).get("files", {}))
    except UserError:
        return set()


def _as_int32(name: str, rows: np.ndarray, width: int) -> np.ndarray:
    array = np.asarray(rows)
    if array.ndim != 2 or array.shape[1] != width or array.dtype.kind not in "iu":
        raise ValueError(f"column {name}: {array.dtype} {array.shape}; wanted integers [N, {width}]")
    if array.dtype != np.int32 and array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise ValueError(f"column {name}: values do not fit int32")
    return np.ascontiguousarray(array, np.int32).copy()  # a copy: the caller may reuse its buffer


def _row_checksum(row: Mapping[str, np.ndarray]) -> int:
    return sum(zlib.crc32(name.encode() + row[name].astype(np.int32, copy=False).tobytes()) for name in row)


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}.writing-"


def _remove_stale_folders(path: Path) -> None:
    """Remove what killed writers of this target left; a living writer holds a lock on its folder."""
    for folder in path.parent.glob(_temporary_prefix(path).replace("[", "[[]") + "*"):
        with contextlib.suppress(OSError):
            os.close(_lock(folder, refuse=True))
            shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path, wait: bool = False, refuse: bool = False) -> int:
    """Open folder, take its advisory lock, return the descriptor; without the lock where there are none."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if refuse:
            os.close(descriptor)
            raise
    return descriptor


@contextlib.contextmanager
def _environment_faults(path: Path) -> Iterator[None]:
    """Disk full, no permission, and MindSpore's RuntimeErrors for the same -> EnvironmentFault."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free there)"
        raise EnvironmentFault(f"{path}: cannot write the records{free}: {reason}") from error
