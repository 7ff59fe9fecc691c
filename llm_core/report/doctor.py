"""`run_llm.py doctor`: can this machine do what the project asks of it, and if not, what to do about it.

Reads versions and the machine, and starts `llm_core.selftest` for the part that only a try can tell.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_core.report.console import console, paint
from llm_core.report.environment import (
    compiler_version,
    cpu_report,
    git_state,
    package_versions,
    total_memory_bytes,
    usable_cores,
)

OK, WARN, FAIL = "OK", "WARN", "FAIL"
COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}
PYTHON_RANGE = ((3, 10), (3, 13))  # from, below
# package -> (from, below); None = any
REQUIRED: dict[str, tuple[str | None, str | None]] = {
    "mindspore": ("2.9", "2.11"),
    "numpy": (None, "2"),
    "pyyaml": (None, None),
    "pydantic": ("2", None),
    "sentencepiece": (None, None),
    "tokenizers": (None, None),
    "fschat": (None, None),
    "safetensors": (None, None),
    "tqdm": (None, None),
    "jinja2": (None, None),
    "jieba": (None, None),
    "matplotlib": (None, None),
}
OPTIONAL = {
    "tensorboard": "callbacks: SummaryMonitor",
    "mindformers": "registering the models with MindFormers",
    "torch": "`make parity` and `make bench`",
    "transformers": "`make parity` and `make bench`",
}
SELFTEST_SECONDS = 120
LOW_MEMORY_GIB, LOW_DISK_GIB = 4, 5


@dataclass(frozen=True)
class Finding:
    """One row: its mark, what was looked at, what was found, and the way out where there is something to mend."""

    mark: str
    name: str
    found: str
    advice: str = ""


def main(argv: Sequence[str] = ()) -> int:
    """Print the table; returns 0, or 1 if anything is FAIL."""
    parser = argparse.ArgumentParser(prog="run_llm.py doctor", description="Check versions, machine and installation.")
    parser.parse_args(list(argv))
    findings: list[Finding] = []
    for title, checks in (
        ("Versions", [check_python, check_required, check_optional]),
        ("Machine", [check_cpu, check_threads, check_memory, check_disk, check_compiler]),
        ("Files", [check_checkout, check_tokenizers]),
        ("Self-test", [check_selftest]),
    ):
        console.result(paint(title, "bold"))
        for check in checks:
            for finding in check():
                findings.append(finding)
                _show(finding)
    failures = sum(finding.mark == FAIL for finding in findings)
    warnings = sum(finding.mark == WARN for finding in findings)
    console.result(_verdict(failures, warnings))
    return 1 if failures else 0


def _show(finding: Finding) -> None:
    mark = paint(f"{finding.mark:<4}", COLOURS[finding.mark])
    console.result(f"  {mark}  {finding.name:<17} {finding.found}")
    if finding.advice:
        console.result(f"        {'':<17} -> {finding.advice}")


def _verdict(failures: int, warnings: int) -> str:
    if failures:
        return paint(f"{failures} to mend before anything runs (FAIL, above)", "red")
    if warnings:
        return paint(f"everything runs; {warnings} to know about (WARN, above)", "yellow")
    return paint("everything is in order", "green")


def check_python() -> list[Finding]:
    """3.10 to 3.12: what MindSpore 2.9 and 2.10 have wheels for."""
    found = f"{platform.python_version()} ({sys.executable})"
    if PYTHON_RANGE[0] <= sys.version_info[:2] < PYTHON_RANGE[1]:
        return [Finding(OK, "python", found)]
    return [Finding(FAIL, "python", found, "make the .venv with Python 3.10, 3.11 or 3.12")]


def check_required() -> list[Finding]:
    """Every package that llm_core imports, against its range."""
    versions = package_versions(list(REQUIRED))
    return [_required(name, versions[name], *REQUIRED[name]) for name in REQUIRED]


def _required(name: str, version: str | None, lowest: str | None, below: str | None) -> Finding:
    bounds = ",".join(bound for bound in (f">={lowest}" if lowest else "", f"<{below}" if below else "") if bound)
    way_out = f"{sys.executable} -m pip install '{name}{bounds}'"
    if version is None:
        return Finding(FAIL, name, "not installed", way_out)
    if (lowest and _number(version) < _number(lowest)) or (below and _number(version) >= _number(below)):
        return Finding(FAIL, name, f"{version}, but {bounds} is needed", way_out)
    return Finding(OK, name, f"{version} ({bounds})" if bounds else version)


def _number(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare by: "2.10.0rc1" -> (2, 10, 0)."""
    numbers = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def check_optional() -> list[Finding]:
    """Packages that one feature each needs; their absence is no fault."""
    versions = package_versions(list(OPTIONAL))
    return [Finding(OK, name, f"{versions[name] or 'not installed'} (only for {OPTIONAL[name]})") for name in OPTIONAL]


def check_cpu() -> list[Finding]:
    """Model, cores and the instruction sets that kernels can use."""
    cpu = cpu_report()
    isa = " ".join(cpu["isa"]) or "no vector extension known here"
    return [Finding(OK, "cpu", f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores usable, {isa}")]


def check_threads() -> list[Finding]:
    """OpenMP's settings as a run would see them."""
    cores, asked = usable_cores(), os.environ.get("OMP_NUM_THREADS")
    findings = []
    if asked and asked.isdigit() and int(asked) > cores:
        advice = "unset OMP_NUM_THREADS, or set it to the number of usable cores"
        findings.append(Finding(WARN, "threads", f"OMP_NUM_THREADS={asked}, but {cores} usable cores", advice))
    else:
        source = "OMP_NUM_THREADS" if asked else "all usable cores"
        findings.append(Finding(OK, "threads", f"{asked or cores} ({source})"))
    policy = os.environ.get("OMP_WAIT_POLICY")
    if policy and policy.lower() != "passive":
        advice = "unset it: spinning threads take cores from MindSpore (a step is 1.6x slower)"
        findings.append(Finding(WARN, "OMP_WAIT_POLICY", policy, advice))
    return findings


def check_memory() -> list[Finding]:
    """Physical memory, or what the container may use of it."""
    gib = total_memory_bytes() / 2**30
    if not gib:
        return [Finding(WARN, "memory", "unknown on this platform")]
    if gib < LOW_MEMORY_GIB:
        advice = "the demo runs; for models above ~100M parameters use a machine with more"
        return [Finding(WARN, "memory", f"{gib:.1f} GiB", advice)]
    return [Finding(OK, "memory", f"{gib:.1f} GiB")]


def check_disk() -> list[Finding]:
    """Room and permission to write where a run writes: here, and in the folder for temporary files."""
    return [_disk("disk, here", Path.cwd()), _disk("disk, temporary", Path(tempfile.gettempdir()))]


def _disk(name: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    found = f"{free:.1f} GiB free in {folder}"
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return Finding(WARN, name, f"{found}, not writable ({error.strerror})", "give runs an --output_dir elsewhere")
    if free < LOW_DISK_GIB:
        advice = "free space: a checkpoint takes 12 bytes a parameter, a data set at least 48 MiB"
        return Finding(WARN, name, found, advice)
    return Finding(OK, name, found)


def check_compiler() -> list[Finding]:
    """The C++ compiler that kernels are built with."""
    version = compiler_version()
    if version is None:
        return [Finding(WARN, "compiler", "no g++ or clang++", "optional: without it the reference operators run")]
    return [Finding(OK, "compiler", version)]


def check_checkout() -> list[Finding]:
    """Which llm_core this is."""
    folder = Path(__file__).resolve().parents[1]
    git = git_state(folder)
    where = f"{folder}, commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else str(folder)
    return [Finding(OK, "llm_core", where)]


def check_tokenizers() -> list[Finding]:
    """The folder in which --tokenizer_type looks names up, and what it holds."""
    from llm_core.text.lookup import FILE_NAMES, tokenizer_folder

    folder = tokenizer_folder()
    if not folder.is_dir():
        return [Finding(OK, "tokenizers", f"no folder {folder} (it is only for tokenizers given by name)")]
    names = sorted({path.parent.name for name in FILE_NAMES for path in folder.glob(f"*/{name}")})
    names += sorted(path.stem for path in folder.glob("*.model"))
    return [Finding(OK, "tokenizers", f"{folder}: {', '.join(names) or 'empty'}")]


def check_selftest() -> list[Finding]:
    """What `llm_core.selftest` found, and how it ended."""
    command = [sys.executable, "-m", "llm_core.selftest"]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SELFTEST_SECONDS, env=environment)
        code, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as expired:
        code, output, errors = None, _text(expired.stdout), _text(expired.stderr)
    findings = [_tried(json.loads(line)) for line in output.splitlines() if line.startswith('{"check"')]
    if code == 0:
        return findings
    ended = f"no answer within {SELFTEST_SECONDS} s" if code is None else f"the process ended with code {code}"
    last = (errors.strip().splitlines() or ["no message"])[-1]
    advice = "reinstall mindspore in a fresh .venv; if it still dies, this CPU or C library is too old for its wheels"
    return [*findings, Finding(FAIL, "self-test", f"{ended}: {last}", advice)]


def _tried(line: dict) -> Finding:
    found = f"{line['found']} ({line['seconds']:.1f} s)"
    if line["ok"]:
        return Finding(OK, line["check"], found)
    return Finding(FAIL, line["check"], found, "see the rows above; if they are in order, reinstall in a fresh .venv")


def _text(stream: bytes | str | None) -> str:
    """A timed-out process's output, which subprocess gives as bytes even in text mode."""
    return stream.decode(errors="replace") if isinstance(stream, bytes) else stream or ""
