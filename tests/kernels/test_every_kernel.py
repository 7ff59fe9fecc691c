"""What holds of every kernel: how it takes empty arrays, and calls from several threads at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import fuzz
import numpy as np
import pytest

from llm_core.kernels import Library

CASES = 3


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
