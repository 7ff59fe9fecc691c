"""`python -m kernels info` tells what would be used here and why; `python -m kernels build` compiles ahead of use."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from llm_core.errors import UserError
from llm_core.runtime import prepare_environment, usable_cores

from . import ISAS, KernelsUnavailable, available, candidates
from .build import SOURCES, existing, library_path
from .compiler import Compiler, Sources, cpu_target, find_compiler, refusal


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 (something cannot be built), 2 (a wrong argument or $KERNELS)."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("info", help="compiler, instruction sets, libraries, threads; builds nothing")
    build = verbs.add_parser("build", help="compile the kernels into the cache")
    build.add_argument("--isa", nargs="+", choices=ISAS, help="instruction sets; default: all the compiler can do")
    options = parser.parse_args(arguments)
    try:
        return info() if options.verb == "info" else compile_all(options.isa)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def info() -> int:
    """Print what there is. UserError: $KERNELS is wrong."""
    prepare_environment()  # as a run would
    try:
        compiler = find_compiler()
        print(f"compiler      {compiler.name}")
    except KernelsUnavailable as error:
        compiler = None
        print(f"compiler      none: {error}")
    print(f"processor     can run {', '.join(available())}")
    threads = os.environ.get("OMP_NUM_THREADS", str(usable_cores()))
    print(f"threads       {threads} (of {os.cpu_count()} cores), OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}")
    usable = {}
    for isa in ISAS:
        state, usable[isa] = _state(isa, compiler)
        print(f"{isa:<13} {state}")
    try:
        names, why = candidates()
    except KernelsUnavailable as error:
        print(f"used          MindSpore's own operators: {error}")
        return 0
    best = next((name for name in names if usable[name]), None)
    if best is None:
        print("used          MindSpore's own operators: none of the above can be had")
    else:
        print(f"used          {best}: {why if best == names[0] else 'the best of those that can be had'}")
    return 0


def _state(isa: str, compiler: Compiler | None) -> tuple[str, bool]:
    """What there is of an instruction set's library, and whether a run could use it."""
    found = _found(isa)
    if found:
        return f"built: {found}", True
    reason = refusal(compiler, cpu_target(isa, SOURCES)) if compiler else "there is no compiler"
    return (f"not built, and cannot be: {reason}", False) if reason else ("not built; compiled on first use", True)


def _found(isa: str) -> Path | None:
    try:
        return existing(cpu_target(isa, SOURCES), Sources.read(*SOURCES))
    except KernelsUnavailable:  # $CXX is wrong
        return None


def compile_all(asked: list[str] | None) -> int:
    """Build the libraries named, or all that the compiler can do, and print where they are."""
    failed = []
    for isa in asked or ISAS:
        try:
            path = library_path(isa)
        except KernelsUnavailable as error:
            failed.append(isa)
            print(f"{isa:<13} {error}", file=sys.stderr)
            continue
        print(f"{isa:<13} {path}")
        log = path.with_suffix(".log")
        print(log.read_text(encoding="utf-8") if log.exists() else "", end="", file=sys.stderr)
    return 1 if failed and (asked or len(failed) == len(ISAS)) else 0


if __name__ == "__main__":
    sys.exit(main())
