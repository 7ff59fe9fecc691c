#!/usr/bin/env python3
"""Attention: the kernels against torch's SDPA, against naive attention in torch, and in MindSpore operators.

    python benchmarks/attention.py                                        # everything, and a picture of it
    python benchmarks/attention.py --only sdpa --lengths 512 --dims 64    # a part; results are not written

sdpa: batch 1, 8 heads, S 512 to 4096, D 64 and 128, causal and full, fp32 and bfloat16, forward and backward, on two
threads and on one. Every point is measured in turn in one process, round by round: the kernels (called with NumPy
arrays, [B, S, H, D]), torch's scaled_dot_product_attention (contiguous [B, H, S, D], the faster of its layouts; its
backward pass alone, over a graph that is kept), naive torch (up to S 2048), and a loop of multiply-adds that touches
no memory, which gives the peak. What both sides compute is compared first. The ratios are medians over the points with
two threads. Operations: 4 B H S^2 D forward, 10 B H S^2 D backward, half of that causal.

varlen: 4096 tokens in documents of about 250, forward and backward: the kernels by the ranges that each query sees,
torch with a dense mask (of floats: faster than of booleans).
error: of fp32 against fp64, beside torch's.
mindspore: llm_core's Attention Cell against attention written in MindSpore operators, both in GRAPH_MODE, batch 1, 4
heads, D 64, causal, S 256 to 8192, forward and forward + backward; in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import attention_mindspore, common, timing  # noqa: E402
from benchmarks.attention_sides import HEADS, all_keys, kernels, own_calls, relative, sides  # noqa: E402

PARTS = ("sdpa", "varlen", "error", "mindspore")
LENGTHS, DIMS, NAIVE_LONGEST = (512, 1024, 2048, 4096), (64, 128), 2048
PASSES = {"fwd": 4, "bwd": 10}  # operations over B H S^2 D
PACKED_LENGTH, DOCUMENT = 4096, (200, 300)
BUDGET = 1.5  # seconds a point and pass
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative, own against torch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--lengths", type=int, nargs="+", help="other values of S")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help="values of D, for sdpa")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCE), help="for sdpa")
    parser.add_argument("--threads", type=int, nargs="+", default=(common.THREADS, 1), help="for sdpa")
    parser.add_argument("--side", choices=("mindspore",), help=argparse.SUPPRESS)
    args = parser.parse_args()
    common.pin_threads()
    if args.side:
        print(json.dumps(attention_mindspore.measure(args.lengths or attention_mindspore.LENGTHS)))
        return 0
    ratios, measured = [], {}
    for part in [args.only] if args.only else PARTS:
        if part == "sdpa":
            dtypes = args.dtypes or (tuple(TOLERANCE) if kernels().isa == "avx512_bf16" else ("fp32",))
            cases = (dtypes, (True, False), args.lengths or LENGTHS, args.dims)
            measured[part], peaks = sdpa_table(list(product(*cases)), args.threads)
            ratios += sdpa_ratios(measured[part], peaks, max(args.threads))
        elif part == "varlen":
            measured[part], ratio = varlen()
            ratios.append(ratio)
        elif part == "error":
            measured[part], ratio = error()
            ratios.append(ratio)
        else:
            lengths = ["--lengths", *map(str, args.lengths)] if args.lengths else []
            measured[part] = common.run_side(["--side", "mindspore", *lengths])
            ratios.append(mindspore_ratio(measured[part]))
    if len(sys.argv) == 1:  # all of it
        picture(measured["sdpa"], common.RESULTS / "attention.png")
        settings = {"batch": 1, "heads": HEADS, "mindspore_heads": attention_mindspore.HEADS, "kernels": kernels().isa}
        common.write_result("attention", measured, ratios, settings)
    return 0


# --------------------------------------------------------------------------------------------- kernels against torch


def sdpa_table(cases: list[tuple], threads: tuple[int, ...]) -> tuple[list[dict], dict[str, float]]:
    """Measure and print every point; returns the points and the highest peak met, "fp32 1" ... -> GFLOP/s."""
    import torch

    peak, peaks, points = timing.Peak(kernels().isa), {}, []
    for dtype, causal, length, dim in cases:
        problem = sides(dtype, all_keys(length, causal), length, dim, causal or None, length <= NAIVE_LONGEST)
        if (worst := max(problem.check().values())) > TOLERANCE[dtype]:
            raise SystemExit(f"attention: {dtype} S {length} D {dim}: own and torch differ by {worst:.1e}")
        for count, name in product(threads, PASSES):
            torch.set_num_threads(count)  # of the kernels as well: both use the OpenMP library that torch brings
            if kernels().threads() != count:
                raise SystemExit("attention: the kernels do not follow torch's number of threads")
            calls = {side: lambda call=call: timing.block(call) for side, call in problem.calls[name].items()}
            times = timing.in_turn({**calls, "peak": lambda: peak.gflops(dtype)}, BUDGET)  # noqa: B023
            gflops = statistics.median(times.pop("peak"))
            peaks[f"{dtype} {count}"] = max(gflops, peaks.get(f"{dtype} {count}", 0))
            work = PASSES[name] * HEADS * length**2 * dim / (2 if causal else 1) / 1e6
            ms = timing.medians(times)
            points.append({
                "dtype": dtype, "causal": causal, "length": length, "dim": dim, "threads": count, "pass": name,
                "ms": ms, "ratio": ms["torch"] / ms["own"], "peak_gflops": gflops,
                "gflops": {side: work / value for side, value in ms.items()},
                "of_peak": {side: work / value / gflops for side, value in ms.items()},
                "ms_all": {side: [round(1e3 * value, 4) for value in values] for side, values in times.items()},
            })  # fmt: skip
            print_point(points[-1])
    return points, peaks


def print_point(point: dict) -> None:
    """One line of the table."""
    ms, share = point["ms"], point["of_peak"]
    naive = f"{ms['naive']:9.2f}" if "naive" in ms else " " * 9
    print(
        f"{point['dtype']} {'causal' if point['causal'] else 'full  '} {point['pass']} S {point['length']:4} "
        f"D {point['dim']:3}  {point['threads']} thr  own {ms['own']:8.2f} ms  torch {ms['torch']:8.2f} ms  "
        f"naive torch {naive} ms  ratio {point['ratio']:5.2f}  "
        f"of peak: own {share['own']:4.0%}, torch {share['torch']:4.0%}",
        flush=True,
    )


def chosen(points: list[dict], **wanted: Any) -> list[dict]:
    """The points whose fields are those."""
    return [point for point in points if all(point[key] == value for key, value in wanted.items())]


def sdpa_ratios(points: list[dict], peaks: dict[str, float], threads: int) -> list[common.Ratio]:
    """Ratio lines of the points with `threads`, and what share of the peak one thread reaches."""
    ratios = []
    for dtype, causal, name in product(TOLERANCE, (True, False), PASSES):
        same = chosen(points, dtype=dtype, causal=causal, **{"pass": name})
        table = chosen(same, threads=threads)
        if not table:
            continue
        figure = f"attention_{name}_{'causal' if causal else 'full'}_{dtype}"
        middle = statistics.median(point["ratio"] for point in table)
        lowest = min(table, key=lambda point: point["ratio"])
        own, other = (statistics.median(point["gflops"][side] for point in table) for side in ("own", "torch"))
        ratios.append(common.ratio_line(figure, middle, own, "GFLOP/s", "torch", other))
        print(f"  lowest: {lowest['ratio']:.2f} at S {lowest['length']} D {lowest['dim']}")
        for text, share, speedup in one_thread(same, threads):
            print(f"  one thread, {text}: {share:.0%} of peak; {threads} threads are {speedup:.2f}x as fast")
    print("measured FMA peak: " + ", ".join(f"{name} thread(s) {value:.0f} GFLOP/s" for name, value in peaks.items()))
    return ratios


def one_thread(points: list[dict], threads: int) -> Iterator[tuple[str, float, float]]:
    """At S >= 1024, lowest and median: (which, share of the peak on one thread, speed-up of `threads`)."""
    pairs = []
    for one in chosen(points, threads=1):
        many = chosen(points, threads=threads, length=one["length"], dim=one["dim"])
        if one["length"] >= 1024 and many and threads > 1:
            pairs.append((one["of_peak"]["own"], one["ms"]["own"] / many[0]["ms"]["own"]))
    if pairs:
        shares, speedups = zip(*pairs, strict=True)
        yield "lowest", min(shares), min(speedups)
        yield "median", statistics.median(shares), statistics.median(speedups)


def picture(points: list[dict], path: Path) -> None:
    """Share of the peak over S, on two threads: a row a dtype, a column a pass and mask."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [(True, "fwd"), (True, "bwd"), (False, "fwd"), (False, "bwd")]
    words = {"fwd": "forward", "bwd": "backward"}
    figure, axes = plt.subplots(len(TOLERANCE), len(columns), figsize=(12, 5.6), sharex=True, sharey=True)
    for row, dtype in enumerate(TOLERANCE):
        for axis, (causal, name) in zip(axes[row], columns, strict=True):
            for side, dim in product(("own", "torch"), DIMS):
                line = chosen(points, dtype=dtype, causal=causal, dim=dim, threads=common.THREADS, **{"pass": name})
                style = dict(color="tab:blue" if side == "own" else "tab:orange", marker="o" if dim == 64 else "s",
                             linestyle="-" if dim == 64 else "--", markersize=4)
                label = f"{'run_llm' if side == 'own' else 'torch SDPA'}, D {dim}"
                axis.plot([p["length"] for p in line], [100 * p["of_peak"][side] for p in line], label=label, **style)
            axis.set_title(f"{dtype}, {'causal' if causal else 'full'}, {words[name]}", fontsize=10)
            axis.set_xscale("log", base=2)
            axis.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
            axis.minorticks_off()
            axis.set_ylim(0, 100)
            axis.grid(alpha=0.3)
        axes[row][0].set_ylabel("% of measured FMA peak")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.suptitle(f"Attention on {common.machine()['cpu']}, {common.THREADS} threads, {HEADS} heads", fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------------------------------- packed documents, accuracy


def varlen() -> tuple[dict, common.Ratio]:
    """PACKED_LENGTH tokens of documents: every query sees its own document up to itself."""
    import numpy as np
    import torch

    torch.set_num_threads(common.THREADS)
    lengths = np.random.default_rng(0).integers(*DOCUMENT, PACKED_LENGTH // DOCUMENT[0])
    ends = np.cumsum(lengths)
    ends = np.append(ends[ends < PACKED_LENGTH], PACKED_LENGTH)
    starts = np.concatenate(([0], ends[:-1]))
    ranges = np.empty((1, PACKED_LENGTH, 2), np.int32)
    ranges[..., 0] = np.repeat(starts, ends - starts)
    ranges[..., 1] = np.arange(1, PACKED_LENGTH + 1)
    key = np.arange(PACKED_LENGTH)
    visible = (key >= ranges[0, :, :1]) & (key < ranges[0, :, 1:])
    mask = torch.zeros(PACKED_LENGTH, PACKED_LENGTH).masked_fill(~torch.from_numpy(visible), -torch.inf)
    problem = sides("fp32", ranges, PACKED_LENGTH, 64, mask)
    if (worst := max(problem.check().values())) > TOLERANCE["fp32"]:
        raise SystemExit(f"attention: packed: own and torch differ by {worst:.1e}")
    measured: dict[str, Any] = {"documents": len(ends)}
    for name, calls in problem.calls.items():
        measures = {side: lambda call=call: timing.block(call) for side, call in calls.items()}
        ms = timing.medians(timing.in_turn(measures, 2 * BUDGET))
        measured[name] = ms
        print(f"packed {name}: own {ms['own']:.2f} ms, torch with a dense mask {ms['torch']:.2f} ms")
    own, other = (sum(measured[name][side] for name in PASSES) for side in ("own", "torch"))
    return measured, common.ratio_line("attention_varlen", other / own, own, "ms", "torch (dense mask)", other)


def error(length: int = 1024, dim: int = 64) -> tuple[dict, common.Ratio]:
    """fp32 error of out, dq, dk, dv against fp64, own and torch; the ratio is that of the worst tensor."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    random = np.random.default_rng(0)
    q, k, v, dout = (random.standard_normal((1, length, HEADS, dim), np.float32) for _ in range(4))

    def torch_results(dtype: Any, causal: bool) -> list[Any]:
        *leaves, gradient = (torch.from_numpy(x).transpose(1, 2).contiguous().to(dtype) for x in (q, k, v, dout))
        for leaf in leaves:
            leaf.requires_grad_()
        out = F.scaled_dot_product_attention(*leaves, is_causal=causal)
        found = [out, *torch.autograd.grad(out, leaves, gradient)]
        return [x.detach().transpose(1, 2).numpy() for x in found]

    measured: dict[str, dict[str, tuple[float, float]]] = {}
    for causal in (True, False):
        forward, backward, results = own_calls("fp32", all_keys(length, causal), q, k, v, dout)
        forward()
        backward()
        exact, theirs = torch_results(torch.float64, causal), torch_results(torch.float32, causal)
        errors = {name: (relative(x, wanted), relative(other, wanted)) for name, x, other, wanted in
                  zip(("out", "dq", "dk", "dv"), results(), theirs, exact, strict=True)}
        measured["causal" if causal else "full"] = errors
        for name, (own, other) in errors.items():
            print(f"error against fp64, {'causal' if causal else 'full'} {name}: own {own:.2e}, torch {other:.2e}")
    own, other = max((pair for errors in measured.values() for pair in errors.values()), key=lambda p: p[0] / p[1])
    return measured, common.ratio_line("attention_error_fp32", other / own, own, "relative", "torch", other)


# ------------------------------------------------------------------------------------- inside MindSpore, against naive


def mindspore_ratio(rows: list[dict]) -> common.Ratio:
    """Print the table; the ratio is the median over it."""
    for row in rows:
        own, naive = row["ms"]["own"], row["ms"]["naive"]
        what = f"MindSpore S {row['length']:4} {row['pass']:7}"
        print(f"{what}  own {own:8.2f} ms  naive {naive:9.2f} ms  {naive / own:6.2f}x")
    factors = [row["ms"]["naive"] / row["ms"]["own"] for row in rows]
    own, naive = (statistics.median(row["ms"][side] for row in rows) for side in ("own", "naive"))
    ratio = common.ratio_line(
        "attention_vs_naive_mindspore", statistics.median(factors), own, "ms", "naive MindSpore", naive
    )
    print(f"  lowest {min(factors):.2f}, highest {max(factors):.2f}")
    return ratio


if __name__ == "__main__":
    raise SystemExit(main())
