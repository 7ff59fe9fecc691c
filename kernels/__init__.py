"""The CPU kernels: C++ in cpu/, compiled for several instruction sets, one of which this machine uses."""

from __future__ import annotations

import difflib
import os
import platform
from functools import cache

from llm_core.errors import UserError

from .build import library_path
from .compiler import ISA_FLAGS, KernelsUnavailable
from .library import BFloat16, KernelError, Library

__all__ = ["ISAS", "BFloat16", "KernelError", "KernelsUnavailable", "Library", "available", "library"]

ISAS = tuple(ISA_FLAGS)
"""Instruction sets that there are libraries for, the best first."""

# What /proc/cpuinfo must list for each: all that the compiler's flags allow it to use.
_V4 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
_NEEDS = {
    "avx512_bf16": {"avx2", "fma", "f16c", *_V4, "avx512_bf16"},
    "avx512": {"avx2", "fma", "f16c", *_V4},
    "avx2": {"avx2", "fma", "f16c"},
    "plain": set(),
}


@cache
def available() -> tuple[str, ...]:
    """The instruction sets of `ISAS` that this machine can run, the best first.

    Asked of /proc/cpuinfo, because a library's own cpu_supports() would need a library first; the system leaves out
    of it what it has not switched on. Where there is no such file (macOS), and on other processors, it is `plain`.
    """
    flags: set[str] = set()
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                flags = next((set(line.split()) for line in file if line.startswith("flags")), set())
        except OSError:
            pass
    return tuple(isa for isa in ISAS if _NEEDS[isa] <= flags)


def library(isa: str | None = None) -> Library:
    """The kernels for one instruction set; compiled first if they have not been (about a minute, once per machine).

    Args:
        isa: a name of `ISAS`; None takes the one that $KERNELS names, or else the best that can be had here.

    Raises:
        KernelsUnavailable: KERNELS=reference, or there is no library and no way to make one; says why.
        UserError: $KERNELS (or `isa`) names none, or one that this machine cannot run or has no library of.
    """
    forced = isa or os.environ.get("KERNELS")
    if forced == "reference":
        raise KernelsUnavailable("KERNELS=reference")
    if forced:
        return _forced(forced, "KERNELS" if isa is None else "isa")
    reasons = []
    for name in available():
        made = _attempt(name)
        if not isinstance(made, str):
            made.why = "; ".join(reasons) or "the best that this machine can run"
            return made
        reasons.append(made)
    raise KernelsUnavailable("; ".join(dict.fromkeys(reasons)))


def _forced(isa: str, origin: str) -> Library:
    if isa not in ISAS:
        near = difflib.get_close_matches(isa, [*ISAS, "reference"], n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}" if near else ""
        raise UserError(f"{origin}={isa}: there are no such kernels{hint}. Here: {', '.join(available())}, reference")
    if isa not in available():
        raise UserError(f"{origin}={isa}: this machine cannot run it; it can: {', '.join(available())}, reference")
    made = _attempt(isa)
    if isinstance(made, str):
        raise UserError(f"{origin}={isa}: {made}")
    made.why = f"{origin}={isa}"
    return made


@cache
def _attempt(isa: str) -> Library | str:
    """The library, or why there is none; asked once a process."""
    try:
        return Library(library_path(isa), isa)
    except KernelsUnavailable as error:
        return str(error)
