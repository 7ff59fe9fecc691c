"""Which nvcc builds the CUDA kernels, for which GPUs, and the check for spilled registers; without a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core import kernels as package
from llm_core.errors import UserError
from llm_core.kernels import KernelsUnavailable, build, nvcc, ptxas
from llm_core.kernels.__main__ import main
from llm_core.kernels.compiler import Sources

ROOT = Path(__file__).resolve().parents[2]
SPILLS = """__global__ void __launch_bounds__(1024, 2) holds_too_much(float* x) {
  float a[80];
#pragma unroll
  for (int i = 0; i < 80; ++i) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 80; ++i) x[i * 1024 + threadIdx.x] = a[79 - i] * a[i * 7 % 80];
}
"""
SIMPLE = "__global__ void doubles(float* x) { __shared__ float y[32]; y[threadIdx.x] = x[0]; x[1] = y[0] * 2; }\n"


def has_nvcc() -> bool:
    try:
        nvcc.find_nvcc()
    except KernelsUnavailable:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="there is no nvcc")


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and nothing asked for."""
    monkeypatch.setenv("RUN_LLM_CACHE", str(tmp_path / "cache"))
    for name in ("CUDA_ARCHS", "CUDA_DEBUG", "KERNELS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Sources of a library with one kernel, another one for Hopper alone."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "simple.cu").write_text(SIMPLE)
    (folder / "its_hopper.cu").write_text(SIMPLE.replace("doubles", "on_hopper"))
    return folder


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Puts a program that prints some lines on the PATH, and nothing else there beside what the shell needs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    request.addfinalizer(nvcc.gpus.cache_clear)

    def make(name: str, text: str, where: Path = folder) -> Path:
        where.mkdir(parents=True, exist_ok=True)
        path = where / name
        path.write_text(f"#!/bin/sh\necho '{text}'\n")
        path.chmod(0o755)
        nvcc.gpus.cache_clear()
        return path

    return make


def release(number: str) -> str:
    return f"nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release {number}, V{number}.1"


def test_the_nearest_nvcc_is_found(program, tmp_path, monkeypatch):
    program("nvcc", release("12.4"))
    home = program("nvcc", release("12.5"), tmp_path / "home" / "bin")
    asked = program("my-nvcc", release("13.1"))
    assert nvcc.find_nvcc().release == "Cuda compilation tools, release 12.4, V12.4.1"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert nvcc.find_nvcc().command == (str(home),)
    monkeypatch.setenv("NVCC", "my-nvcc -ccbin g++")
    assert nvcc.find_nvcc().command == (str(asked), "-ccbin", "g++")


@pytest.mark.parametrize(("text", "message"), [
    (release("11.7"), r"nvcc .*release 11\.7, .*: the kernels need CUDA 11\.8 or later"),
    ("g++ 12.2", "its --version names no release of CUDA, so it is no nvcc"),
])
def test_another_nvcc_is_refused_by_name(program, text, message):
    program("nvcc", text)
    with pytest.raises(KernelsUnavailable, match=message):
        nvcc.find_nvcc()


@pytest.mark.parametrize(("number", "architectures"), [("11.8", ("80", "90")), ("12.0", ("80", "90", "90a"))])
def test_the_architectures_are_those_that_nvcc_knows(program, number, architectures):
    program("nvcc", release(number))
    program("nvidia-smi", "NVIDIA-SMI has failed")
    assert nvcc.architectures() == architectures


@pytest.mark.parametrize(("number", "capabilities", "architectures"), [
    ("12.4", "9.0\n9.0", ("90a",)),
    ("11.8", "9.0", ("90",)),
    ("12.4", "8.9\n8.0", ("80", "89")),
    ("13.0", "10.0", ("100",)),
    ("12.4", "7.5\n8.0\n6.1", ("80",)),  # a display's beside the one that computes
])
def test_the_gpus_at_hand_are_compiled_for(program, number, capabilities, architectures):
    program("nvcc", release(number))
    program("nvidia-smi", capabilities)
    assert nvcc.architectures() == architectures


def test_a_gpu_that_is_too_old_is_refused(program):
    program("nvidia-smi", "7.5")
    with pytest.raises(KernelsUnavailable, match="a GPU of compute capability 75 is older than 80, .*CUDA_ARCHS"):
        nvcc.architectures()


@pytest.mark.parametrize(("asked", "result"), [
    ("80 90 90a", ("80", "90", "90a")),
    (" 90a,80;80 ", ("90a", "80")),
    ("75", "CUDA_ARCHS: architecture 75 is older than 80"),
    ("80 sm_90", 'CUDA_ARCHS: sm_90 is no architecture; a value looks like "80 90 90a"'),
])
def test_the_variable_asks_for_architectures(program, monkeypatch, asked, result):
    program("nvidia-smi", "8.9")
    monkeypatch.setenv("CUDA_ARCHS", asked)
    if isinstance(result, tuple):
        assert nvcc.architectures() == result
    else:
        with pytest.raises(KernelsUnavailable, match=result):
            nvcc.architectures()


def test_hoppers_sources_are_compiled_for_hopper_alone(tree):
    sources = Sources.read(tree)
    both, without = nvcc.cuda_target(("80", "90a"), (tree,)), nvcc.cuda_target(("80",), (tree,))
    assert sources.units(both) == ["its_hopper.cu", "simple.cu"] and sources.units(without) == ["simple.cu"]

    def codes(unit: str) -> list[str]:
        return [flag.rpartition("code=")[2] for flag in both.unit_flags(unit) if flag.startswith("-gencode")]

    assert codes("simple.cu") == ["sm_80", "sm_90a"] and codes("its_hopper.cu") == ["sm_90a"]


@pytest.mark.parametrize(("value", "debug"), [("1", True), ("0", False), ("", False)])
def test_a_variable_asks_for_libraries_to_debug(monkeypatch, value, debug):
    monkeypatch.setenv("CUDA_DEBUG", value)
    emulator, cuda = build.emulator_target(), nvcc.cuda_target(("80",))
    assert (emulator.name, cuda.name) == (("emulator_debug", "cuda_80_debug") if debug else ("emulator", "cuda_80"))
    assert ("-O0" in emulator.flags, "-O0" in cuda.flags, "-G" in cuda.flags) == (debug,) * 3


def test_a_shipped_library_serves_the_gpus_that_it_was_made_for(program, tmp_path, monkeypatch):
    target = nvcc.cuda_target(("80", "90a"))
    shipped = tmp_path / f"libkernels_cuda_80_90a-{Sources.read(*target.folders).digest(target)}.so"
    shipped.write_bytes(b"")
    for module in (nvcc, build):
        monkeypatch.setattr(module, "SHIPPED", tmp_path)
    for capability, served in (("8.0", True), ("8.9", True), ("9.0", True), ("10.0", False), ("8.0\n10.0", False)):
        program("nvidia-smi", capability)
        assert (nvcc._shipped() == shipped) is served, capability
    program("nvidia-smi", "9.0")
    assert nvcc.cuda_library_path() == shipped, "no nvcc is needed"
    shipped.rename(tmp_path / "libkernels_cuda_80_90a-0123.so")
    assert nvcc._shipped() is None, "made of other sources"


def test_without_nvcc_the_check_says_so_and_nothing_else_asks_for_it(monkeypatch, capsys):
    which = shutil.which
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None if name.endswith("nvcc") else which(name))
    assert main(["check"]) == 1
    assert capsys.readouterr().err.startswith("error: no nvcc: ")
    assert main(["info"]) == 0
    assert not {"cuda", "nvcc"} & {line.split()[0] for line in capsys.readouterr().out.splitlines()}


def test_a_wrong_nvcc_is_named(monkeypatch, capsys):
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    assert main(["check"]) == 1 and main(["info"]) == 0 and main(["build", "--isa", "cuda"]) == 1
    told = capsys.readouterr()
    assert (told.out + told.err).count("NVCC=no-such-nvcc: there is no such compiler") == 3


def test_the_variable_leaves_the_gpus_kernels_out(monkeypatch):
    monkeypatch.setenv("KERNELS", "reference")
    with pytest.raises(KernelsUnavailable, match="^KERNELS=reference$"):
        package.cuda_library.__wrapped__()


@pytest.mark.parametrize("asked", ["avx512", "refrence"])
def test_on_a_gpu_the_variable_knows_no_instruction_sets(monkeypatch, asked):
    monkeypatch.setenv("KERNELS", asked)
    with pytest.raises(UserError, match=f"^KERNELS={asked}: on a GPU leave it unset .*or set it to `reference`"):
        package.cuda_library.__wrapped__()


def test_a_host_compiler_that_is_too_new_comes_with_the_way_out(program, tree):
    refuses = program("nvcc", release("12.4"))
    refuses.write_text(refuses.read_text() + """case $1 in --version) exit 0;; esac
echo "host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 13 are not supported!" >&2
exit 1
""")
    with pytest.raises(KernelsUnavailable, match='later than 13 are not supported! .*NVCC="nvcc -ccbin g\\+\\+-12"$'):
        build.built(nvcc.cuda_target(("80",), (tree,)))


def test_what_ptxas_says_is_understood():
    log = """one.cu:
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 256 bytes smem, 364 bytes cmem[0]
ptxas info    : Function properties for _Z1bv
    24 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
two.cu:
ptxas info    : Compiling entry function '_Z1cv' for 'sm_90a'
ptxas info    : Function properties for _Z1cv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""
    assert ptxas.parsed(log) == [
        ptxas.Usage("one.cu", "_Z1av", "sm_80", 255, 256, 8, 12, 16),
        ptxas.Usage("one.cu", "_Z1bv", "sm_80", None, 0, 24, 0, 0),
        ptxas.Usage("two.cu", "_Z1cv", "sm_90a", 40, 0, 0, 0, 0),
    ]


@pytest.mark.parametrize(("line", "wrong"), [
    ("ptxas info    : 0 bytes gmem", False),
    ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to", True),
    ('its_hopper.cu(3): warning #177-D: variable "x" was declared but never referenced', True),
])
def test_the_check_fails_on_what_the_compiler_warns_of(line, wrong):
    assert ptxas.report(f"its_hopper.cu:\n{line}\n") == ([line] if wrong else [])


@needs_nvcc
def test_the_check_passes_what_fits_and_names_what_spills(tree, capsys):
    assert ptxas.check((tree,)) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row[-1] == "doubles"] == ["sm_80", "sm_90", "sm_90a"]
    assert [row[0] for row in rows if row[-1] == "on_hopper"] == ["sm_90a"]
    assert {row[2] for row in rows if row[-1] == "doubles"} == {"128"}, "bytes of shared memory"

    (tree / "planted.cu").write_text(SPILLS)
    assert ptxas.check((tree,)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for architecture, line in zip(("sm_80", "sm_90", "sm_90a"), errors, strict=True):
        assert line.startswith(f"error: holds_too_much in planted.cu for {architecture}: "), line
        assert " 0 bytes of registers spilled" not in line


@needs_nvcc
def test_a_library_is_built_once_and_loads_without_a_gpu(tree, capfd, monkeypatch):
    export = 'extern "C" __attribute__((visibility("default"))) const char* last_error()'
    (tree / "error.cpp").write_text(f'{export} {{ return "none"; }}\n')
    target = nvcc.cuda_target(("80",), (tree,))
    path = build.built(target)
    assert "compiling the CUDA kernels for sm_80 (once, some minutes) ..." in capfd.readouterr().err
    assert build.built(target) == path and capfd.readouterr().err == ""
    assert path.with_suffix(".log").read_text() == ""
    package.Library(path, "cuda")
    monkeypatch.setenv("CUDA_DEBUG", "1")
    assert "-G" in nvcc.cuda_target(("80",), (tree,)).flags
    assert build.built(nvcc.cuda_target(("80",), (tree,))) != path


@needs_nvcc
def test_an_architecture_that_nvcc_lacks_is_refused(tree):
    with pytest.raises(KernelsUnavailable, match="cannot compile for cuda_999: .*compute_999"):
        build.built(nvcc.cuda_target(("999",), (tree,)))


def test_the_library_of_the_gpu_is_only_looked_for_when_asked():
    """Importing the package starts no program: neither nvcc nor nvidia-smi."""
    code = ("import subprocess\nsubprocess.run = subprocess.Popen = None\n"
            "from llm_core.kernels import cuda_library, emulator, library")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
