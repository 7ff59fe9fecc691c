"""A whole decoder layer for one new token, on every instruction set, against the same layer in fp64."""

from __future__ import annotations

import numpy as np
import pytest
from openmp_threads import for_thread_counts

from llm_core.kernels import KernelError

EPS = 1e-5
# rows, hidden, heads, kv heads, head size, ffn, cache, column, rows of cos
SHAPES = [
    (1, 16, 2, 1, 8, 24, 4, 0, 1),
    (1, 384, 6, 2, 64, 1024, 700, 650, 1),
    (2, 33, 3, 3, 6, 50, 40, 39, 2),
    (3, 40, 4, 1, 10, 30, 64, 20, 3),
    (8, 64, 4, 2, 16, 96, 128, 100, 8),
]


def arguments(rows, hidden, heads, kv_heads, dim, ffn, cache, column, tables, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(np.float32)

    angles = rng.uniform(0, 6, (tables, 1, 1, dim // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    return dict(
        x=normal(rows, hidden),
        attention_norm=1 + normal(hidden, scale=0.1),
        wq=normal(heads * dim, hidden, scale=hidden**-0.5),
        wk=normal(kv_heads * dim, hidden, scale=hidden**-0.5),
        wv=normal(kv_heads * dim, hidden, scale=hidden**-0.5),
        wo=normal(hidden, heads * dim, scale=hidden**-0.5),
        ffn_norm=1 + normal(hidden, scale=0.1),
        w1=normal(ffn, hidden, scale=hidden**-0.5),
        w3=normal(ffn, hidden, scale=hidden**-0.5),
        w2=normal(hidden, ffn, scale=ffn**-0.5),
        keys=normal(rows * kv_heads * cache, dim),
        values=normal(rows * kv_heads * cache, dim),
        cos=np.concatenate([cos, cos], -1),
        sin=np.concatenate([-sin, sin], -1),
        column=np.array([column], np.int32),
        kv_start=np.minimum(np.arange(rows) * 3, column).astype(np.int32),
        eps=np.array([EPS], np.float32),
    )


def expected(a: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, and the new rows of keys and values [N, kv heads, D], in fp64."""
    a = {name: value.astype(np.float64) if value.dtype == np.float32 else value for name, value in a.items()}
    rows, dim, column = len(a["x"]), a["keys"].shape[1], int(a["column"][0])
    kv_heads = len(a["wk"]) // dim
    cache = len(a["keys"]) // rows // kv_heads

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight

    def turned(x):
        low, high = np.split(x, 2, -1)
        return x * a["cos"][:, 0] + np.concatenate([high, low], -1) * a["sin"][:, 0]

    normed = norm(a["x"], a["attention_norm"])
    q = turned((normed @ a["wq"].T).reshape(rows, -1, dim))
    new_k = turned((normed @ a["wk"].T).reshape(rows, kv_heads, dim))
    new_v = (normed @ a["wv"].T).reshape(rows, kv_heads, dim)
    keys, values = (a[name].reshape(rows, kv_heads, cache, dim).copy() for name in ("keys", "values"))
    keys[:, :, column], values[:, :, column] = new_k, new_v
    group, attended = q.shape[1] // kv_heads, np.zeros_like(q)
    for row in range(rows):
        seen = slice(a["kv_start"][row], column + 1)
        for head in range(q.shape[1]):
            scores = keys[row, head // group, seen] @ q[row, head] * dim**-0.5
            weights = np.exp(scores - scores.max())
            attended[row, head] = weights / weights.sum() @ values[row, head // group, seen]
    middle = a["x"] + attended.reshape(rows, -1) @ a["wo"].T
    normed = norm(middle, a["ffn_norm"])
    gate = normed @ a["w1"].T
    return middle + (gate / (1 + np.exp(-gate)) * (normed @ a["w3"].T)) @ a["w2"].T, new_k, new_v


def run(kernels, a: dict[str, np.ndarray]) -> np.ndarray:
    y = np.full_like(a["x"], np.nan)
    kernels.call("decode_layer", *a.values(), outputs=[y])
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer(kernels, shape):
    a = arguments(*shape)
    before = {name: a[name].copy() for name in ("keys", "values")}
    wanted, new_k, new_v = expected(a)
    y = run(kernels, a)
    assert np.linalg.norm(y - wanted) < 1e-5 * np.linalg.norm(wanted)
    rows, kv_heads, dim, column = shape[0], shape[3], shape[4], shape[7]
    for name, new in (("keys", new_k), ("values", new_v)):
        found, old = (x.reshape(rows, kv_heads, -1, dim) for x in (a[name], before[name]))
        np.testing.assert_allclose(found[:, :, column], new, atol=1e-5)
        others = np.arange(found.shape[2]) != column
        assert np.array_equal(found[:, :, others], old[:, :, others])


def test_the_number_of_threads_changes_no_bit(kernels):
    shape = SHAPES[1]
    first, *others = for_thread_counts(kernels, lambda: run(kernels, arguments(*shape)), (1, 2, 3, 5))
    for other in others:
        assert np.array_equal(first, other)


@pytest.mark.parametrize("changed, message", [
    (dict(column=np.array([4], np.int32)), "decode_layer: column: outside the cache"),
    (dict(kv_start=np.array([-1], np.int32)), "decode_layer: kv_start: negative"),
    (dict(w2=np.zeros((16, 23), np.float32)), r"decode_layer: w2: expected float32 \[H=16, F=24\]"),
    (dict(wk=np.zeros((7, 16), np.float32), wv=np.zeros((7, 16), np.float32)), "decode_layer: wk: its rows must be"),
])  # fmt: skip
def test_wrong_arguments_are_named(kernels, changed, message):
    with pytest.raises(KernelError, match=message):
        run(kernels, {**arguments(*SHAPES[0]), **changed})
