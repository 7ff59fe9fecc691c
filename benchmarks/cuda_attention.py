#!/usr/bin/env python3
"""Attention on a GPU: the CUDA kernels against torch's, in one process, by the GPU's own clock.

    python benchmarks/cuda_attention.py                                   # everything (some minutes); needs a GPU
    python benchmarks/cuda_attention.py --only bf16 --lengths 4096        # a part; results are not written

fp32: S 512 to 8192, D 64 and 128, causal and full, 8192 tokens. Forward against attention by torch's plain operators
(TF32 off) and, causal, against a kernel with one thread a query row; the kernels with 3xTF32 products against torch's
efficient backend, forward and backward.
bf16: S 2048 to 16384, 16384 tokens, forward and backward: against the flash, cuDNN and efficient backends of torch's
scaled_dot_product_attention; also the kernels for Hopper, where the library has them.
varlen: packed documents of different lengths against as many equally long ones in a batch, in operations of the pairs
that see each other.
decode: one token over long caches, contiguous and paged, against scaled_dot_product_attention. Of the smallest cache,
64 MiB, a large L2 (50 MB in an H100) keeps a part from call to call, for every side.
memory: peak memory of forward and backward over S, with what the kernels take for themselves.

Sides are measured in turn, round by round; figures are of the medians, and a figure of several shapes is its lowest. At
every shape each side's error against fp64 is taken, the worst of all batch items and heads. Operations: 4 D forward,
10 D backward, for every head and pair of a query and a key that it sees.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, timing  # noqa: E402
from benchmarks import cuda_sides as sides  # noqa: E402
from benchmarks.cuda_figures import PASSES, Point, documents, figures, pairs, teraflops  # noqa: E402
from benchmarks.cuda_sides import Problem, Side, TorchKernels  # noqa: E402

PARTS = ("fp32", "bf16", "varlen", "decode", "memory")
LENGTHS = {"fp32": (512, 1024, 2048, 4096, 8192), "bf16": (2048, 4096, 8192, 16384)}
DIMS = (64, 128)
TOKENS, WIDTH = {"fp32": 8192, "bf16": 16384}, {"fp32": 1024, "bf16": 2048}  # of a batch; heads times D
PACKED, MEANS = 16384, (2048, 512)  # tokens in documents of these lengths on average
CACHES = ((1, 8, 16384), (8, 8, 16384), (64, 8, 4096), (8, 32, 8192), (1, 8, 131072))  # batch, key heads, positions
DECODE_HEADS, DECODE_DIM, PAGE = 32, 128, 64
MEMORY_LENGTHS = (2048, 4096, 8192, 16384, 32768)
BUDGET = 0.4  # seconds a point and pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--lengths", type=int, nargs="+", help="other values of S, for fp32 and bf16")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help="values of D, for fp32 and bf16")
    args = parser.parse_args()
    if reason := sides.refusal():
        print(f"cuda_attention: nothing measured: {reason}", file=sys.stderr)
        return common.UNAVAILABLE
    from llm_core.kernels import cuda_library

    exact_products()
    kernels, measured = TorchKernels(cuda_library().path), {}
    for part in [args.only] if args.only else PARTS:
        if part in LENGTHS:
            cases = product(args.dims, (True, False), args.lengths or LENGTHS[part])
            measured[part] = [point for case in cases for point in self_attention(kernels, part, *case)]
        elif part == "varlen":
            measured[part] = [point for mean in MEANS for point in varlen(kernels, mean)]
        elif part == "decode":
            measured[part] = [decode(kernels, *cache) for cache in CACHES]
        else:
            measured[part] = [memory(kernels, length) for length in MEMORY_LENGTHS]
    ratios = figures(measured)
    if len(sys.argv) == 1:  # all of it
        common.write_result("cuda_attention", measured, ratios, device() | {"kernels": cuda_library().path.name})
    return 0


def exact_products() -> None:
    """No TF32 in torch's fp32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def device() -> dict[str, str]:
    """What it was measured on."""
    import torch

    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True, check=True)
        driver = done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {"device": torch.cuda.get_device_name(), "driver": driver, "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version())}


def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Side -> seconds of every round."""
    return timing.in_turn({name: lambda call=call: sides.seconds(call) for name, call in calls.items()}, BUDGET)


def point_of(what: str, times: dict[str, list[float]], rate: Callable[[str, float], float], unit: str,
             errors: dict, **fields: Any) -> Point:
    """A row of a table, printed; rate(side, ms)."""
    ms = timing.medians(times)
    rates = {name: rate(name, value) for name, value in ms.items()}
    print(f"{what:44} " + "  ".join(f"{name} {ms[name]:.4g} ms ({rates[name]:.4g} {unit})" for name in ms), flush=True)
    for output, by_side in errors.items():
        print(f"  error of {output}: " + ", ".join(f"{name} {value:.2e}" for name, value in by_side.items()))
    return {"what": what, **fields, "ms": ms, "rate": rates, "unit": unit, "errors": errors,
            "ms_all": {name: [round(1e3 * value, 5) for value in values] for name, values in times.items()}}


def present(found: dict[str, Side | None]) -> dict[str, Side]:
    """Those that are there."""
    return {name: side for name, side in found.items() if side}


def calls_of(found: dict[str, Side], name: str) -> dict[str, Callable[[], Any]]:
    """Side -> its forward or backward pass, of those that have one."""
    calls = {side: getattr(value, name) for side, value in found.items()}
    return {side: call for side, call in calls.items() if call}


def self_attention(kernels: TorchKernels, part: str, dim: int, causal: bool, length: int) -> list[Point]:
    """One shape of fp32 or bf16: forward and backward."""
    dtype = "float32" if part == "fp32" else "bfloat16"
    problem = Problem(dtype, max(1, TOKENS[part] // length), WIDTH[part] // dim, length, dim, causal)
    q, k, v, dout = problem.tensors()
    ranges = problem.ranges()
    own = {"fp32": ["own", "tf32"] + ["rows"] * causal, "bf16": ["own", "hopper"]}[part]
    found = {name: sides.own_side(kernels, name, ranges, q, k, v, dout) for name in own}
    if part == "fp32":
        found["unfused"] = sides.unfused_side(causal, q, k, v)
    backends = ["efficient"] if part == "fp32" else ["flash", "cudnn", "efficient"]
    found |= {name: sides.torch_side(name, causal, q, k, v, dout) for name in backends}
    found = present(found)
    errors = sides.errors(found, sides.exact(q, k, v, ranges, dout))
    points, count = [], problem.batch * pairs([length], causal)
    for name in PASSES:
        what = f"{part} {name} {'causal' if causal else 'full'} S {length} D {dim}"
        shown = {output: value for output, value in errors.items() if (output == "out") == (name == "forward")}
        points.append(point_of(
            what, timed(calls_of(found, name)),
            lambda _, ms, name=name: teraflops(name, problem.heads, dim, count, ms), "TFLOP/s", shown,
            dtype=dtype, causal=causal, length=length, dim=dim, batch=problem.batch, heads=problem.heads,
            **{"pass": name},
        ))  # fmt: skip
    return points


def varlen(kernels: TorchKernels, mean: int) -> list[Point]:
    """Documents packed into one row, beside a batch of documents of the mean length; causal, bf16, D 128."""
    dim, heads = 128, WIDTH["bf16"] // 128
    lengths = documents(mean, PACKED)
    packed = Problem("bfloat16", 1, heads, PACKED, dim, True)
    dense = Problem("bfloat16", PACKED // mean, heads, mean, dim, True)
    tensors, packed_ranges = packed.tensors(), sides.ranges_of(lengths, True)
    found: dict[str, Side | None] = {}
    for name in ("own", "hopper"):
        found[name] = sides.own_side(kernels, name, packed_ranges, *tensors)
        batch = sides.own_side(kernels, name, dense.ranges(), *dense.tensors())
        found["dense" if name == "own" else "dense hopper"] = batch
    found = present(found)
    mine = {name: side for name, side in found.items() if not name.startswith("dense")}
    errors = sides.errors(mine, sides.exact(*tensors[:3], packed_ranges, tensors[3]))
    counts = {True: dense.batch * pairs([mean], True), False: pairs(lengths, True)}
    return [
        point_of(f"varlen {name}, documents of {mean}", timed(calls_of(found, name)),
                 lambda side, ms, name=name: teraflops(name, heads, dim, counts[side.startswith("dense")], ms),
                 "TFLOP/s", errors if name == "forward" else {}, mean=mean, lengths=lengths, **{"pass": name})
        for name in PASSES
    ]


def decode(kernels: TorchKernels, batch: int, kv_heads: int, length: int) -> Point:
    """One new token a row over a cache of `length` positions, bf16."""
    import torch
    import torch.nn.functional as F

    make = dict(device="cuda", dtype=torch.bfloat16)
    q = torch.randn(batch, 1, DECODE_HEADS, DECODE_DIM, **make)
    k, v = (torch.randn(batch, kv_heads, length, DECODE_DIM, **make) for _ in range(2))
    out, paged_out = torch.empty_like(q), torch.empty_like(q)
    start, no_bias = torch.zeros(batch, dtype=torch.int32, device="cuda"), torch.zeros(1, device="cuda")
    column = torch.tensor([length - 1], dtype=torch.int32, device="cuda")
    heads = [x.flatten(0, 1) for x in (k, v)]
    own = kernels.prepared("attention_cached", q, *heads, column, start, no_bias, outputs=[out])
    blocks = length // PAGE
    table = torch.randperm(batch * blocks, device="cuda").to(torch.int32)
    pages = [torch.empty(batch * blocks, PAGE, kv_heads, DECODE_DIM, **make) for _ in range(2)]
    for to, cache in zip(pages, (k, v), strict=True):
        to[table.long()] = cache.unflatten(2, (blocks, PAGE)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    paged = kernels.prepared("attention_paged", q, *pages, table.view(batch, blocks), torch.full_like(start, length),
                             start, no_bias, outputs=[paged_out])
    group = DECODE_HEADS // kv_heads
    query, repeated = q.transpose(1, 2), [x.repeat_interleave(group, 1) for x in (k, v)]

    def sdpa(backend: str | None) -> sides.Inference:
        """torch's choice and flash share the key heads; the efficient backend cannot, and has them repeated."""
        keys, values = repeated if backend == "efficient" else (k, v)
        shared = {} if backend == "efficient" else {"enable_gqa": True}

        return sides.Inference(lambda: F.scaled_dot_product_attention(query, keys, values, **shared), backend)

    calls = {"own": own, "paged": paged}
    results = {"own": lambda: [out], "paged": lambda: [paged_out]}
    for name, backend in (("torch", None), ("flash", "flash"), ("efficient", "efficient")):
        call = sdpa(backend)
        try:
            call()
        except RuntimeError as error:
            sides.not_measured(name, error)
            continue
        calls[name], results[name] = call, lambda call=call: [call().transpose(1, 2)]
    all_keys = torch.tensor([[[0, length]]], dtype=torch.int32)
    wanted = sides.exact(q, *(x.transpose(1, 2) for x in repeated), all_keys)
    errors = sides.errors({name: Side(calls[name], None, results[name]) for name in calls}, wanted)
    size = 2 * k.numel() * k.element_size()  # what has to be read
    return point_of(f"decode B {batch}, {DECODE_HEADS} on {kv_heads} heads, T {length}", timed(calls),
                    lambda _, ms: size / ms / 1e6, "GB/s", errors, batch=batch, kv_heads=kv_heads, length=length)


def memory(kernels: TorchKernels, length: int) -> Point:
    """Peak bytes of forward and backward together, a token: inputs and outputs, and what the kernels take."""
    import torch

    problem = Problem("bfloat16", 1, 16, length, 128, True)
    pool, before = sides.Pool(), torch.cuda.memory_allocated()
    given = problem.tensors()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()  # what drawing the numbers took is not theirs
    pool.reset()
    side = sides.own_side(kernels, "own", problem.ranges(), *given)
    side.forward()
    side.backward()
    torch.cuda.synchronize()
    tensors, scratch = torch.cuda.max_memory_allocated() - before, pool.highest()
    print(f"memory S {length}: tensors {tensors / 2**20:.1f} MiB, scratch {scratch / 2**20:.1f} MiB", flush=True)
    return {"length": length, "tensors": tensors, "scratch": scratch, "per_token": (tensors + scratch) / length}


if __name__ == "__main__":
    raise SystemExit(main())
