"""What the kernels are here: `python -m kernels info` tells what would be used and why, `build` compiles ahead of use.

`check` compiles the CUDA kernels and tells what each needs of a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from llm_core.errors import UserError
from llm_core.runtime import prepare_environment, usable_cores

from . import ISAS, KernelsUnavailable, available, candidates, nvcc, ptxas
from .build import SOURCES, existing, library_path
from .compiler import Compiler, Sources, Target, cpu_target, find_compiler, refusal

_CUDA = "cuda"


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code is 0, 1 (something cannot be built, or spills), 2 (a wrong argument or $KERNELS)."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("info", help="compiler, instruction sets, libraries, threads; builds nothing")
    build = verbs.add_parser("build", help="compile the kernels into the cache")
    build.add_argument("--isa", nargs="+", choices=[*ISAS, _CUDA],
                       help="instruction sets, or `cuda`; default: all that the compilers at hand can do")
    verbs.add_parser("check", help="compile the CUDA kernels for sm_80, sm_90 and sm_90a; fail if one spills registers")
    options = parser.parse_args(arguments)
    try:
        if options.verb == "check":
            return ptxas.check()
        return info() if options.verb == "info" else compile_all(options.isa)
    except (UserError, KernelsUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


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
    _cuda_info()
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
    found = _found(cpu_target(isa, SOURCES))
    if found:
        return f"built: {found}", True
    reason = refusal(compiler, cpu_target(isa, SOURCES)) if compiler else "there is no compiler"
    return (f"not built, and cannot be: {reason}", False) if reason else ("not built; compiled on first use", True)


def _found(target: Target) -> Path | None:
    try:
        return existing(target, Sources.read(*target.folders))
    except KernelsUnavailable:  # $CXX or $NVCC is wrong
        return None


def _cuda_info() -> None:
    """Print what there is for GPUs, where there is an nvcc."""
    if not nvcc.there():
        return
    try:
        compiler = nvcc.find_nvcc()
        target = nvcc.cuda_target(nvcc.architectures())
    except KernelsUnavailable as error:
        print(f"{_CUDA:<13} {error}")
        return
    print(f"nvcc          {compiler.name}")
    found = _found(target)
    state = f"built: {found}" if found else f"not built: {target.title}, compiled when a GPU first needs them"
    print(f"{_CUDA:<13} {state}")


def compile_all(asked: list[str] | None) -> int:
    """Build the libraries named, or all that the compilers can do, and print where they are."""
    failed = []
    for isa in asked or [*ISAS, *([_CUDA] if nvcc.there() else [])]:
        try:
            path = nvcc.cuda_library_path() if isa == _CUDA else library_path(isa)
        except KernelsUnavailable as error:
            failed.append(isa)
            print(f"{isa:<13} {error}", file=sys.stderr)
            continue
        print(f"{isa:<13} {path}")
        log = path.with_suffix(".log")
        print(log.read_text(encoding="utf-8") if log.exists() else "", end="", file=sys.stderr)
    return 1 if failed and (asked or set(ISAS) <= set(failed)) else 0


if __name__ == "__main__":
    sys.exit(main())
