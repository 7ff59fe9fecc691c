"""What holds of every kernel: how it takes empty arrays, and calls from several threads at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz
import numpy as np
import pytest

from llm_core.kernels import Library

CASES = 3
LITTLE_MEMORY = """
import resource, sys
import numpy as np
from llm_core.kernels import KernelError, library
kernels = library(sys.argv[1])
x, weight = np.ones((512, 64), np.float32), np.ones((30000, 64), np.float32)
labels, loss = np.zeros(512, np.int32), np.ones(1, np.float32)
outputs = [loss, np.ones_like(x), np.ones_like(weight)]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 4_000_000,) * 2)  # the logits of a chunk take 30 MB
try:
    kernels.call("linear_cross_entropy", x, weight, labels, outputs=outputs)
except KernelError as error:
    print(error)
"""


def random_for(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, sum(name.encode())])


@pytest.fixture
def names(isa: str, kernels: Library) -> list[str]:
    """The kernels that this instruction set has."""
    exported = sorted(fuzz.exported(kernels.path) - fuzz.NOT_KERNELS)
    return [name for name in exported if "bf16" not in name or isa == "avx512_bf16"]


def test_empty_arrays_are_refused(kernels: Library, names: list[str]):
    """Of whatever size that is 0; none may be divided by."""
    for name in names:
        for seed in range(4 * CASES):
            rng = random_for(name, seed)
            fuzz.check_empty(kernels, name, fuzz.OPERATORS[name](rng, kernels), rng)


def test_callers_on_several_threads_do_not_meet(kernels: Library, names: list[str]):
    """MindSpore may run two operators at a time: each gives the bits that it gives alone."""

    def cases(caller: int) -> list[tuple[str, fuzz.Case]]:
        return [(name, fuzz.OPERATORS[name](random_for(name, CASES * caller + seed), kernels))
                for name in names for seed in range(CASES)]

    def results(calls: list[tuple[str, fuzz.Case]]) -> list[tuple[str, list[bytes]]]:
        for name, case in calls:
            kernels.call(name, *case.inputs, outputs=case.outputs)
        return [(name, [fuzz.bits(array).tobytes() for array in (*case.outputs, *case.written)])
                for name, case in calls]

    alone = [results(cases(caller)) for caller in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            assert list(pool.map(results, [cases(caller) for caller in range(3)])) == alone


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the process's size from")
def test_too_little_memory_is_an_error(isa: str):
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY, isa], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2])
    assert done.stdout == "linear_cross_entropy: not enough memory for its scratch space\n", done.stderr[-2000:]
