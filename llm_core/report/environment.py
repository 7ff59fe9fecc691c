"""What a run was and ran on: run/{command.txt,environment.json,config.yaml} beside its output.

Versions are read from the installed packages' metadata, so nothing heavy is imported.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llm_core.errors import EnvironmentFault

PACKAGES = (
    "mindspore", "numpy", "pyyaml", "pydantic", "sentencepiece", "tokenizers", "fschat", "safetensors",
    "tqdm", "jinja2", "jieba", "matplotlib", "tensorboard", "mindformers", "torch", "transformers", "peft",
)
# Of the environment only what steers a run is recorded: the rest may hold secrets.
VARIABLE_PREFIXES = ("RUN_LLM_", "OMP_", "KMP_", "GOMP_", "MS_", "GLOG_", "ASCEND_", "HCCL_", "MKL_", "OPENBLAS_")
VARIABLES = (
    "RANK_ID", "RANK_SIZE", "DEVICE_ID", "RANK_TABLE_FILE", "CUDA_VISIBLE_DEVICES", "PYTHONHASHSEED",
    "LC_ALL", "LANG",
)
ISA_FLAGS = (
    "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_bf16",
    "amx_int8", "asimd", "sve", "bf16", "i8mm",
)


def environment_report() -> dict[str, Any]:
    """Versions, platform, CPU, memory, compiler, commit, and the variables that steer a run (JSON-able)."""
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": package_versions(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "hostname": platform.node(),
        "cpu": cpu_report(),
        "memory_gib": round(total_memory_bytes() / 2**30, 1),
        "compiler": compiler_version(),
        "git": git_state(Path(__file__).resolve().parent),
        "variables": {name: os.environ[name] for name in sorted(os.environ)
                      if name in VARIABLES or name.startswith(VARIABLE_PREFIXES)},
    }


def save_run_record(output_dir: str | Path, argv: Sequence[str], config_yaml: str) -> Path:
    """Write command.txt, environment.json and config.yaml to output_dir/run; returns that folder.

    A run into a folder that holds a record already (a resumed one) adds command-2.txt and so on; nothing is
    overwritten. `argv` is sys.argv's form; config_yaml the merged configuration.
    """
    folder = Path(output_dir) / "run"
    command = f"# {os.getcwd()}\n{shlex.join(argv)}\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        suffix = _claim(folder, command)
        (folder / f"environment{suffix}.json").write_text(json.dumps(environment_report(), indent=2) + "\n")
        (folder / f"config{suffix}.yaml").write_text(config_yaml, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{folder}: cannot write the run's record: {error.strerror}; "
                               "choose another --output_dir") from error
    return folder


def _claim(folder: Path, command: str) -> str:
    """Write the command under the first free name and return the suffix that names this run's files."""
    number = 1
    while True:
        suffix = "" if number == 1 else f"-{number}"
        try:
            with open(folder / f"command{suffix}.txt", "x", encoding="utf-8") as file:
                file.write(command)
            return suffix
        except FileExistsError:
            number += 1


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Installed version of each package, None for what is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def cpu_report() -> dict[str, Any]:
    """model, logical cores, cores this process may use, and the instruction sets that matter to kernels."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
    }


def usable_cores() -> int:
    """Cores that this process may run on (affinity): in a container often fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory_bytes() -> int:
    """Physical memory, or the cgroup's limit where that is lower; 0 if the platform does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such cgroup version, or "max"
            continue
    return total


def compiler_version() -> str | None:
    """First line of `$CXX --version`, else of g++'s or clang++'s; None without a C++ compiler."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        program = shutil.which(name) if name else None
        if program:
            lines = _output([program, "--version"]).splitlines()
            return lines[0] if lines else program
    return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that holds `folder`; None if it is in none (an installed wheel).

    `dirty` looks at tracked files only.
    """
    if "site-packages" in folder.parts or not shutil.which("git"):
        return None
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"]).strip()
    if not commit:
        return None
    changes = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": bool(changes.strip())}


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _output(command: list[str]) -> str:
    """stdout of a short command; empty if it fails or takes over five seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
