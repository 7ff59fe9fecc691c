"""Timing of short calls: sides in turn, round by round; and the machine's own limit, to say how near a kernel comes."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BLOCK = 0.01  # seconds that a side is timed for in one round, or one call if that takes longer
MOST_ROUNDS, FEWEST_ROUNDS = 9, 3


def block(call: Callable[[], Any]) -> float:
    """Seconds a call takes: the mean over BLOCK seconds of calls, after one that warms caches and wakes threads.

    A call ten times as long as that is its own warming, and measured once.
    """
    begin = time.perf_counter()
    call()
    first = time.perf_counter() - begin
    if first > 10 * BLOCK:
        return first
    count = max(1, round(BLOCK / first))
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def in_turn(sides: Mapping[str, Callable[[], float]], budget: float) -> dict[str, list[float]]:
    """Measure every side once a round, so that a slow second of the machine hits all of them.

    Args:
        sides: name -> function that measures and returns a time in seconds, `block` of a call for instance.
        budget: seconds; as many rounds as fit, from FEWEST_ROUNDS to MOST_ROUNDS.

    Returns:
        name -> one time a round; the first round (compiling, first touch of memory) is not among them.
    """
    for measure in sides.values():
        measure()
    times: dict[str, list[float]] = {name: [] for name in sides}
    started = time.perf_counter()
    for index in range(MOST_ROUNDS):
        for name, measure in sides.items():
            times[name].append(measure())
        spent = time.perf_counter() - started
        if index + 1 >= FEWEST_ROUNDS and spent * (index + 2) / (index + 1) > budget:
            break
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Each side's median, in milliseconds."""
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


class Peak:
    """The machine's FMA peak, measured with a loop of multiply-adds that touches no memory.

    Args:
        isa: the instruction set of the kernels that are to be compared with it.
    """

    ROUNDS = 2_000_000

    def __init__(self, isa: str) -> None:
        from llm_core.kernels.build import SOURCES
        from llm_core.kernels.compiler import COMMON, ISA_FLAGS, find_compiler

        with tempfile.TemporaryDirectory() as folder:
            target = f"{folder}/peak.so"
            flags = [*COMMON, *ISA_FLAGS[isa], *(f"-I{folder}" for folder in SOURCES), "-shared"]
            subprocess.run([*find_compiler().command, *flags, str(HERE / "peak.cpp"), "-o", target], check=True)
            library = ctypes.CDLL(target)
        self._loops = {"fp32": library.multiply_add_fp32, "bf16": library.multiply_add_bf16}
        for loop in self._loops.values():
            loop.restype, loop.argtypes = ctypes.c_double, [ctypes.c_int64]

    def gflops(self, dtype: str) -> float:
        """GFLOP/s of all OpenMP threads together, now; dtype "fp32", or "bf16" (0: no such instruction)."""
        begin = time.perf_counter()
        operations = self._loops[dtype](self.ROUNDS)
        return operations / (time.perf_counter() - begin) / 1e9
