"""The emulator's tests of the CUDA kernels once more, on a GPU; skipped where there is none or torch uses none."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
from cuda_gpu import Gpu, main, why_not

from llm_core.kernels import KernelsUnavailable

if _reason := why_not():
    pytest.skip(f"needs a GPU: {_reason}", allow_module_level=True)

# Every test of test_cuda_*.py that asks for the emulator is a test of this module too, and gets the fixture below.
for _path in sorted(Path(__file__).parent.glob("test_cuda_*.py")):
    if _path.stem != __name__:
        for _name, _test in vars(importlib.import_module(_path.stem)).items():
            if _name.startswith("test_") and "emulator" in inspect.signature(_test).parameters:
                globals()[f"{_name}_{_path.stem.removeprefix('test_')}"] = _test


class SkippingGpu(Gpu):
    """A kernel that is not for this GPU skips the test that calls it."""

    def call(self, name, *inputs, outputs=()):
        if not self.has(name):
            pytest.skip(f"the library for this GPU has no {name}")
        super().call(name, *inputs, outputs=outputs)


@pytest.fixture(scope="session")
def emulator() -> Gpu:
    try:
        return SkippingGpu()  # compiles the kernels, if need be
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("emulator")
def test_every_kernel_against_fp64():
    """What compute-sanitizer watches."""
    assert main() == 0
