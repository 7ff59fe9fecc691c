"""Where a library lies: shipped with the package, in the user's cache, or still to be made.

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

from .compiler import COMMON, Compiler, KernelsUnavailable, Sources, Target, compile_library, cpu_target, refusal

_HERE = Path(__file__).resolve().parent
SOURCES = (_HERE / "abi", _HERE / "cpu")
CUDA_SOURCES = (_HERE / "abi", _HERE / "cuda")
EMULATOR_SOURCES = (*CUDA_SOURCES, _HERE / "cuda" / "emulator")
SHIPPED = _HERE / "lib"
# Files kept in the cache, the latest used: libraries of six kinds (four instruction sets, the emulator, a GPU) of four
# states of the sources, and the object files of about as much.
_KEPT_LIBRARIES = 24
_KEPT_OBJECTS = 384
_NEVER_PRUNED = 24 * 3600.0  # seconds since its last use: a running process may still open it


def library_path(isa: str, sources: tuple[Path, ...] = SOURCES, extra: tuple[str, ...] = ()) -> Path:
    """The CPU kernels' library for one instruction set.

    Args:
        isa: a name of `ISA_FLAGS`.
        sources: folders of the C++ files.
        extra: further flags for the compiler; they make another library.

    Raises:
        KernelsUnavailable: as `built`.
    """
    return built(cpu_target(isa, sources, extra))


def debugging() -> bool:
    """Whether $CUDA_DEBUG asks for libraries of the CUDA kernels that a debugger can step through."""
    return os.environ.get("CUDA_DEBUG", "0") not in ("", "0")


def emulator_target(sources: tuple[Path, ...] = EMULATOR_SOURCES, fused: bool = False) -> Target:
    """The CUDA kernels' sources for the CPU, under kernels/cuda/emulator.

    fused: this processor has fused multiply-adds. A GPU's compiler makes them wherever it may, and rounding differs.
    """
    debug = debugging()
    # The C library's checks of longjmp take a jump to another fiber's stack for an error.
    optimised = ("-O0", "-g") if debug else ("-O2",)
    flags = (*COMMON, *optimised, *(("-mfma",) if fused else ()), "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE")
    return Target(f"emulator{'_debug' if debug else ''}", "CUDA kernels for the emulator", sources, flags,
                  special=(("*.cu", ("-x", "c++", "-fsanitize=thread")),))


def built(target: Target) -> Path:
    """The library of a kind that fits the sources as they are now; compiled if there is none.

    Raises:
        KernelsUnavailable: no compiler, or it refuses the flags or the sources, or there is nowhere to write.
    """
    snapshot = Sources.read(*target.folders)
    if found := existing(target, snapshot):
        return found
    compiler = target.compiler()
    if reason := refusal(compiler, target):
        raise KernelsUnavailable(reason)
    try:
        return _build_in(cache_dir() / "kernels", compiler, target, snapshot)
    except OSError as cache_error:  # read-only, full, a file system without locks
        try:
            return _build_in(_private_folder(), compiler, target, snapshot)
        except OSError as error:
            raise KernelsUnavailable(f"nowhere to put the compiled kernels: {cache_error}; {error}") from None


def existing(target: Target, snapshot: Sources) -> Path | None:
    """A library made of these sources that lies ready: shipped, or in the cache.

    The cached one must come from the compiler of today. Where there is no compiler, any will do: a cluster's
    nodes may share the cache of a login node that has one.
    """
    name = _name(target, snapshot)
    if (shipped := SHIPPED / f"{name}.so").is_file():
        return shipped
    try:
        compiled_by = target.compiler().digest
    except KernelsUnavailable:
        if os.environ.get(target.variable):
            raise
        compiled_by = "*"
    found = max((cache_dir() / "kernels").glob(f"{name}-{compiled_by}.so"), key=_last_use, default=None)
    if found:
        _mark_used(found)
    return found


def ship(target: Target, folder: Path) -> Path:
    """Put a library into a folder that will be `SHIPPED` of a wheel. KernelsUnavailable, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = folder / f"{_name(target, Sources.read(*target.folders))}.so"
    shutil.copyfile(built(target), shipped)
    return shipped


def _name(target: Target, snapshot: Sources) -> str:
    return f"libkernels_{target.name}-{snapshot.digest(target)}"


def _build_in(folder: Path, compiler: Compiler, target: Target, snapshot: Sources) -> Path:
    """Build in a folder that other processes may be building in. OSError: it cannot be written."""
    made = folder / f"{_name(target, snapshot)}-{compiler.digest}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if made.is_file():  # by the process that had the lock before us
            return made
        for left in folder.glob("new-*"):  # by a process that was killed: nobody else builds now
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="new-", dir=folder))
        try:
            print(f"compiling the {target.title} (once, {target.takes}) ...", file=sys.stderr, flush=True)
            new, messages = compile_library(compiler, target, snapshot, work, folder / "objects")
            fsync(new)
            made.with_suffix(".log").write_text(messages, encoding="utf-8")
            new.replace(made)
            fsync(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _prune(folder)
    return made


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock; the system lets go of it whenever and however this process ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that compiles kernels ...", file=sys.stderr, flush=True)
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
