"""Building, finding and choosing the libraries; on a source tree of two lines, so that a build takes a second."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from llm_core import kernels as package
from llm_core.errors import UserError
from llm_core.kernels import ISAS, KernelError, KernelsUnavailable, Library, available, build, candidates, library
from llm_core.kernels.build import library_path
from llm_core.kernels.compiler import find_compiler

ROOT = Path(__file__).resolve().parents[2]
EXPORT = 'extern "C" __attribute__((visibility("default"))) '
BUILD = "import sys; from pathlib import Path; from llm_core.kernels.build import library_path\n" \
        "print(library_path('plain', (Path(sys.argv[1]),)))"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a library whose answer() is 42, and an empty cache beside them."""
    monkeypatch.setenv("RUN_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERNELS", raising=False)
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "number.h").write_text("constexpr int kNumber = 42;\n")
    (folder / "answer.cpp").write_text(f'#include "number.h"\n{EXPORT}int answer() {{ return kNumber; }}\n')
    (folder / "error.cpp").write_text(f'{EXPORT}const char* last_error() {{ return ""; }}\n')
    return folder


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes $CXX a script that runs some lines of shell, then the real compiler; returns the file it logs to."""
    real = shlex.join(find_compiler().command)

    def make(lines: str = "", name: str = "compiler") -> Path:
        log = tmp_path / f"{name}.log"
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\necho "$*" >> {log}\n{lines}\nexec {real} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return make


def answer(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()


def compiled(log: Path) -> list[str]:
    """Names of the files that the logging compiler has compiled, in order of their names."""
    return sorted(line.split(" -c ")[1].split()[0] for line in log.read_text().splitlines() if " -c " in line)


def started(tree: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILD, str(tree)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env={**os.environ, **env}, text=True,
                          capture_output=True, timeout=120)


def test_the_second_use_finds_what_the_first_has_built(tree, compiler, capfd):
    log = compiler()
    first = library_path("plain", (tree,))
    assert answer(first) == 42 and "compiling the CPU kernels for plain" in capfd.readouterr().err
    assert library_path("plain", (tree,)) == first
    assert compiled(log) == ["answer.cpp", "error.cpp"] and capfd.readouterr().err == ""
    assert not list(first.parent.glob("new-*"))


@pytest.mark.parametrize("edited", ["number.h", "answer.cpp"])
def test_an_edit_is_rebuilt_and_its_undoing_found_again(tree, compiler, edited):
    log = compiler()
    first = library_path("plain", (tree,))
    before = (tree / edited).read_text()
    (tree / edited).write_text(before.replace("42", "43").replace("kNumber;", "kNumber + 1;"))
    assert answer(library_path("plain", (tree,))) == 43
    (tree / edited).write_text(before)
    assert library_path("plain", (tree,)) == first
    again = ["answer.cpp", "error.cpp"] if edited == "number.h" else ["answer.cpp"]
    assert compiled(log) == sorted(["answer.cpp", "error.cpp", *again])


def test_another_compiler_and_other_flags_make_another_library(tree, compiler):
    compiler(name="one")
    one = library_path("plain", (tree,))
    compiler(name="two")
    assert len({one, library_path("plain", (tree,)), library_path("plain", (tree,), extra=("-O1",))}) == 3


def test_two_processes_at_once_build_once(tree, compiler):
    log = compiler('case " $* " in *" -c "*) sleep 1;; esac')
    both = [started(tree), started(tree)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert compiled(log) == ["answer.cpp", "error.cpp"]
    assert sorted(text[1].split()[0] for text in outputs) == ["compiling", "waiting"]


def test_a_killed_build_leaves_nothing_in_the_way(tree, compiler):
    log = compiler('case " $* " in *" -c "*) sleep 2;; esac')
    process = started(tree)
    deadline = time.monotonic() + 60
    while not (log.exists() and compiled(log)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    folder = build.cache_dir() / "kernels"
    assert list(folder.glob("new-*")) and not list(folder.glob("*.so"))
    begin = time.monotonic()
    assert answer(library_path("plain", (tree,))) == 42
    assert time.monotonic() - begin < 30
    assert not list(folder.glob("new-*"))


def test_a_cache_that_cannot_be_written_gives_way_to_a_folder_of_the_process(tree, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    done = run("-c", BUILD + "\nprint(Path(library_path('plain', (Path(sys.argv[1]),))).exists())", str(tree))
    path, exists = done.stdout.splitlines()
    assert exists == "True" and not Path(path).is_relative_to(tmp_path / "cache"), done.stderr
    assert not Path(path).parent.exists(), "left behind when the process had ended"


def test_nowhere_to_write_says_so(tree, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    build._private_folder.cache_clear()
    build.refusal(find_compiler(), build.cpu_target("plain", (tree,)))  # kept: it needs a temporary folder as well
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cache"))
    with pytest.raises(KernelsUnavailable, match="nowhere to put the compiled kernels: .*cache"):
        library_path("plain", (tree,))


@pytest.mark.parametrize(("cxx", "message"), [
    ("/bin/false", "the compiler /bin/false does not work"),
    ("no-such-compiler --fast", "CXX=no-such-compiler --fast: there is no such compiler"),
    ("g++ '-O2", "CXX=g\\+\\+ '-O2: not a command"),
    ("  ", "CXX=  : not a command"),
])
def test_a_wrong_compiler_is_named(tree, monkeypatch, cxx, message):
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(KernelsUnavailable, match=message):
        library_path("plain", (tree,))


def test_a_compiler_that_makes_nothing_is_named(tree, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/echo")
    with pytest.raises(KernelsUnavailable, match="/bin/echo .*cannot compile for plain: exit code 0 and no message"):
        library_path("plain", (tree,))


def test_an_error_in_a_source_is_told_by_its_first_line(tree):
    (tree / "answer.cpp").write_text("int answer() { return nothing; }\n")
    with pytest.raises(KernelsUnavailable, match=r"answer\.cpp:1:\d+: error: 'nothing' was not declared"):
        library_path("plain", (tree,))
    assert not list((build.cache_dir() / "kernels").glob("new-*"))


def test_where_the_compiler_has_gone_its_library_is_still_used(tree, monkeypatch):
    path = library_path("plain", (tree,))
    monkeypatch.setenv("PATH", str(tree))
    monkeypatch.delenv("CXX", raising=False)
    assert library_path("plain", (tree,)) == path
    (tree / "number.h").write_text("constexpr int kNumber = 43;\n")
    with pytest.raises(KernelsUnavailable, match="no C\\+\\+ compiler"):
        library_path("plain", (tree,))


def test_old_libraries_are_removed(tree, monkeypatch):
    monkeypatch.setattr(build, "_KEPT_LIBRARIES", 2)
    monkeypatch.setattr(build, "_KEPT_OBJECTS", 3)
    monkeypatch.setattr(build, "_NEVER_PRUNED", 0.0)
    paths = []
    for number in range(3):
        paths.append(library_path("plain", (tree,), extra=(f"-DNUMBER={number}",)))
        os.utime(paths[-1], (number, number))
    library_path("plain", (tree,))
    assert [path.exists() for path in paths] == [False, False, True]
    assert len(list((build.cache_dir() / "kernels" / "objects").glob("*.o"))) == 3


def test_what_a_running_process_may_still_open_stays(tree, monkeypatch):
    monkeypatch.setattr(build, "_KEPT_LIBRARIES", 1)
    paths = [library_path("plain", (tree,), extra=(f"-DNUMBER={number}",)) for number in range(2)]
    assert all(path.exists() for path in paths)


@pytest.mark.skipif(len(available()) == 1, reason="this machine runs the plain kernels alone")
def test_flags_that_the_compiler_does_not_know_leave_the_next_best(tree, compiler, monkeypatch):
    best, second, *_ = available()
    flag = next(flag for flag in reversed(package.ISA_FLAGS[best]) if flag not in package.ISA_FLAGS[second])
    compiler(f"""case " $* " in *" {flag} "*) echo "c++: error: unrecognized option '{flag}'" >&2; exit 1;; esac""")
    monkeypatch.setattr(package, "library_path", functools.partial(library_path, sources=(tree,)))
    package._attempt.cache_clear()
    try:
        found = library()
        with pytest.raises(UserError, match=f"^isa={best}: .*unrecognized option '{flag}'"):
            library(best)
    finally:
        package._attempt.cache_clear()
    assert found.isa == second and f"cannot compile for {best}: c++: error: unrecognized option '{flag}'" in found.why


def test_the_variable_chooses(monkeypatch):
    monkeypatch.setenv("KERNELS", "plain")
    assert candidates() == (("plain",), "KERNELS=plain")
    monkeypatch.setenv("KERNELS", "")
    assert candidates()[0] == available()
    monkeypatch.setenv("KERNELS", "reference")
    with pytest.raises(KernelsUnavailable, match="^KERNELS=reference$"):
        library()
    assert candidates("plain")[0] == ("plain",)


def test_a_wrong_value_is_refused_with_the_nearest_name(monkeypatch):
    monkeypatch.setenv("KERNELS", "avx512-bf16")
    with pytest.raises(UserError, match="KERNELS=avx512-bf16: no such kernels; did you mean avx512_bf16?"):
        library()
    done = run("-m", "kernels", "info", KERNELS="refrence")
    assert done.returncode == 2 and "did you mean reference?" in done.stderr


def test_an_instruction_set_that_the_machine_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(package, "available", lambda: ("avx2", "plain"))
    monkeypatch.setenv("KERNELS", "avx512")
    with pytest.raises(UserError, match="KERNELS=avx512: this machine cannot run them .*has avx2, plain;"):
        library()


def test_info_says_what_would_be_used(tmp_path):
    chosen = run("-m", "kernels", "info", RUN_LLM_CACHE=str(tmp_path), KERNELS="")
    assert f"used          {available()[0]}: the best" in chosen.stdout, chosen.stdout + chosen.stderr
    assert chosen.stdout.count("not built; compiled on first use") == len(ISAS)
    assert list(tmp_path.iterdir()) == [], "info builds nothing"
    none = run("-m", "llm_core.kernels", "info", RUN_LLM_CACHE=str(tmp_path), KERNELS="", CXX="/bin/false")
    assert "MindSpore's own operators" in none.stdout and "/bin/false does not work" in none.stdout


def test_every_library_is_what_its_name_says(kernels: Library):
    name = ctypes.CDLL(str(kernels.path)).instruction_set
    name.restype = ctypes.c_char_p
    assert name().decode() == kernels.isa
    assert [isa for isa in ISAS if kernels.cpu_supports(isa)] == list(available())


def test_the_compiler_warns_of_nothing(kernels: Library):
    assert kernels.path.with_suffix(".log").read_text() == ""


def test_a_refused_call_names_its_argument(kernels: Library):
    with pytest.raises(KernelError, match="^swiglu_forward: gate: expected float32 .*got float64 .2, 3.$"):
        kernels.call("swiglu_forward", np.zeros((2, 3)), np.zeros((2, 3)), outputs=[np.zeros((2, 3))])
    with pytest.raises(ValueError, match="not C-contiguous"):
        kernels.call("swiglu_forward", np.zeros((4, 6), np.float32)[:, ::2])


def test_a_wheel_carries_libraries_that_load_without_a_compiler(tmp_path):
    pytest.importorskip("setuptools", minversion="70.1")
    tree = tmp_path / "tree"
    for name in ("llm_core", "configs", "kernels"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for path in (tree / "kernels" / "cpu").iterdir():  # abi.cpp alone is a whole library, compiled in a second
        if path.name != "instruction_set.cpp":
            path.unlink()
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    cache = {"RUN_LLM_CACHE": str(tmp_path / "cache")}
    made = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tree), **cache)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name, made.stdout + made.stderr
    target = tmp_path / "installed"
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    code = "from llm_core.kernels import library; found = library(); print(found.isa, found.path)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=60,
                          env={"PYTHONPATH": str(target), "PATH": "", "RUN_LLM_CACHE": str(tmp_path / "other")})
    isa, path = done.stdout.split()
    assert isa == available()[0], "the compiler at hand knows the best instruction set of this machine"
    assert Path(path).is_relative_to(target / "llm_core" / "kernels" / "lib"), done.stderr
