"""The arithmetic of benchmarks/cuda_attention.py: operations, rates, and the figures of measured points."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from benchmarks import common

PASSES = {"forward": 4, "backward": 10}  # operations over D, for a head and a pair
ERROR_PEERS = {  # side -> whose error its own is compared with: the first that is there
    "own": ("unfused", "flash", "efficient", "torch"), "paged": ("flash", "efficient", "torch"),
    "tf32": ("efficient",), "hopper": ("flash", "efficient"),
}  # fmt: skip

Point = dict[str, Any]


def pairs(lengths: Sequence[int], causal: bool) -> int:
    """Pairs of a query and a key that it sees, in documents of these lengths."""
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)


def teraflops(name: str, heads: int, dim: int, count: int, ms: float) -> float:
    """TFLOP/s of a pass over `count` pairs of every head."""
    return PASSES[name] * heads * dim * count / ms / 1e9


def documents(mean: int, total: int) -> list[int]:
    """Lengths between half and one and a half of the mean, the same in every run; `total` together."""
    draw, lengths = random.Random(0), []
    for _ in range(total // mean // 2):  # in pairs that make up for each other
        more = draw.randint(-mean // 2, mean // 2)
        lengths += [mean + more, mean - more]
    return lengths


def chosen(points: Sequence[Point], **wanted: Any) -> list[Point]:
    """The points whose fields are those."""
    return [point for point in points if all(point[key] == value for key, value in wanted.items())]


def lowest(name: str, points: Sequence[Point], own: str, peers: Sequence[str], unit: str) -> list[common.Ratio]:
    """The point where `own` does worst against the best of the peers; none where no point has both."""
    found = []
    for point in points:
        there = {peer: point["rate"][peer] for peer in peers if peer in point["rate"]}
        if there and own in point["rate"]:
            best = max(there, key=there.__getitem__)
            found.append((point["rate"][own] / there[best], best, point))
    if not found:
        return []
    ratio, best, point = min(found, key=lambda entry: entry[0])
    made = common.ratio_line(name, ratio, point["rate"][own], unit, best, point["rate"][best])
    print(f"  lowest of {len(found)}, at {point['what']}; highest {max(entry[0] for entry in found):.2f}")
    return [made]


def error_ratio(points: Sequence[Point]) -> list[common.Ratio]:
    """torch's error over our kernels' error, where that is lowest."""
    found = []
    for point in points:
        for output, by_side in point.get("errors", {}).items():
            for side, peers in ERROR_PEERS.items():
                peer = next((peer for peer in peers if peer in by_side), None)
                if peer and side in by_side:
                    what = f"{point['what']} {output}, {side}"
                    found.append((by_side[peer] / max(by_side[side], 1e-30), what, by_side[side], peer, by_side[peer]))
    if not found:
        return []
    ratio, what, own, peer, other = min(found)
    made = common.ratio_line("cuda_error_vs_torch", ratio, own, "relative", peer, other)
    print(f"  lowest of {len(found)}, at {what}")
    return [made]


def figures(measured: dict[str, list[Point]]) -> list[common.Ratio]:
    """The ratio lines of what has been measured."""
    fp32, bf16 = measured.get("fp32", []), measured.get("bf16", [])
    unfused = [point for point in chosen(fp32, causal=True, dim=64) if point["length"] >= 1024]
    wide = chosen(bf16, causal=True, dim=128)
    forward, backward = (chosen(wide, **{"pass": name}) for name in PASSES)
    varlen = measured.get("varlen", [])
    best, tera = ("flash", "cudnn"), "TFLOP/s"
    made = [
        *lowest("cuda_fp32_vs_unfused", unfused, "own", ["unfused"], tera),
        *lowest("cuda_fp32_vs_rows", fp32, "own", ["rows"], tera),
        *lowest("cuda_tf32_vs_efficient", fp32, "tf32", ["efficient"], tera),
        *lowest("cuda_bf16_forward_vs_flash", forward, "own", ["flash"], tera),
        *lowest("cuda_bf16_backward_vs_flash", backward, "own", ["flash"], tera),
        *lowest("cuda_hopper_forward_vs_best", forward, "hopper", best, tera),
        *lowest("cuda_hopper_backward_vs_best", backward, "hopper", best, tera),
        *lowest("cuda_varlen_vs_dense", varlen, "own", ["dense"], tera),
        *lowest("cuda_hopper_varlen_vs_dense", varlen, "hopper", ["dense hopper"], tera),
        *lowest("cuda_decode_vs_sdpa", measured.get("decode", []), "own", ["torch", "flash", "efficient"], "GB/s"),
        *lowest("cuda_paged_vs_sdpa", measured.get("decode", []), "paged", ["torch", "flash", "efficient"], "GB/s"),
    ]
    if table := measured.get("memory"):
        first, last = table[0], table[-1]
        made.append(common.ratio_line("cuda_memory", first["per_token"] / last["per_token"], last["per_token"],
                                      "bytes/token", f"at S {first['length']}", first["per_token"]))
        print(f"  at S {last['length']}")
    return made + error_ratio([point for points in measured.values() for point in points])
