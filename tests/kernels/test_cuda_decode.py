"""Attention over a cache by the CUDA kernels, contiguous and in pages, on the emulator, against attention in fp64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import attention_oracle as oracle
import numpy as np
import pytest
from bfloat16 import rounded, widened
from elementwise import placed, relative

from llm_core.kernels import BFloat16, KernelError

NONE = np.zeros(1, np.float32)
TOLERANCE = {"float32": 1e-6, "bfloat16": 6e-3, "float16": 8e-4}  # relative


@dataclass(frozen=True)
class Case:
    """New tokens behind a cache of `length` positions, of which the last one's own is the last."""

    tokens: int
    length: int
    heads: int = 2
    kv_heads: int = 2
    dim: int = 64
    starts: tuple[int, ...] = (0,)  # kv_start, a row each
    bias: str = "none"  # none | shared | rows
    spare: int = 0  # positions of the cache behind the last token's

    @property
    def positions(self) -> int:
        return self.length + self.spare

    def tensors(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """q [B, S, H, D], k and v [B, T, K, D], normally distributed, and the bias; NaNs in what nobody may read."""
        rng = np.random.default_rng(seed)
        batch = len(self.starts)
        q = rng.standard_normal((batch, self.tokens, self.heads, self.dim), np.float32)
        k, v = (rng.standard_normal((batch, self.positions, self.kv_heads, self.dim), np.float32) for _ in range(2))
        for cache in (k, v):
            cache[:, self.length :] = np.nan
            for row, start in enumerate(self.starts):
                cache[row, :start] = np.nan
        rows = {"none": 0, "shared": 1, "rows": batch}[self.bias]
        bias = 3 * rng.standard_normal((rows, self.heads, self.positions), np.float32) if rows else NONE
        return q, k, v, bias

    def wanted(self, q, k, v, bias) -> np.ndarray:
        ranges = oracle.causal_ranges(self.tokens, self.length, self.starts)
        k, v = (np.nan_to_num(x[:, : self.length]) for x in (k, v))
        return oracle.attention(q, k, v, ranges, bias[..., : self.length] if self.bias != "none" else None)[0]

    def cached(self, emulator, q, k, v, bias) -> np.ndarray:
        heads_first = [stored(unstored(x).transpose(0, 2, 1, 3).reshape(-1, self.positions, self.dim), like=x)
                       for x in (k, v)]
        columns = np.arange(self.length - self.tokens, self.length, dtype=np.int32)
        return run(emulator, "attention_cached", q, *heads_first, columns, np.array(self.starts, np.int32), bias)

    def paged(self, emulator, page: int, q, k, v, bias, seed: int = 3) -> np.ndarray:
        """The pages lie in any order, with strange ones between them."""
        blocks, batch = -(-self.positions // page), len(self.starts)
        assert blocks * page == self.positions or self.bias == "none"
        order = np.random.default_rng(seed).permutation(batch * blocks + 3)[: batch * blocks].reshape(batch, blocks)
        pages = []
        for cache in (k, v):
            plain = unstored(cache)
            held = np.full((batch * blocks + 3, page, self.kv_heads, self.dim), np.nan, plain.dtype)
            padded = np.full((batch, blocks * page, self.kv_heads, self.dim), np.nan, plain.dtype)
            padded[:, : self.positions] = plain
            held[order] = padded.reshape(batch, blocks, page, self.kv_heads, self.dim)
            pages.append(stored(held, like=cache))
        lengths = np.full(batch, self.length, np.int32)
        return run(emulator, "attention_paged", q, *pages, order.astype(np.int32), lengths,
                   np.array(self.starts, np.int32), bias)


def stored(x: np.ndarray, like) -> np.ndarray | BFloat16:
    """fp32 numbers in the form of `like`."""
    x = np.ascontiguousarray(x)
    return BFloat16(rounded(x)) if isinstance(like, BFloat16) else x.astype(like.dtype)


def unstored(x: np.ndarray | BFloat16) -> np.ndarray:
    return widened(x.bits) if isinstance(x, BFloat16) else x.astype(np.float32)


def in_dtype(dtype: str, *arrays: np.ndarray) -> list[np.ndarray | BFloat16]:
    return [BFloat16(rounded(x)) if dtype == "bfloat16" else x.astype(dtype) for x in arrays]


def run(emulator, name: str, q, *rest) -> np.ndarray:
    out = stored(np.full_like(unstored(q), np.nan), like=q)
    emulator.call(name, q, *rest, outputs=[out])
    return unstored(out)


CASES = {
    "one token": Case(1, 700),
    "a cache of one position": Case(1, 1, starts=(0, 0)),
    "as many tokens as positions": Case(5, 5),
    "two tokens, padded": Case(2, 333, starts=(0, 40, 331)),
    "a long cache": Case(1, 1500, 1, 1, spare=36),
    "room behind the last token": Case(2, 70, 2, 1, spare=186),
    "four heads a key head": Case(1, 260, 8, 2, 128, starts=(0, 17)),
    "eight heads a key head": Case(2, 130, 8, 1, 128, bias="shared"),
    "three heads a key head": Case(5, 100, 6, 2, 32, starts=(3, 0)),
    "more rows than a block takes": Case(17, 90, 4, 1, 40, starts=(0, 80)),
    "a bias of each row": Case(1, 96, 4, 2, 96, starts=(5, 0), bias="rows", spare=32),
    "odd width": Case(2, 75, 4, 2, 7, starts=(0, 9)),
    "odd width above 64": Case(1, 40, 2, 1, 99, bias="shared"),
    "width 1": Case(1, 9, 1, 1, 1),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_against_fp64(emulator, name, dtype):
    """Every row and head, at another order of threads each time; the paged cache gives the same bits."""
    case = CASES[name]
    *arrays, bias = case.tensors()
    q, k, v = in_dtype(dtype, *arrays)
    wanted = case.wanted(*map(unstored, (q, k, v)), bias)
    emulator.seed(len(name))
    found = case.cached(emulator, q, k, v, bias)
    assert relative(found, wanted) < TOLERANCE[dtype]
    assert np.abs(found - wanted).max() < 4 * TOLERANCE[dtype] * np.abs(wanted).max()
    page = next(size for size in (16, 10, 3, 1) if case.positions % size == 0)
    emulator.seed(len(name) + 1)
    np.testing.assert_array_equal(case.paged(emulator, page, q, k, v, bias), found)


@pytest.mark.parametrize("seed", range(12))
def test_any_sizes(emulator, seed):
    rng = np.random.default_rng(seed)
    dtype, kv_heads, tokens = list(TOLERANCE)[seed % 3], rng.integers(1, 4), rng.integers(1, 12)
    length, page, dim = rng.integers(tokens, 420), rng.integers(1, 40), rng.choice([1, 12, 64, 80, 101, 128])
    starts = tuple(rng.integers(0, length, rng.integers(1, 4)).tolist())
    case = Case(tokens, length, kv_heads * rng.integers(1, 9), kv_heads, dim, starts,
                rng.choice(["none", "shared", "rows"]), spare=-length % page)
    *arrays, bias = case.tensors(seed)
    q, k, v = in_dtype(dtype, *arrays)
    emulator.seed(seed)
    found = case.cached(emulator, q, k, v, bias)
    assert relative(found, case.wanted(*map(unstored, (q, k, v)), bias)) < TOLERANCE[dtype]
    np.testing.assert_array_equal(case.paged(emulator, page, q, k, v, bias, seed), found)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_order_of_threads_changes_no_bit(emulator, dtype):
    case = Case(3, 400, 4, 2, 128, starts=(0, 60), bias="shared")
    *arrays, bias = case.tensors()
    found = []
    for seed in range(3):
        emulator.seed(seed)
        found.append(case.cached(emulator, *in_dtype(dtype, *arrays), bias))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tokens_that_see_nothing_give_zeros(emulator, dtype):
    """A row that begins behind its end, and one whose first token does."""
    case = Case(3, 30, 4, 2, starts=(0, 28, 30, 100))
    *arrays, bias = case.tensors()
    q, k, v = in_dtype(dtype, *arrays)
    wanted = case.wanted(*map(unstored, (q, k, v)), bias)
    assert not wanted[2:].any() and not wanted[1, 0].any() and wanted[1, 1:].any()
    for found in (case.cached(emulator, q, k, v, bias), case.paged(emulator, 10, q, k, v, bias)):
        assert not found[2:].any() and not found[1, 0].any()
        assert relative(found, wanted) < TOLERANCE[dtype]


def test_rows_of_other_lengths(emulator):
    """Pages of each row's own number: a row's tokens are the last of its length."""
    case = Case(2, 64, 4, 2, starts=(0, 3, 0))
    q, k, v, bias = case.tensors()
    k, v = np.nan_to_num(k), np.nan_to_num(v)
    lengths = np.array([64, 17, 1], np.int32)
    table = np.arange(12, dtype=np.int32).reshape(3, 4)
    pages = [x.reshape(12, 16, 2, 64) for x in (k, v)]
    found = run(emulator, "attention_paged", q, *pages, table, lengths, np.array(case.starts, np.int32), bias)
    for row, (length, start) in enumerate(zip(lengths, case.starts, strict=True)):
        ends = np.maximum(length - 2 + np.arange(1, 3), 0)
        ranges = np.stack([np.full(2, start), ends], -1)[None].astype(np.int32)
        wanted = oracle.attention(q[row : row + 1], k[row : row + 1], v[row : row + 1], ranges)[0][0]
        assert relative(found[row], wanted) < 1e-6
    assert not found[2, 0].any()


def test_tokens_at_any_columns(emulator):
    """They need not follow each other: attention_cached takes what is given."""
    case = Case(3, 200, 4, 2)
    q, k, v, bias = case.tensors()
    columns = np.array([199, 3, 150], np.int32)
    first = [x.transpose(0, 2, 1, 3).reshape(2, 200, 64).copy() for x in (k, v)]
    found = run(emulator, "attention_cached", q, *first, columns, np.zeros(1, np.int32), bias)
    ranges = np.stack([np.zeros(3), columns + 1], -1)[None].astype(np.int32)
    assert relative(found, oracle.attention(q, k, v, ranges)[0]) < 1e-6


def test_what_lies_on_the_device_is_cut_to_what_is_legal(emulator):
    case = Case(2, 50, 2, 1)
    q, k, v, bias = case.tensors()
    first = [x.transpose(0, 2, 1, 3).reshape(1, 50, 64).copy() for x in (k, v)]
    start = np.array([-7], np.int32)
    beyond, least = np.array([2**31 - 1, 50], np.int32), np.array([-(2**31), -1], np.int32)
    whole = oracle.attention(q, k, v, oracle.full_ranges(2, 50))[0]
    assert relative(run(emulator, "attention_cached", q, *first, beyond, start, bias), whole) < 1e-6
    assert not run(emulator, "attention_cached", q, *first, least, start, bias).any()
    pages = [x.reshape(5, 10, 1, 64) for x in (k, v)]
    table = np.array([[-9, 1, 2, 3, 2**31 - 1]], np.int32)  # the first page and the last
    found = run(emulator, "attention_paged", q, *pages, table, np.array([2**31 - 1], np.int32), start, bias)
    assert relative(found, case.wanted(q, k, v, bias)) < 1e-6
    lengths = np.array([-(2**31)], np.int32)
    assert not run(emulator, "attention_paged", q, *pages, table, lengths, start, bias).any()


@pytest.mark.parametrize("dtype, offset", [("float32", 4), ("float16", 2)])
def test_arrays_at_odd_addresses(emulator, dtype, offset):
    """They cannot be read 16 bytes at a time."""
    case = Case(1, 60, 2, 1)
    *arrays, bias = case.tensors()
    q, k, v = in_dtype(dtype, *arrays)
    first = [x.transpose(0, 2, 1, 3).reshape(1, 60, 64).copy() for x in (k, v)]
    rest = (np.array([59], np.int32), np.zeros(1, np.int32), bias)
    for moved in itertools.product((0, offset), repeat=3):
        moved_q, *moved_cache = (placed(x, by) for x, by in zip((q, *first), moved, strict=True))
        found = run(emulator, "attention_cached", moved_q, *moved_cache, *rest)
        assert relative(found, case.wanted(*map(unstored, (q, k, v)), bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min])
def test_a_bias_may_hide_keys(emulator, lowest, dtype):
    """As an additive mask would: whole pieces of one head, all of another, which gives 0."""
    case = Case(1, 150, 2, 2, bias="shared")
    *arrays, bias = case.tensors()
    q, k, v = in_dtype(dtype, *arrays)
    bias[:, 0, :100] = lowest
    bias[:, 1] = lowest
    found = case.cached(emulator, q, k, v, bias)
    bias[:, 0, :100] = -1e30
    wanted = case.wanted(*map(unstored, (q, k, v)), bias)
    assert relative(found[:, :, 0], wanted[:, :, 0]) < TOLERANCE[dtype]
    assert not found[:, :, 1].any()


def test_scores_far_apart_neither_overflow_nor_vanish(emulator):
    case = Case(1, 500, 2, 1)
    q, k, v, bias = case.tensors()
    q = 100 * q
    assert relative(case.cached(emulator, q, k, v, bias), case.wanted(q, k, v, bias)) < 1e-5


def test_refusals_name_the_argument(emulator):
    q, k = np.zeros((2, 1, 4, 8), np.float32), np.zeros((4, 9, 8), np.float32)
    columns, start, pages = np.zeros(1, np.int32), np.zeros(2, np.int32), np.zeros((3, 5, 2, 8), np.float32)
    table = np.zeros((2, 2), np.int32)

    def refused(name: str, match: str, *inputs: np.ndarray) -> None:
        with pytest.raises(KernelError, match=f"{name}: {match}"):
            emulator.call(name, *inputs, outputs=[np.empty_like(inputs[0])])

    refused("attention_cached", "k: its first size", q, k[:3], k[:3], columns, start, NONE)
    refused("attention_cached", "k: its heads", q[:, :, :3].copy(), k, k, columns, start, NONE)
    refused("attention_cached", "v: expected", q, k, k[:, :8].copy(), columns, start, NONE)
    refused("attention_cached", "columns: expected", q, k, k, np.zeros(2, np.int32), start, NONE)
    refused("attention_cached", "bias: its last size", q, k, k, columns, start, np.zeros((1, 4, 8), np.float32))
    refused("attention_cached", "bias: its first size", q, k, k, columns, start, np.zeros((3, 4, 9), np.float32))
    wide = np.zeros((1, 1, 1, 129), np.float32)
    refused("attention_cached", "q: its heads are wider than 128.*reference", wide, wide[0], wide[0], columns,
            start[:1], NONE)
    refused("attention_paged", "k_pages: its heads", q[:, :, :3].copy(), pages, pages, table, start, start, NONE)
    refused("attention_paged", "block_table: expected", q, pages, pages, table[:1], start, start, NONE)
    refused("attention_paged", "bias: its last", q, pages, pages, table, start, start, np.zeros((1, 4, 9), np.float32))
    refused("attention_paged", "q: these kernels take float32, bfloat16 and float16", q.astype(np.float64), pages,
            pages, table, start, start, NONE)
