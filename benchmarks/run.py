#!/usr/bin/env python3
"""Every benchmark, one after the other (`make bench`); ends with one line a figure.

    python benchmarks/run.py [NAME ...]      # attention operators train_step lora parallel decode preprocess
                                             # cuda_attention

One that needs a GPU is left out where there is none, unless it is asked for by name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.common import UNAVAILABLE  # noqa: E402

BENCHMARKS = ("attention", "operators", "train_step", "lora", "parallel", "decode", "preprocess", "cuda_attention")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}")
    asked = parser.parse_args().names
    names = asked or BENCHMARKS
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    ratios, failed = [], []
    for name in names:
        print(f"== {name}", flush=True)
        started = time.monotonic()
        code, lines = run(HERE / f"{name}.py")
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
        ratios += lines
        if code and (asked or code != UNAVAILABLE):
            failed.append(name)
    print("\n" + "\n".join(ratios))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def run(script: Path) -> tuple[int, list[str]]:
    """Run a benchmark, showing its output as it comes; its exit code and its ratio lines."""
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("ratio "):
                lines.append(line.rstrip())
    return process.returncode, lines


if __name__ == "__main__":
    raise SystemExit(main())
