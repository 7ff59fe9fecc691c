"""Running a kernel with several numbers of threads in one process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TypeVar

from llm_core.kernels import Library

Result = TypeVar("Result")


def for_thread_counts(kernels: Library, run: Callable[[], Result], counts: tuple[int, ...] = (1, 2, 3)) -> list[Result]:
    """What `run` returns with each number of threads; the number is as before afterwards."""
    openmp = ctypes.CDLL(str(kernels.path))  # its symbols include those of the OpenMP it is linked with
    before = kernels.threads()
    results = []
    try:
        for count in counts:
            openmp.omp_set_num_threads(count)
            assert kernels.threads() == count
            results.append(run())
    finally:
        openmp.omp_set_num_threads(before)
    return results
