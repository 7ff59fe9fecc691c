"""The kernels: C++ for the CPU in cpu/, compiled for several instruction sets, and CUDA C++ for a GPU in cuda/."""

from __future__ import annotations

import difflib
import os
import platform
from functools import cache

from llm_core.errors import UserError

from .build import built, emulator_target, library_path
from .compiler import ISA_FLAGS, KernelsUnavailable
from .library import BFloat16, Emulator, KernelError, Library
from .nvcc import cuda_library_path

__all__ = ["ISAS", "BFloat16", "Emulator", "KernelError", "KernelsUnavailable", "Library", "available",
           "candidates", "cuda_library", "emulator", "library"]

ISAS = tuple(ISA_FLAGS)
"""Instruction sets that there are libraries for, the best first."""

# What /proc/cpuinfo must list for each: all that the compiler's flags allow it to use.
_AVX2 = {"avx2", "fma", "f16c"}
_V4 = {"bmi1", "bmi2", "abm", "movbe", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
_NEEDS = {"avx512_bf16": _AVX2 | _V4 | {"avx512_bf16"}, "avx512": _AVX2 | _V4, "avx2": _AVX2, "plain": set()}


@cache
def available() -> tuple[str, ...]:
    """The instruction sets of `ISAS` that this machine can run, the best first.

    Asked of /proc/cpuinfo, because a library's own cpu_supports() would need a library first; the system leaves out
    of it what it has not switched on. Where there is no such file (macOS), and on other processors: `plain`.
    """
    flags: set[str] = set()
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                flags = next((set(line.split()) for line in file if line.startswith("flags")), set())
        except OSError:
            pass
    return tuple(isa for isa in ISAS if _NEEDS[isa] <= flags)


def candidates(isa: str | None = None) -> tuple[tuple[str, ...], str]:
    """The instruction sets to try in turn, and why these: $KERNELS, `isa`, or the best that this machine can run.

    Raises:
        KernelsUnavailable: KERNELS=reference.
        UserError: $KERNELS (or `isa`) names none, or one that this machine cannot run.
    """
    forced = isa or os.environ.get("KERNELS")
    if not forced:
        return available(), "the best that this machine can run"
    origin = f"{'isa' if isa else 'KERNELS'}={forced}"
    if forced == "reference":
        raise KernelsUnavailable(origin)
    here = f"this machine has {', '.join(available())}; `reference` means MindSpore's own operators"
    if forced not in ISAS:
        near = difflib.get_close_matches(forced, [*ISAS, "reference"], n=1, cutoff=0.4)
        raise UserError(f"{origin}: no such kernels{f'; did you mean {near[0]}?' if near else ''} ({here})")
    if forced not in available():
        raise UserError(f"{origin}: this machine cannot run them ({here})")
    return (forced,), origin


def library(isa: str | None = None) -> Library:
    """The kernels for one instruction set; compiled first if they have not been (about a minute, once per machine).

    Args:
        isa: a name of `ISAS`; None takes the one that $KERNELS names, or else the best that can be had here.

    Raises:
        KernelsUnavailable: KERNELS=reference, or there is no library and no way to make one; says why.
        UserError: $KERNELS (or `isa`) names none, or one that this machine cannot run or has no library of.
    """
    names, why = candidates(isa)
    reasons: list[str] = []
    for name in names:
        made = _attempt(name, "; ".join(reasons) or why)
        if isinstance(made, Library):
            return made
        reasons.append(made)
    reason = "; ".join(dict.fromkeys(reasons))
    if isa or os.environ.get("KERNELS"):
        raise UserError(f"{why}: {reason}")
    raise KernelsUnavailable(reason)


@cache
def cuda_library() -> Library:
    """The CUDA kernels for the GPUs at hand; compiled first if they have not been (some minutes, once per machine).

    Raises:
        KernelsUnavailable: KERNELS=reference, or there is no library and no way to make one; says why.
        UserError: $KERNELS is anything else; instruction sets are a CPU's.
    """
    if asked := os.environ.get("KERNELS"):
        if asked == "reference":
            raise KernelsUnavailable("KERNELS=reference")
        raise UserError(f"KERNELS={asked}: on a GPU leave it unset (the CUDA kernels), or set it to `reference` "
                        "(MindSpore's own operators)")
    return Library(cuda_library_path(), "cuda")


def emulator() -> Emulator:
    """The CUDA kernels with the GPU's threads emulated, for tests on a CPU. KernelsUnavailable."""
    return Emulator(built(emulator_target(fused="avx2" in available())), "emulator")


@cache
def _attempt(isa: str, why: str) -> Library | str:
    """The library, or why there is none; asked once a process."""
    try:
        return Library(library_path(isa), isa, why)
    except KernelsUnavailable as error:
        return str(error)
