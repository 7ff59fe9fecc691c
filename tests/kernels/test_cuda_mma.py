"""Attention in bf16 and fp16 on the emulated tensor cores, against attention in fp64 of the same rounded numbers."""

from __future__ import annotations

from dataclasses import replace

import attention_oracle as oracle
import numpy as np
import pytest
from bfloat16 import rounded, to_bfloat16, widened
from elementwise import relative
from small_gpu import small_gpu
from test_attention import settings

from llm_core.kernels import BFloat16

LIMITS = {"bfloat16": 1e-2, "float16": 1.5e-3}
CASES = {name: case for name, case in oracle.cases().items() if case.dim <= 128}
for _dim in (24, 60, 90, 128):  # enough heads for the large blocks of every width; 60 and 90 have no aligned rows
    CASES[f"many heads of {_dim}"] = oracle.Case(1, 150, 150, 4, 2, _dim, oracle.causal_ranges(150, 150))
# Large blocks of which one sees nothing: what was fetched for it must still have come before its end.
CASES["wide rows that see nothing"] = oracle.Case(2, 130, 130, 2, 2, 128,
                                                  oracle.causal_ranges(130, 130, kv_start=(130, 3)))


def stored(x: np.ndarray, dtype: str) -> np.ndarray | BFloat16:
    return BFloat16(rounded(x)) if dtype == "bfloat16" else x.astype(np.float16)


def as_fp32(x: np.ndarray | BFloat16) -> np.ndarray:
    return widened(x.bits) if isinstance(x, BFloat16) else x.astype(np.float32)


def nans(x: np.ndarray, dtype: str) -> np.ndarray | BFloat16:
    return stored(np.full(x.shape, np.nan, np.float32), dtype)


def run(emulator, case: oracle.Case, numbers, dtype: str) -> list[np.ndarray]:
    """out, lse, dq, dk, dv in fp32 of q, k, v, dout in fp32."""
    q, k, v, dout = (stored(x, dtype) for x in numbers)
    out, lse = nans(numbers[0], dtype), np.full((case.batch, case.heads, case.q_len), np.nan, np.float32)
    emulator.call("attention_forward", q, k, v, *settings(case), outputs=[out, lse])
    grads = [nans(x, dtype) for x in numbers[:3]]
    emulator.call("attention_backward", q, k, v, *settings(case), out, lse, dout, outputs=grads)
    return [as_fp32(out), lse, *map(as_fp32, grads)]


def wanted_of(case: oracle.Case, numbers) -> list[np.ndarray]:
    q, k, v, dout = numbers
    return [*oracle.attention(q, k, v, case.ranges, case.bias, case.prefix),
            *oracle.attention_gradients(q, k, v, case.ranges, case.bias, case.prefix, dout)]


def rounding(dtype: str):
    return to_bfloat16 if dtype == "bfloat16" else lambda x: x.astype(np.float16).astype(np.float32)


def plain(case: oracle.Case, numbers, dtype: str) -> list[np.ndarray]:
    """What exact arithmetic gives whose weights, score gradients and results are rounded: out, dq, dk, dv."""
    q, k, v, dout = (x.astype(np.float64) for x in numbers)
    cut = rounding(dtype)
    group, scale = case.heads // case.kv_heads, case.dim**-0.5
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    weights, _ = oracle._weights(q, k, case.ranges, case.bias, case.prefix)
    largest = np.maximum(weights.max(-1, keepdims=True), 1e-300)
    out = np.einsum("bhij,bjhd->bihd", cut(weights / largest) * largest, v)
    delta = np.einsum("bihd,bihd->bhi", dout, cut(out))[..., None]
    slopes = cut(weights * (np.einsum("bihd,bjhd->bhij", dout, v) - delta))
    dk = np.einsum("bhij,bihd->bjhd", slopes, q) * scale
    dv = np.einsum("bhij,bihd->bjhd", cut(weights), dout)
    grouped = (case.batch, case.k_len, case.kv_heads, group, case.dim)
    dq = np.einsum("bhij,bjhd->bihd", slopes, k) * scale
    return [cut(x) for x in (out, dq, dk.reshape(grouped).sum(3), dv.reshape(grouped).sum(3))]


def check_every_head(found: np.ndarray, wanted: np.ndarray, limit: float) -> None:
    """Every batch item and head of [B, S, heads, D] by itself; numbers that all but vanish may be off by a little."""
    for b, head in np.ndindex(found.shape[0], found.shape[2]):
        one, other = found[b, :, head], wanted[b, :, head]
        assert relative(one, other) < limit or np.abs(one - other).max() < limit / 2, (b, head)


def check(emulator, case: oracle.Case, dtype: str, seed: int = 0) -> None:
    numbers = [rounding(dtype)(x) for x in case.tensors(seed)]
    found, wanted = run(emulator, case, numbers, dtype), wanted_of(case, numbers)
    np.testing.assert_allclose(found.pop(1), wanted.pop(1), atol=1e-5, rtol=1e-6)
    for ours, other, exact in zip(found, plain(case, numbers, dtype), wanted, strict=True):
        check_every_head(ours, exact, LIMITS[dtype])
        assert relative(ours, exact) <= 2 * relative(other, exact) or np.abs(ours - exact).max() < LIMITS[dtype] / 4


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(emulator, name):
    emulator.seed(0)
    check(emulator, CASES[name], "bfloat16")


@pytest.mark.parametrize("name", ["full", "packed documents", "prefix", "bias of each row", "grouped", "single key",
                                  "queries that see nothing", "odd width", "head_dim 80", "many heads of 128"])
def test_float16(emulator, name):
    emulator.seed(1)
    check(emulator, CASES[name], "float16")


@pytest.mark.parametrize("dim", [24, 60, 90, 128])
def test_a_small_gpu_takes_every_width(emulator, dim):
    """Blocks of 128 keys at D 128 do not find room in 99 KB of shared memory."""
    with small_gpu(emulator):
        check(emulator, CASES[f"many heads of {dim}"], "bfloat16")


@pytest.mark.parametrize(("name", "dtype"), [("packed documents", "float16"), ("grouped", "bfloat16"),
                                             ("queries that see nothing", "bfloat16"), ("bias of each row", "float16"),
                                             ("head_dim 128", "bfloat16"), ("many heads of 90", "bfloat16")])
def test_the_order_of_threads_changes_no_bit(emulator, name, dtype):
    case = CASES[name]
    results = []
    for seed in range(3):
        emulator.seed(seed)
        results.append([x.tobytes() for x in run(emulator, case, case.tensors(), dtype)])
    assert results[0] == results[1] == results[2]


def test_arrays_may_begin_at_any_number(emulator):
    """Views that begin 2 bytes after a multiple of 16, as a slice of a larger array may."""
    case = CASES["causal"]
    numbers = [to_bfloat16(x) for x in case.tensors()]

    def moved(x: np.ndarray) -> BFloat16:
        room = np.zeros(x.size + 8, np.uint16)
        begin = (2 - room.ctypes.data) % 16 // 2
        view = room[begin : begin + x.size].reshape(x.shape)
        view[...] = rounded(x)
        return BFloat16(view)

    q, k, v, dout = map(moved, numbers)
    out, lse = moved(numbers[0]), np.empty((case.batch, case.heads, case.q_len), np.float32)
    emulator.call("attention_forward", q, k, v, *settings(case), outputs=[out, lse])
    grads = [moved(x) for x in numbers[:3]]
    emulator.call("attention_backward", q, k, v, *settings(case), out, lse, dout, outputs=grads)
    for ours, aligned in zip([as_fp32(out), lse, *map(as_fp32, grads)], run(emulator, case, numbers, "bfloat16"),
                             strict=True):
        np.testing.assert_array_equal(ours, aligned)


@pytest.mark.parametrize("seed", range(8))
def test_any_ranges(emulator, seed):
    """Ranges in no order, overlapping, backwards, empty; several tiles and blocks, none of them whole."""
    rng = np.random.default_rng(seed)
    batch, kv_heads, group = rng.integers(1, 3), rng.integers(1, 3), rng.integers(1, 4)
    dim = rng.choice([3, 20, 64, 88, 128])
    q_len, k_len = rng.integers(1, 200), rng.integers(2, 260)
    ranges = rng.integers(0, k_len + 1, (rng.choice([1, batch]), q_len, 2)).astype(np.int32)
    ranges[:, : rng.integers(q_len)] = rng.choice([0, k_len])  # queries that see the prefix, if that
    heads = kv_heads * group
    bias = (8 * rng.standard_normal((rng.choice([1, batch]), heads, k_len))).astype(np.float32) if seed % 2 else None
    prefix = rng.choice([0, rng.integers(k_len), k_len])
    emulator.seed(seed)
    check(emulator, oracle.Case(batch, q_len, k_len, heads, kv_heads, dim, ranges, bias, prefix),
          "bfloat16" if seed % 3 else "float16", seed)


@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min, -1e6])
def test_a_bias_may_hide_keys(emulator, lowest):
    """As an additive mask would: what is left is attention over the other keys; a query with none gets 0."""
    case = oracle.Case(1, 50, 50, 2, 2, 32, oracle.causal_ranges(50, 50), np.zeros((1, 2, 50), np.float32))
    case.bias[..., :9] = lowest
    first = 9 if lowest > -1e29 else 0  # a bias that is a mere number leaves the first queries what they have
    numbers = [to_bfloat16(x) for x in case.tensors()]
    numbers[3][:, :first] = 0
    found = run(emulator, case, numbers, "bfloat16")
    wanted = wanted_of(replace(case, ranges=oracle.causal_ranges(50, 50, kv_start=(9,)), bias=None), numbers)
    check_every_head(found[0][:, first:], wanted[0][:, first:], 1e-2)
    for gradient, exact in zip(found[2:], wanted[2:], strict=True):
        check_every_head(gradient, exact, 1e-2)


def test_scores_far_apart_neither_overflow_nor_vanish(emulator):
    case = CASES["packed documents"]
    q, k, v, dout = (to_bfloat16(x) for x in case.tensors())
    numbers = [16 * q, 16 * k, v, dout]
    found, wanted = run(emulator, case, numbers, "bfloat16"), wanted_of(case, numbers)
    check_every_head(found[0], wanted[0], 1e-2)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)


def test_a_nan_comes_out_as_one(emulator):
    case = CASES["causal"]
    numbers = case.tensors()
    numbers[1][0, 20, 0, 3] = np.nan
    out = run(emulator, case, numbers, "bfloat16")[0]
    assert np.isnan(out[0, 30, 0]).all()
    assert np.isfinite(out[0, :20, 0]).all() and np.isfinite(out[1]).all() and np.isfinite(out[:, :, 1]).all()


def test_packed_documents_cost_the_sum_of_their_squares(emulator):
    """What a block has looked at and found hidden has weight 0, and 0 times NaN is NaN: so NaNs count the work.

    Values of 64 keys that are NaN show which blocks of queries fetched them, in out (forward) and dq; NaNs in dout of
    64 queries show which blocks of keys fetched those, in dv.
    """
    length, step, lengths = 512, 64, [128, 256, 128]
    case = oracle.Case(1, length, length, 1, 1, 16, oracle.causal_ranges(length, length, documents=[lengths]))
    visited = dict.fromkeys(("out", "dq", "dv"), 0)
    for first in range(0, length, step):
        hurt = slice(first, first + step)
        numbers = case.tensors()
        numbers[2][:, hurt] = np.nan
        out, _, dq, _, _ = run(emulator, case, numbers, "bfloat16")
        visited["out"] += step * np.isnan(out[0, :, 0, 0]).sum()
        visited["dq"] += step * np.isnan(dq[0, :, 0, 0]).sum()
        numbers = case.tensors()
        numbers[3][:, hurt] = np.nan
        visited["dv"] += step * np.isnan(run(emulator, case, numbers, "bfloat16")[4][0, :, 0, 0]).sum()
    # Causal, in blocks of 128 by 64, which the emulator's few multiprocessors are given (a GPU gets 64 by 64 here): of
    # a document of n blocks of 128 positions, n (n + 1) / 2 pairs of such blocks.
    pairs = sum(n // 128 * (n // 128 + 1) // 2 for n in lengths)
    assert visited == dict.fromkeys(visited, pairs * 128**2)
