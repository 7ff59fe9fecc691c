"""Files that appear under their name only when they are whole and on the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from llm_core.disk import fsync
from llm_core.errors import EnvironmentFault

TEMPORARY_SUFFIX = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SIDE_THREAD_BYTES = 1 << 20


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count} bytes"


def _full_disk(path: Path, needed: int) -> EnvironmentFault:
    free = shutil.disk_usage(path.parent).free
    return EnvironmentFault(
        f"{path}: no room on the disk: {_mebibytes(needed)} needed, {_mebibytes(free)} free in {path.parent}; "
        "nothing was replaced. Free some room, or save less often or fewer (keep_checkpoint_max)"
    )


def check_room(target: Path, needed: int) -> None:
    """Raise EnvironmentFault, naming `target`, when its folder's file system has fewer than `needed` bytes free."""
    if shutil.disk_usage(target.parent).free < needed:
        raise _full_disk(target, needed)


@contextmanager
def environment_faults(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn what the operating system refuses while `path` is written into an EnvironmentFault that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full_disk(path, needed) from error
        raise EnvironmentFault(f"{path}: cannot be written: {error.strerror or error}") from error


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents; EnvironmentFault when that is not allowed."""
    with environment_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


class StagedFile:
    """A file written under a temporary name beside `target`, hashed on the way.

    >>> with StagedFile(path, needed=bytes_to_come) as staged:
    ...     staged.write(data)
    ...     staged.finish()    # whole and on the disk, still under the temporary name
    ...     staged.commit()    # now under its own name

    Leaving the block without `commit` removes the temporary file. Raises EnvironmentFault when the folder cannot
    be written or has fewer than `needed` bytes free (looked at before anything is written, and again by the
    writes themselves).
    """

    def __init__(self, target: Path, needed: int):
        self.target = target
        self.needed = needed
        self.size = 0
        self.sha256 = ""
        self._hash = hashlib.sha256()
        self._side_thread = ThreadPoolExecutor(max_workers=1)
        make_folder(target.parent)
        self.path = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        check_room(target, needed)
        with environment_faults(target, needed):
            self._file = open(self.path, "wb", buffering=0)

    def write(self, data) -> None:
        """Append `data` (bytes or a contiguous array). Large pieces are hashed while they are being written."""
        view = memoryview(data).cast("B") if memoryview(data).nbytes else b""
        count = len(view)
        hashing = None
        if count >= _SIDE_THREAD_BYTES:
            hashing = self._side_thread.submit(self._hash.update, view)
        else:
            self._hash.update(view)
        with environment_faults(self.target, self.needed):
            written = 0
            while written < count:
                written += self._file.write(view[written:])
        if hashing is not None:
            hashing.result()
        self.size += count

    def finish(self) -> None:
        """Put the content on the disk and close the file; sets `sha256` (hex of the whole file)."""
        with environment_faults(self.target, self.needed):
            os.fsync(self._file.fileno())
            self._file.close()
        self.sha256 = self._hash.hexdigest()

    def commit(self, sync: bool = True) -> None:
        """Give the finished file its name, in one step that replaces an older file of that name.

        sync: put the new name on the disk, too (False where a commit in the same folder follows at once).
        """
        with environment_faults(self.target, self.needed):
            os.replace(self.path, self.target)
            if sync:
                fsync(self.target.parent)

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(self, *_) -> None:
        self._side_thread.shutdown()
        self._file.close()
        self.path.unlink(missing_ok=True)


def write_json(path: Path, content: dict, sync: bool = True) -> None:
    """Replace `path` by `content` as JSON, atomically and on the disk (`sync`: see StagedFile.commit)."""
    data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    with StagedFile(path, needed=len(data)) as staged:
        staged.write(data)
        staged.finish()
        staged.commit(sync)


class NewFolder:
    """A folder filled under a temporary name; `commit` gives it its own. Without commit it is removed.

    >>> with NewFolder(target, needed=bytes_to_come) as folder:
    ...     write_json(folder / "config.json", content)
    ...     folder.commit()
    """

    def __init__(self, target: Path, needed: int):
        self._target = target
        make_folder(target.parent)
        check_room(target, needed)
        self._path = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}")

    def __enter__(self) -> NewFolder:
        make_folder(self._path)
        return self

    def __truediv__(self, name: str) -> Path:
        return self._path / name

    def commit(self) -> None:
        """Give the folder its name; a target that exists must be empty."""
        with environment_faults(self._target):
            os.replace(self._path, self._target)
            fsync(self._target.parent)

    def __exit__(self, *_) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files that a killed run left in `folder`. Only the run that owns the folder may."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
