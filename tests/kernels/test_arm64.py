"""The plain kernels compiled for arm64 and run under qemu give what they give here."""

from __future__ import annotations

import copy
import os
import shutil
import struct
import subprocess
from pathlib import Path

import fuzz
import numpy as np
import pytest

from llm_core.kernels import BFloat16, Library, library
from llm_core.kernels.build import library_path

CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
CASES = 3


def text(value: str) -> bytes:
    return struct.pack("<q", len(value)) + value.encode()


def described(name: str, case: fuzz.Case) -> bytes:
    """A call as replay.cpp reads it."""
    parts = [text(name), struct.pack("<q", len(case.inputs) + len(case.outputs))]
    for array in (*case.inputs, *case.outputs):
        dtype, array = "bfloat16" if isinstance(array, BFloat16) else array.dtype.name, fuzz.bits(array)
        parts += [text(dtype), struct.pack(f"<{1 + array.ndim}q", array.ndim, *array.shape),
                  struct.pack("<q", array.nbytes), array.tobytes()]
    return b"".join(parts)


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the expected numbers, or to 0.05 where they are next to nothing: a sum of numbers about 1 cancels."""
    size = max(np.linalg.norm(expected.astype(np.float64)), 0.05 * np.sqrt(expected.size))
    return float(np.linalg.norm(got.astype(np.float64) - expected) / size)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(CROSS) and shutil.which(QEMU)), reason=f"needs {CROSS} and {QEMU}")
def test_arm64_gives_the_same_numbers(tmp_path, monkeypatch):
    here: Library = library("plain")
    monkeypatch.setenv("CXX", CROSS)
    # a flag of its own, so that no machine without a compiler takes this library for one of its own
    there = library_path("plain", extra=("-march=armv8-a",))
    replay = tmp_path / "replay"
    subprocess.run([CROSS, "-std=c++17", "-O1", str(Path(__file__).with_name("replay.cpp")), "-ldl", "-o", str(replay)],
                   check=True)
    calls = []
    for name in sorted(fuzz.exported(here.path) & fuzz.OPERATORS.keys()):
        for seed in range(CASES):
            if "bf16" not in name:  # refused, here as there
                rng = np.random.default_rng([seed, sum(name.encode())])
                calls.append((name, fuzz.OPERATORS[name](rng, here)))
    done = subprocess.run([QEMU, "-L", "/usr/aarch64-linux-gnu", str(replay), str(there)],
                          input=b"".join(described(name, case) for name, case in calls),
                          capture_output=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    results = memoryview(done.stdout)
    for name, case in calls:
        expected = copy.deepcopy(case)
        here.call(name, *expected.inputs, outputs=expected.outputs)
        (code,), results = struct.unpack("<q", results[:8]), results[8:]
        assert code == 0, name
        for index, array in enumerate((*expected.inputs, *expected.outputs)):
            bits = fuzz.bits(array)
            got = np.frombuffer(results[: bits.nbytes], bits.dtype).reshape(bits.shape)
            results = results[bits.nbytes :]
            most = 1e-5
            if isinstance(array, BFloat16):
                got, most = fuzz.values(BFloat16(got)), 5e-3  # a number between two may be rounded to the other one
            assert difference(got, fuzz.values(array)) < most, f"{name}: argument {index} {bits.shape}"
    assert len(results) == 0 and len(calls) > 50
