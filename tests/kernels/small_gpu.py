"""The emulated GPU with the shared memory of a small one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llm_core.kernels import Emulator

SMALL, LARGE = 99 << 10, 227 << 10  # bytes a block: compute capability 8.6, 8.9 and 12; Hopper, as the emulator starts


@contextmanager
def small_gpu(emulator: Emulator) -> Iterator[None]:
    """Let a block have at most 99 KB of shared memory meanwhile."""
    emulator._library.emulator_shared_memory(SMALL)
    try:
        yield
    finally:
        emulator._library.emulator_shared_memory(LARGE)
