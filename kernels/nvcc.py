"""The CUDA kernels' library: which nvcc compiles it, for which GPUs, and with which flags."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

from .build import CUDA_SOURCES, SHIPPED, built, debugging, existing
from .compiler import Compiler, KernelsUnavailable, Sources, Target, first_compiler

_OLDEST = (11, 8)
_KNOWS_90A = (12, 0)
_OLDEST_GPU = 80  # has asynchronous copies and tensor cores for bfloat16
_PROBE = ("probe.cu", """#include <optional>
__global__ void nothing() {}
extern "C" int probe() { return nothing<<<1, 1>>>(), std::optional<int>(1).value_or(0); }
""")


def find_nvcc() -> Compiler:
    """The nvcc that $NVCC names, else that of $CUDA_HOME, of the PATH, of /usr/local/cuda. KernelsUnavailable."""
    home = os.environ.get("CUDA_HOME")
    nvcc = first_compiler("NVCC", [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"],
                          "no nvcc: not in $CUDA_HOME/bin, on the PATH or in /usr/local/cuda/bin, and NVCC names none")
    if _release(nvcc) < _OLDEST:
        raise KernelsUnavailable(f"{nvcc.name}: the kernels need CUDA {_OLDEST[0]}.{_OLDEST[1]} or later")
    return nvcc


def there() -> bool:
    """Whether there is an nvcc, or $NVCC names one."""
    try:
        return bool(os.environ.get("NVCC") or find_nvcc())
    except KernelsUnavailable:
        return False


def _release(nvcc: Compiler) -> tuple[int, int]:
    found = re.search(r"\brelease (\d+)\.(\d+)", nvcc.version)
    if not found:
        raise KernelsUnavailable(f"{nvcc.name}: its --version names no release of CUDA, so it is no nvcc")
    return int(found[1]), int(found[2])


def all_architectures(nvcc: Compiler) -> tuple[str, ...]:
    """Those that the kernels are written for, as far as this nvcc knows them."""
    return ("80", "90", "90a") if _release(nvcc) >= _KNOWS_90A else ("80", "90")


def asked_architectures() -> tuple[str, ...]:
    """$CUDA_ARCHS, such as "80 90 90a"; none where it is not set. KernelsUnavailable: it is wrong."""
    asked = re.split(r"[ ,;]+", os.environ.get("CUDA_ARCHS", "").strip())
    for name in filter(None, asked):
        if not re.fullmatch(r"\d{2,3}[af]?", name):
            raise KernelsUnavailable(f'CUDA_ARCHS: {name} is no architecture; a value looks like "80 90 90a"')
        _check_age("CUDA_ARCHS: architecture", name)
    return tuple(dict.fromkeys(filter(None, asked)))


@cache
def gpus() -> tuple[str, ...]:
    """Compute capabilities of the GPUs at hand ("80", "90"), as nvidia-smi tells them; none where it does not.

    One that is too old for the kernels, a display's for instance, is left out if there are others.
    """
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = {major + minor for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", done.stdout, re.MULTILINE)}
    return tuple(sorted({gpu for gpu in found if int(gpu) >= _OLDEST_GPU} or found))


def _check_age(what: str, architecture: str) -> None:
    if int(architecture.rstrip("af")) < _OLDEST_GPU:
        raise KernelsUnavailable(f"{what} {architecture} is older than {_OLDEST_GPU}, which the kernels need; "
                                 "CUDA_ARCHS names what to compile for")


def architectures() -> tuple[str, ...]:
    """What to compile for: $CUDA_ARCHS, else the GPUs at hand, else all. KernelsUnavailable: there is no way to."""
    if asked := asked_architectures():
        return asked
    here = gpus()
    for gpu in here:
        _check_age("a GPU of compute capability", gpu)
    if "90" not in here:
        return here or all_architectures(find_nvcc())
    try:
        hopper = all_architectures(find_nvcc())[-1]
    except KernelsUnavailable:  # the library may lie ready all the same
        hopper = "90a"
    return tuple(hopper if gpu == "90" else gpu for gpu in here)


def cuda_target(architectures: tuple[str, ...], sources: tuple[Path, ...] = CUDA_SOURCES,
                extra: tuple[str, ...] = ()) -> Target:
    """The library for some architectures; `extra`: flags after all others.

    Sources whose name has `hopper` use instructions that sm_90a alone has.
    """
    codes = {name: f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures}
    debug = debugging()
    optimised = ("-O0", "-g", "-G") if debug else ("-O3",)
    flags = ("-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", *optimised, *extra)
    special = (("*hopper*.cu", (codes["90a"],) if "90a" in codes else None), ("*.cu", tuple(codes.values())))
    name = "_".join(["cuda", *architectures, *(["debug"] if debug else [])])
    return Target(name, f"CUDA kernels for {', '.join(f'sm_{name}' for name in architectures)}", sources, flags,
                  find_nvcc, "NVCC", _PROBE, special, takes="some minutes")


def cuda_library_path() -> Path:
    """The library for the GPUs at hand, or for $CUDA_ARCHS; compiled if there is none. KernelsUnavailable."""
    if not os.environ.get("CUDA_ARCHS") and (shipped := _shipped()):
        return shipped
    return built(cuda_target(architectures()))


def _shipped() -> Path | None:
    """The library of the package, if it serves every GPU at hand."""
    here = gpus()
    for path in SHIPPED.glob("libkernels_cuda_*.so"):
        names = tuple(path.name.split("-")[0].split("_")[2:])
        if here and all(any(_runs_on(name, gpu) for name in names) for gpu in here):
            target = cuda_target(names)
            if existing(target, Sources.read(*target.folders)) == path:
                return path
    return None


def _runs_on(architecture: str, gpu: str) -> bool:
    """Whether code for an architecture runs there: that of 80 does on 80, 86, 89; that of 90a on 90 alone."""
    if architecture.endswith(("a", "f")):
        return architecture[:-1] == gpu
    return architecture[:-1] == gpu[:-1] and architecture[-1] <= gpu[-1]
