"""What ptxas says of every CUDA kernel, and the check that none of them keeps its registers in memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from .build import CUDA_SOURCES, built
from .nvcc import all_architectures, cuda_target, find_nvcc

_WARNING = re.compile("warning|Potential Performance Loss", re.IGNORECASE)  # the latter: products that run one by one
_COLUMNS = "{:<8}{:>9}{:>8}{:>7}{:>8}  {}"


@dataclass(frozen=True)
class Usage:
    """What one function needs on one architecture. stack: bytes of local memory; stores, loads: bytes spilled."""

    source: str
    function: str
    architecture: str
    registers: int | None  # a function that kernels call has none of its own
    shared: int
    stack: int
    stores: int
    loads: int


def check(sources: tuple[Path, ...] = CUDA_SOURCES) -> int:
    """Compile every source for every architecture, print the table and what is wrong; 1 if anything is, else 0.

    Raises:
        KernelsUnavailable: no nvcc, or a source that does not compile.
    """
    nvcc = find_nvcc()
    print(nvcc.name)
    library = built(cuda_target(all_architectures(nvcc), sources, ("-Xptxas=-v",)))
    wrong = report(library.with_suffix(".log").read_text(encoding="utf-8"))
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


def report(log: str) -> list[str]:
    """Print the table of what a library's log tells; returns what is wrong, a line each."""
    usages = sorted(parsed(log), key=lambda usage: (usage.source, usage.function, usage.architecture))
    names = _readable([usage.function for usage in usages])
    print(_COLUMNS.format("", "registers", "shared", "stack", "spills", ""))
    wrong, source = [], ""
    for usage, name in zip(usages, names, strict=True):
        if usage.source != source:
            source = usage.source
            print(source)
        registers = "-" if usage.registers is None else usage.registers
        spills = usage.stores + usage.loads
        print(_COLUMNS.format(usage.architecture, registers, usage.shared, usage.stack, spills, name))
        if usage.stack or spills:
            wrong.append(f"{name} in {source} for {usage.architecture}: {usage.stack} bytes of stack, "
                         f"{usage.stores} bytes of registers spilled, {usage.loads} loaded back")
    wrong += [line.strip() for line in log.splitlines() if _WARNING.search(line)]
    print(f"{len(usages)} kernels compiled, {len(wrong) or 'no'} errors")
    return wrong


def parsed(log: str) -> list[Usage]:
    """The functions that a library's log tells of: of each source its name and a colon, then ptxas' lines."""
    found: list[Usage] = []
    source = architecture = function = ""
    kernel = 0  # index of the one that is being compiled
    for line in log.splitlines():
        if match := re.fullmatch(r"(\S+\.(?:cu|cpp)):", line):
            source = match[1]
        elif match := re.search(r"Compiling entry function '\S+' for '(\w+)'", line):
            architecture, kernel = match[1], len(found)
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = (int(text) for text in match.groups())
            found.append(Usage(source, function, architecture, None, 0, stack, stores, loads))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[kernel] = replace(found[kernel], registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return found


def _readable(names: list[str]) -> list[str]:
    """Names as the sources have them, where there is a c++filt; without what all of them share."""
    if names and (tool := shutil.which("c++filt")):
        done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
        lines = done.stdout.splitlines()
        if done.returncode == 0 and len(lines) == len(names):
            names = lines
    return [re.sub(r"^void |run_llm::|\(anonymous namespace\)::", "", name).split("(")[0] for name in names]
