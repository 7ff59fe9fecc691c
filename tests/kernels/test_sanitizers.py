"""Every kernel under AddressSanitizer and UBSan, called as fuzz.py does: no access out of bounds, nothing undefined."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core.kernels import KernelsUnavailable, available
from llm_core.kernels.build import SOURCES, library_path
from llm_core.kernels.compiler import find_compiler

ROOT = Path(__file__).resolve().parents[2]
# -Og and line numbers alone: half the time that -O1 -g takes to compile
SANITIZED = ("-Og", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CASES = 12
BAD = """
#include "abi.h"
KERNEL(gelu_forward) {
  const float* x = args.input<float>("x", "N F");
  float* y = args.output<float>("y", "N F");
  args.done();
  y[0] = x[args.size("N") * args.size("F")];
}
"""


def runtime(name: str) -> str:
    """Path of one of the compiler's libraries."""
    command = [*find_compiler().command, f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return str(path.resolve())


def fuzzed(isa: str, sources: tuple[Path, ...] = SOURCES) -> subprocess.CompletedProcess[str]:
    """Run fuzz.py on the sanitized library of an instruction set."""
    # libstdc++ as well: the sanitizer looks for its exceptions when the process starts, long before a kernel loads it
    preload = " ".join(runtime(name) for name in ("libasan.so", "libstdc++.so.6"))
    try:
        path = library_path(isa, sources, extra=SANITIZED)
    except KernelsUnavailable as error:
        pytest.fail(str(error))
    env = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc",
           "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, str(ROOT / "tests" / "kernels" / "fuzz.py"), str(path), isa, str(CASES)],
                          cwd=ROOT, env=env, capture_output=True, text=True, errors="replace", timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("isa", sorted({available()[0], "plain"}))
def test_no_kernel_leaves_its_bounds(isa):
    done = fuzzed(isa)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}\n{done.stderr[-6000:]}"


def test_a_read_out_of_bounds_is_found(tmp_path):
    """The harness itself: a kernel that reads one number too far."""
    for name in ("abi.h", "abi.cpp"):
        shutil.copy(ROOT / "kernels" / "abi" / name, tmp_path)
    (tmp_path / "bad.cpp").write_text(BAD)
    done = fuzzed("plain", (tmp_path,))
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stdout[-300:] + done.stderr[-3000:]
