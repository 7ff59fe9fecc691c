"""The library of every instruction set that this machine can run, and that of the emulated GPU."""

from __future__ import annotations

import pytest

from llm_core import kernels as package
from llm_core.kernels import Emulator, Library, available, library


@pytest.fixture(scope="session", params=available())
def isa(request: pytest.FixtureRequest) -> str:
    """Name of an instruction set; the tests that use it run once for each that this machine has."""
    return request.param


@pytest.fixture(scope="session")
def kernels(isa: str) -> Library:
    """The kernels compiled for `isa`."""
    return library(isa)


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """The CUDA kernels, with every thread of a GPU emulated on the CPU."""
    return package.emulator()
