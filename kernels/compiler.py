"""From sources to one shared library: the kinds of library, the C++ compiler, its flags, and what it refuses."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path

from llm_core.runtime import usable_cores

# What the compiler is told beside COMMON for each instruction set, the best first. One library each: nothing is
# shared between them, so no AVX-512 instruction can find its way into the plain one.
# GCC 12 takes what its AVX-512 headers leave undefined on purpose for a mistake.
_AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512", "-Wno-uninitialized")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "plain": (),
}
# No -Werror: a compiler newer than ours may warn of something new, and a user could do nothing about it. The
# warnings are kept beside the library, and a test wants none.
COMMON = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-math-errno",
    "-ffp-contract=fast", "-Wall", "-Wextra",
)
# Needs C++17, the flags, OpenMP's header and library, and a linker.
PROBE = ("probe.cpp", """#include <omp.h>
#include <optional>
extern "C" int probe() { return std::optional<int>(omp_get_max_threads()).value_or(0); }
""")


class KernelsUnavailable(Exception):
    """The kernels, or those of one kind, cannot be had here; the message says why."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler, or nvcc: the command that starts it, and all that its --version says."""

    command: tuple[str, ...]
    version: str

    @property
    def name(self) -> str:
        """Its command and its release."""
        return f"{shlex.join(self.command)} [{self.release}]"

    @property
    def release(self) -> str:
        """The line of its version that tells one release from another: the first, but for nvcc."""
        lines = self.version.splitlines()
        return next((line for line in lines if line.startswith("Cuda compilation tools")), lines[0])

    @cached_property
    def digest(self) -> str:
        """Differs between any two compilers that might make different libraries."""
        return _digest(*self.command, self.version)[:8]


def find_compiler() -> Compiler:
    """The compiler that $CXX names, else the first of c++, g++, clang++. KernelsUnavailable."""
    return first_compiler("CXX", ["c++", "g++", "clang++"],
                          "no C++ compiler: neither c++ nor g++ nor clang++ is on the PATH, and CXX names none")


def first_compiler(variable: str, commands: list[str], none: str) -> Compiler:
    """The compiler that the environment's variable names, else the first that there is; `none`: what to say if none is.

    Raises:
        KernelsUnavailable: none, or it does not work.
    """
    asked = os.environ.get(variable)
    for command in [asked] if asked else commands:
        try:
            first, *rest = shlex.split(command)
        except ValueError:  # nothing but spaces, or a quotation without an end
            raise KernelsUnavailable(f"{variable}={asked}: not a command") from None
        if path := shutil.which(first):
            return _identified((path, *rest))
    raise KernelsUnavailable(f"{variable}={asked}: there is no such compiler" if asked else none)


@cache
def _identified(command: tuple[str, ...]) -> Compiler:
    done = _run([*command, "--version"])
    if done.returncode or not done.stdout.strip():
        raise KernelsUnavailable(f"the compiler {shlex.join(command)} does not work: {_first_error(done)}")
    return Compiler(command, done.stdout.strip())


@dataclass(frozen=True)
class Target:
    """A kind of library: for an instruction set of the CPU, for GPUs, or for the emulator of one.

    Attributes:
        name: in the names of its files and in messages.
        title: what a user is told is being compiled.
        folders: those of its sources.
        flags: of every command, whether it compiles or links.
        compiler: finds the compiler. KernelsUnavailable.
        variable: of the environment, where the user may name one.
        probe: name and text of a source that tells whether the compiler can make such a library.
        special: patterns of source names, each with further flags, or None: left out; the first that fits counts.
        takes: how long compiling it takes, as a user is told.
    """

    name: str
    title: str
    folders: tuple[Path, ...]
    flags: tuple[str, ...]
    compiler: Callable[[], Compiler] = find_compiler
    variable: str = "CXX"
    probe: tuple[str, str] = PROBE
    special: tuple[tuple[str, tuple[str, ...] | None], ...] = ()
    takes: str = "about a minute"

    def unit_flags(self, unit: str) -> tuple[str, ...] | None:
        """All flags that a source is compiled with; None: it is no part of the library."""
        special = next((flags for pattern, flags in self.special if fnmatchcase(unit, pattern)), ())
        return None if special is None else (*self.flags, *special)


def cpu_target(isa: str, folders: tuple[Path, ...], extra: tuple[str, ...] = ()) -> Target:
    """The library for an instruction set, a name of `ISA_FLAGS`; `extra`: flags after all others."""
    return Target(isa, f"CPU kernels for {isa}", folders, (*COMMON, *ISA_FLAGS[isa], *extra))


@cache
def refusal(compiler: Compiler, target: Target) -> str | None:
    """Why this compiler cannot make such libraries; None if it can."""
    name, text = target.probe
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, name), Path(folder, "probe.so")
            source.write_text(text, encoding="utf-8")
            done = _run([*compiler.command, *target.unit_flags(name), "-shared", str(source), "-o", str(library)])
            if done.returncode or not library.exists():
                return f"{compiler.name} cannot compile for {target.name}: {_first_error(done)}"
    except OSError as error:
        return f"the compiler needs a temporary folder: {error}"
    return None


_UNITS = (".cpp", ".cu")  # what is compiled; the other sources are headers


@dataclass(frozen=True)
class Sources:
    """The sources at one moment: compiling from a snapshot keeps an edit made meanwhile out of the library."""

    files: dict[str, bytes]

    @classmethod
    def read(cls, *folders: Path) -> Sources:
        """All sources and headers of some folders, which share no name. OSError."""
        paths = sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (*_UNITS, ".h"))
        return cls({path.name: path.read_bytes() for path in paths})

    def digest(self, target: Target) -> str:
        """Differs wherever the library of these sources might: contents, flags, machine."""
        flags = [str(part) for pair in target.special for part in pair]
        return _digest(platform.machine(), *target.flags, *flags, *self._named(self.files))[:16]

    def units(self, target: Target) -> list[str]:
        """Names of the files that are compiled, the largest first: they take longest."""
        units = (name for name in self.files if name.endswith(_UNITS) and target.unit_flags(name) is not None)
        return sorted(units, key=lambda name: -len(self.files[name]))

    def object_digest(self, unit: str, target: Target, compiler: Compiler) -> str:
        """The same for the object file of one unit, which sees itself and all headers."""
        seen = self._named([unit, *(name for name in self.files if name.endswith(".h"))])
        return _digest(platform.machine(), compiler.digest, *target.unit_flags(unit), *seen)[:16]

    def _named(self, names: Iterable[str]) -> list[bytes]:
        return [part for name in names for part in (name.encode(), self.files[name])]


def compile_library(compiler: Compiler, target: Target, sources: Sources, work: Path,
                    objects: Path) -> tuple[Path, str]:
    """Compile the sources into one library, as many files at once as $MAX_JOBS (or the cores) allow.

    Args:
        work: an empty folder, for the snapshot of the sources and the library.
        objects: a folder where finished object files stay: a later call compiles only what has changed since.

    Returns:
        The library, inside `work`, and what the compiler had to say: of each unit its name, then its messages.

    Raises:
        KernelsUnavailable: the compiler's first error.
        OSError: a folder cannot be written.
    """
    for name, content in sources.files.items():
        (work / name).write_bytes(content)
    objects.mkdir(parents=True, exist_ok=True)
    who = f"{compiler.name}, for {target.name}"

    def compiled(unit: str) -> tuple[Path, str]:
        kept = objects / f"{unit}-{target.name}-{sources.object_digest(unit, target, compiler)}.o"
        log = kept.with_suffix(".log")
        if not kept.exists():
            new = work / f"{unit}.o"
            # relative names: the compiler's messages then read as the sources do, not as this folder
            done = _run([*compiler.command, *target.unit_flags(unit), "-c", unit, "-o", new.name], cwd=work)
            _check(done, new, who)
            log.write_text(f"{unit}:\n{done.stderr}" if done.stderr else "", encoding="utf-8")
            new.replace(kept)
        os.utime(kept)
        return kept, log.read_text(encoding="utf-8")

    jobs = os.environ.get("MAX_JOBS", "")
    with ThreadPoolExecutor(max(int(jobs), 1) if jobs.isdecimal() else usable_cores()) as pool:
        waiting = [pool.submit(compiled, unit) for unit in sources.units(target)]
        try:
            done = [future.result() for future in _progress(waiting)]
        finally:
            pool.shutdown(cancel_futures=True)
    library = work / "library.so"
    parts = sorted(str(path) for path, _ in done)
    linked = _run([*compiler.command, *target.flags, "-shared", *parts, "-o", str(library)])
    _check(linked, library, who)
    return library, "".join(sorted(text for _, text in done))


def _progress(waiting: list[Future]) -> Iterator[Future]:
    """Futures as they finish; with a bar where someone watches."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:  # in the folder where pip builds a wheel
            pass
        else:
            yield from tqdm(as_completed(waiting), total=len(waiting), unit="file", leave=False)
            return
    yield from as_completed(waiting)


def _run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:  # LC_ALL: messages in English
        return subprocess.run(command, cwd=cwd, env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise KernelsUnavailable(f"the compiler {command[0]} does not start: {error.strerror}") from None


def _check(done: subprocess.CompletedProcess[str], made: Path, who: str) -> None:
    if done.returncode or not made.exists():
        raise KernelsUnavailable(f"{who}: {_first_error(done)}")


def _first_error(done: subprocess.CompletedProcess[str]) -> str:
    """The line of the compiler's output that says what is wrong."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = next((line for line in lines if "error" in line.lower()), lines[0] if lines else
                f"exit code {done.returncode} and no message")
    # an nvcc that is older than the g++ of this machine
    return said + (' Name an older one, as in NVCC="nvcc -ccbin g++-12"' if "unsupported GNU version" in said else "")


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
