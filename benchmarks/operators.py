#!/usr/bin/env python3
"""Every fused operator, and the bfloat16 products: the kernels against torch's operators and MindSpore's graph.

    python benchmarks/operators.py
    python benchmarks/operators.py --only rms_norm --scale 16    # one of them, sixteen times smaller; not written

Two threads. The kernels (NumPy arrays) and torch's own operator, with its autograd, run in one process in turn, round
by round; in each round a second process runs the reference Cell in a MindSpore graph. Measured are the forward pass
and forward + backward; what own and torch compute is compared first. A ratio is own against torch, forward + backward
where there is one. In bfloat16 the kernels read and write fp32, torch has everything in bfloat16, and MindSpore, which
has no such products on a CPU, computes in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, timing  # noqa: E402
from benchmarks.attention_sides import kernels, relative  # noqa: E402
from benchmarks.operator_sides import OPERATORS, Problem, mindspore_calls  # noqa: E402

BUDGET = 1.5  # seconds an operator and pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(OPERATORS), help="operators")
    parser.add_argument("--scale", type=int, default=1, help="rows and vocabularies are that much smaller")
    parser.add_argument("--side", choices=("mindspore",), help=argparse.SUPPRESS)
    args = parser.parse_args()
    common.pin_threads()
    if args.side:
        serve(args.scale)
        return 0
    import torch

    torch.set_num_threads(common.THREADS)
    has_bf16 = kernels().isa == "avx512_bf16"
    measured, ratios = {}, []
    with MindSpore(args.scale) as mindspore:
        for name in args.only or OPERATORS:
            if name.endswith("_bf16") and not has_bf16:
                print(f"{name}: the kernels for {kernels().isa} have no bfloat16 products")
                continue
            measured[name] = measure(name, OPERATORS[name](args.scale), mindspore)
            last = list(measured[name].values())[-1]
            ratio = last["torch"] / last["own"]
            ratios.append(common.ratio_line(f"op_{name}", ratio, last["own"], "ms", "torch", last["torch"]))
    if len(sys.argv) == 1:  # all of it
        common.write_result("operators", measured, ratios, {"kernels": kernels().isa})
    return 0


def measure(name: str, problem: Problem, mindspore: MindSpore) -> dict[str, dict[str, float]]:
    """Pass -> side -> milliseconds, and prints it."""
    check(name, problem)
    table = {}
    for what in problem.own:
        sides: dict[str, Callable[[], float]] = {
            "own": lambda call=problem.own[what]: timing.block(call),
            "torch": lambda call=problem.torch[what]: timing.block(call),
            "mindspore": lambda what=what: mindspore.measure(name, what),
        }
        times = timing.in_turn(sides, BUDGET)
        table[what] = timing.medians(times)
        text = ", ".join(f"{side} {ms:.3f} ms" for side, ms in table[what].items())
        factors = ", ".join(f"{table[what][side] / table[what]['own']:.2f}x" for side in ("torch", "mindspore"))
        print(f"{name} {what}: {text} ({factors})", flush=True)
        table[what]["spread"] = statistics.quantiles(times["own"])[2] / statistics.median(times["own"]) - 1
    return table


def check(name: str, problem: Problem) -> None:
    """SystemExit if own and torch disagree."""
    found, wanted = problem.results()
    for index, (own, other) in enumerate(zip(found, wanted, strict=True)):
        if not (error := relative(own, other)) < problem.tolerance:
            raise SystemExit(f"operators: {name}: result {index} of own and torch differ by {error:.1e}")


class MindSpore:
    """The process that runs MindSpore's side: asked for one measurement at a time, idle in between."""

    def __init__(self, scale: int) -> None:
        self.command = [sys.executable, sys.argv[0], "--side", "mindspore", "--scale", str(scale)]

    def __enter__(self) -> MindSpore:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.stdin.close()
        self.process.wait()

    def measure(self, name: str, what: str) -> float:
        """Seconds a call takes."""
        print(json.dumps([name, what]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"operators: MindSpore's side of {name} failed")
        return float(answer)


def serve(scale: int) -> None:
    """MindSpore's side: a line [operator, pass] on stdin -> a line of seconds on stdout."""
    from llm_core.runtime import prepare_environment

    prepare_environment(common.THREADS)
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    answers = sys.stdout
    sys.stdout = sys.stderr  # should anything print
    name, calls = None, {}
    for line in sys.stdin:
        asked, what = json.loads(line)
        if asked != name:
            name, calls = asked, mindspore_calls(asked, scale)
        print(timing.block(calls[what]), file=answers, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
