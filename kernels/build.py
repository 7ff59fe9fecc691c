"""Where the library of an instruction set lies: shipped with the package, in the user's cache, or still to be made.

The name of a library holds a hash of all that it was made from, so a library that is found is never stale: an edited
source, other flags or another compiler look for another name.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from llm_core.disk import fsync
from llm_core.runtime import cache_dir

from .compiler import Compiler, KernelsUnavailable, Sources, compile_library, find_compiler, refusal

_HERE = Path(__file__).resolve().parent
SOURCES = (_HERE / "abi", _HERE / "cpu")
SHIPPED = _HERE / "lib"
# Files kept in the cache, the latest used: libraries for four instruction sets of four states of the sources, and
# the object files of about as much.
_KEPT_LIBRARIES = 16
_KEPT_OBJECTS = 256
_NEVER_PRUNED = 24 * 3600.0  # seconds since its last use: a running process may still open it


def library_path(isa: str, sources: tuple[Path, ...] = SOURCES, extra: tuple[str, ...] = ()) -> Path:
    """The library for one instruction set that fits the sources as they are now; compiled if there is none.

    Args:
        isa: a name of `ISA_FLAGS`.
        sources: folders of the C++ files.
        extra: further flags for the compiler; they make another library.

    Raises:
        KernelsUnavailable: no compiler, or it refuses the flags or the sources, or there is nowhere to write.
    """
    snapshot = Sources.read(*sources)
    if found := existing(isa, snapshot, extra):
        return found
    compiler = find_compiler()
    if reason := refusal(compiler, isa):
        raise KernelsUnavailable(reason)
    try:
        return _build_in(cache_dir() / "kernels", compiler, isa, snapshot, extra)
    except OSError as cache_error:  # read-only, full, a file system without locks
        try:
            return _build_in(_private_folder(), compiler, isa, snapshot, extra)
        except OSError as error:
            raise KernelsUnavailable(f"nowhere to put the compiled kernels: {cache_error}; {error}") from None


def existing(isa: str, snapshot: Sources, extra: tuple[str, ...] = ()) -> Path | None:
    """A library made of these sources that lies ready: shipped, or in the cache.

    The cached one must come from the compiler of today. Where there is no compiler, any will do: a cluster's
    nodes may share the cache of a login node that has one.
    """
    name = f"libkernels_{isa}-{snapshot.digest(isa, extra)}"
    if (shipped := SHIPPED / f"{name}.so").is_file():
        return shipped
    try:
        compiled_by = find_compiler().digest
    except KernelsUnavailable:
        if os.environ.get("CXX"):
            raise
        compiled_by = "*"
    found = max((cache_dir() / "kernels").glob(f"{name}-{compiled_by}.so"), key=_last_use, default=None)
    if found:
        _mark_used(found)
    return found


def ship(isa: str, folder: Path) -> Path:
    """Put a library into a folder that will be `SHIPPED` of a wheel. KernelsUnavailable, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = folder / f"libkernels_{isa}-{Sources.read(*SOURCES).digest(isa)}.so"
    shutil.copyfile(library_path(isa), shipped)
    return shipped


def _build_in(folder: Path, compiler: Compiler, isa: str, snapshot: Sources, extra: tuple[str, ...]) -> Path:
    """Build in a folder that other processes may be building in. OSError: it cannot be written."""
    target = folder / f"libkernels_{isa}-{snapshot.digest(isa, extra)}-{compiler.digest}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if target.is_file():  # made by the process that had the lock before us
            return target
        for left in folder.glob("new-*"):  # by a process that was killed: nobody else builds now
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="new-", dir=folder))
        try:
            print(f"compiling the CPU kernels for {isa} (once, about a minute) ...", file=sys.stderr, flush=True)
            made, warnings = compile_library(compiler, isa, snapshot, work, folder / "objects", extra)
            fsync(made)
            target.with_suffix(".log").write_text(warnings, encoding="utf-8")
            made.replace(target)
            fsync(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _prune(folder)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock; the system lets go of it whenever and however this process ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that compiles the CPU kernels ...", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def _private_folder() -> Path:
    """A folder for this process alone, as long as it lives. OSError."""
    folder = Path(tempfile.mkdtemp(prefix="run_llm-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _prune(folder: Path) -> None:
    """Remove what has not been used for longest, and not within the last day."""
    oldest = time.time() - _NEVER_PRUNED
    for pattern, kept in (("*.so", _KEPT_LIBRARIES), ("objects/*.o", _KEPT_OBJECTS)):
        for path in sorted(folder.glob(pattern), key=_last_use, reverse=True)[kept:]:
            if _last_use(path) > oldest:
                continue
            path.unlink(missing_ok=True)
            path.with_suffix(".log").unlink(missing_ok=True)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # being pruned
        return 0.0


def _mark_used(path: Path) -> None:
    try:
        path.touch()
    except OSError:  # a read-only cache
        pass
