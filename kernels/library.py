"""A compiled library, called with NumPy arrays; training calls the same functions through MindSpore's ops.Custom."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .compiler import KernelsUnavailable

if TYPE_CHECKING:  # pip imports this package to build a wheel, where there is no NumPy
    import numpy as np


class KernelError(Exception):
    """A kernel refused its arguments; the message names kernel, argument, what was expected and what it got."""


@dataclass(frozen=True)
class BFloat16:
    """bfloat16 numbers as NumPy can hold them: a uint16 array of their bits."""

    bits: np.ndarray


class Library:
    """The kernels of one instruction set, or those of a GPU.

    Args:
        path: the shared library.
        isa: the instruction set it was compiled for.
        why: why this one is used, for a log line.

    Raises:
        KernelsUnavailable: the system cannot load it.
    """

    def __init__(self, path: Path, isa: str, why: str = "") -> None:
        self.path = path
        self.isa = isa
        self.why = why
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelsUnavailable(f"{path} does not load: {error}") from None
        self._library.last_error.restype = ctypes.c_char_p

    def cpu_supports(self, isa: str) -> bool:
        """Whether the processor and the system can run the library of that instruction set."""
        return bool(self._library.cpu_supports(isa.encode()))

    def threads(self) -> int:
        """Threads that OpenMP gives a kernel in this process."""
        return self._library.omp_get_max_threads()  # found in libgomp, which the library is linked with

    def call(self, name: str, *inputs: np.ndarray | BFloat16, outputs: Sequence[np.ndarray | BFloat16] = ()) -> None:
        """Run a kernel.

        Args:
            name: of the kernel.
            inputs: C-contiguous arrays: float32, int32, or `BFloat16`.
            outputs: the same; the kernel writes into them.

        Raises:
            KernelError: the kernel refused its arguments.
            ValueError: an array is not C-contiguous.
        """
        arguments = [*inputs, *outputs]
        arrays = [argument.bits if isinstance(argument, BFloat16) else argument for argument in arguments]
        if strided := [index for index, array in enumerate(arrays) if not array.flags.c_contiguous]:
            raise ValueError(f"{name}: arguments {strided} are not C-contiguous")
        names = [b"bfloat16" if isinstance(argument, BFloat16) else argument.dtype.name.encode()
                 for argument in arguments]
        count = len(arrays)
        shapes = [(ctypes.c_int64 * max(array.ndim, 1))(*array.shape) for array in arrays]
        with self._reachable(arrays, len(inputs)) as addresses:
            code = getattr(self._library, name)(
                ctypes.c_int(count),
                (ctypes.c_void_p * count)(*addresses),
                (ctypes.c_int * count)(*[array.ndim for array in arrays]),
                (ctypes.POINTER(ctypes.c_int64) * count)(*[ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
                                                           for shape in shapes]),
                (ctypes.c_char_p * count)(*names),
                None,
                None,
            )
            if code:
                raise KernelError(self._library.last_error().decode())

    @contextmanager
    def _reachable(self, arrays: list[np.ndarray], inputs: int) -> Iterator[list[int]]:
        """Addresses where the kernels find the arrays, of which the first `inputs` are only read."""
        yield [array.ctypes.data for array in arrays]


class Emulator(Library):
    """The CUDA kernels under the emulator of kernels/cuda/emulator.

    Every array is handed over as a copy whose end is the end of a page, with nothing behind it: an access there, or a
    write to an input, is an error of the kernel.
    """

    def seed(self, number: int) -> None:
        """Draw the order in which threads and blocks run from this number from now on."""
        self._library.emulator_seed(number)

    @contextmanager
    def _reachable(self, arrays: list[np.ndarray], inputs: int) -> Iterator[list[int]]:
        with ExitStack() as stack:
            addresses = [stack.enter_context(_fenced(array, read_only=index < inputs))
                         for index, array in enumerate(arrays)]
            for address, array in zip(addresses[inputs:], arrays[inputs:], strict=True):
                self._library.emulator_watch(ctypes.c_void_p(address), ctypes.c_size_t(array.nbytes))
                stack.callback(self._library.emulator_unwatch, ctypes.c_void_p(address))
            yield addresses


@contextmanager
def _fenced(array: np.ndarray, read_only: bool) -> Iterator[int]:
    """The address of a copy in pages of its own, the last of which no one may touch; copied back unless `read_only`.

    It begins as far past a multiple of 16 bytes as the array does: up to 15 bytes lie between its end and the fence.
    """
    page, size = mmap.PAGESIZE, array.nbytes
    pages = -(-(size + 15) // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    buffer = ctypes.c_char.from_buffer(memory)
    begin = ctypes.addressof(buffer)
    fence = begin + pages * page
    address = fence - size - (fence - size - array.ctypes.data) % 16
    ctypes.memmove(address, array.ctypes.data, size)
    libc = ctypes.CDLL(None)
    libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0)
    if read_only:
        libc.mprotect(ctypes.c_void_p(begin), ctypes.c_size_t(pages * page), mmap.PROT_READ)
    yield address
    if not read_only:
        ctypes.memmove(array.ctypes.data, address, size)
