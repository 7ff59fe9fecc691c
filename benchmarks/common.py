"""What the benchmarks share: two sides in turn, the result file, the ratio line.

A benchmark is a script that runs alone. It measures its own side and its peer's in processes of their own, in
turn (own, peer, own, peer ...), each pinned to the same number of cores, writes benchmarks/results/NAME.json
with every repetition, and prints one line a figure.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
THREADS = 2
UNAVAILABLE = 69  # exit code of a benchmark whose device this machine lacks: sysexits.h's EX_UNAVAILABLE
PACKAGES = ("mindspore", "numpy", "torch", "transformers", "peft", "sentencepiece", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Ratio:
    """One figure: own against peer; `ratio` above 1 means that own is the better one."""

    name: str
    ratio: float
    own: float
    unit: str
    peer: str
    peer_value: float


def result_header() -> dict[str, Any]:
    """How to repeat a measurement: command, commit, machine, versions."""
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),  # noqa: UP017 (3.10 has no UTC)
        "commit": _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions()},
    }


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory."""
    cpu = platform.processor()
    memory = 0.0
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}


def versions() -> dict[str, str]:
    """Versions of the packages that matter for speed, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def pin_threads() -> None:
    """Give this process THREADS cores and as many threads; call before importing mindspore or torch."""
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    os.sched_setaffinity(0, cores)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(len(cores))


def run_side(arguments: Sequence[str]) -> dict[str, Any]:
    """Run this benchmark again as one side (`--side own` ...); the last line of its output is its JSON result."""
    done = subprocess.run([sys.executable, sys.argv[0], *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{sys.argv[0]} {' '.join(arguments)} failed with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def alternate(
    own: Sequence[str], peer: Sequence[str], repetitions: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The results of both sides, measured in turn, so that a slow minute of the machine hits both."""
    own_results, peer_results = [], []
    for index in range(repetitions):
        for side, arguments, results in (("own", own, own_results), ("peer", peer, peer_results)):
            results.append(run_side(arguments))
            print(f"  {index + 1}/{repetitions} {side}: {_brief(results[-1])}", file=sys.stderr, flush=True)
    return own_results, peer_results


def _brief(result: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, (int, float)))


def ratio_line(name: str, ratio: float, own: float, unit: str, peer: str, peer_value: float) -> Ratio:
    """Print `ratio NAME R (own X UNIT, PEER Y UNIT)`, R above 1 being better, and give it as a value."""
    print(f"ratio {name} {ratio:.3f} (own {own:.4g} {unit}, {peer} {peer_value:.4g} {unit})", flush=True)
    return Ratio(name, ratio, own, unit, peer, peer_value)


def write_result(
    name: str, repetitions: Any, ratios: Sequence[Ratio], settings: dict[str, Any] | None = None
) -> Path:
    """Write benchmarks/results/NAME.json: header, settings, every repetition, the ratios."""
    RESULTS.mkdir(exist_ok=True)
    content = {
        "name": name,
        **result_header(),
        "settings": {"threads": THREADS, **(settings or {})},
        "ratios": [asdict(ratio) for ratio in ratios],
        "repetitions": repetitions,
    }
    path = RESULTS / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(compact(json.dumps(content, indent=1)) + "\n")
    os.replace(part, path)
    return path


def compact(text: str) -> str:
    """Indented JSON with every list of numbers on one line."""
    return re.sub(r"\[[\s\d.,e+-]*\]", lambda found: " ".join(found[0].split()), text)
