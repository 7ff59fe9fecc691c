"""Rotary positions, on every instruction set, against their formula in fp64."""

from __future__ import annotations

import numpy as np
import pytest
from elementwise import called, check_places, differences, normal, relative
from openmp_threads import for_thread_counts

from llm_core.kernels import KernelError


def angles(tables: int, length: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [tables, length, 1, dim] as the model gives them: both halves alike, sin negated in the first."""
    angle = normal(3, tables, length, 1, dim // 2)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate((cos, cos), -1), np.concatenate((-sin, sin), -1)


def turned(x, cos, sin):
    low, high = np.split(x, 2, -1)
    return x * cos + np.concatenate((high, low), -1) * sin


def run(kernels, name, q, k, cos, sin):
    return called(kernels, name, q, k, cos, sin, shapes=[q.shape, k.shape])


@pytest.mark.parametrize(
    "batch, length, q_heads, k_heads, dim, tables",
    [(1, 1, 1, 1, 2, 1), (2, 3, 4, 2, 6, 1), (3, 5, 2, 1, 64, 3), (2, 7, 3, 3, 34, 2), (2, 2, 1, 1, 128, 1),
     (1, 9, 5, 5, 80, 1), (2, 300, 3, 1, 48, 2), (2, 300, 3, 1, 48, 1)],
)
def test_forward_and_backward(kernels, batch, length, q_heads, k_heads, dim, tables):
    q, k = normal(1, batch, length, q_heads, dim), normal(2, batch, length, k_heads, dim)
    cos, sin = angles(tables, length, dim)
    wide = [a.astype(np.float64) for a in (q, k, cos, sin)]
    for found, x in zip(run(kernels, "rope_forward", q, k, cos, sin), wide, strict=False):
        assert relative(found, turned(x, *wide[2:])) < 1e-7
    # cos and sin of one angle make the transposed turn the one by the opposite angle
    for found, x in zip(run(kernels, "rope_backward", q, k, cos, sin), wide, strict=False):
        assert relative(found, turned(x, wide[2], -wide[3])) < 1e-7


def test_gradients_are_those_of_central_differences(kernels):
    """Of any cos and sin: nothing may rest on their halves being alike."""
    q, k, cos, sin = normal(1, 2, 3, 2, 6), normal(2, 2, 3, 1, 6), normal(3, 1, 3, 1, 6), normal(4, 1, 3, 1, 6)
    dq, dk = normal(5, *q.shape), normal(6, *k.shape)
    found = run(kernels, "rope_backward", dq, dk, cos, sin)
    for gradient, x, pull in zip(found, (q, k), (dq, dk), strict=True):
        (wanted,) = differences(lambda x: turned(x, cos.astype(np.float64), sin), [x], pull)
        assert relative(gradient, wanted) < 1e-6


@pytest.mark.parametrize("name", ["rope_forward", "rope_backward"])
def test_every_number_of_threads_and_every_place_gives_the_same_bits(kernels, name):
    q, k = normal(1, 2, 301, 2, 34), normal(2, 2, 301, 1, 34)
    cos, sin = angles(1, 301, 34)
    first, *others = for_thread_counts(kernels, lambda: run(kernels, name, q, k, cos, sin))
    for other in others:
        np.testing.assert_array_equal(np.concatenate(first, 2), np.concatenate(other, 2))
    check_places(kernels, name, q[:, :3].copy(), k[:, :3].copy(), cos[:, :3].copy(), sin[:, :3].copy(),
                 shapes=[(2, 3, 2, 34), (2, 3, 1, 34)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: (2, 3, 2)}, r"rope_forward: q: expected float32 \[B, S, H, D\]"),
        ({1: (2, 4, 1, 6)}, r"k: expected float32 \[B=2, S=3, K, D=6\], got float32 \[2, 4, 1, 6\]"),
        ({2: (1, 3, 2, 6)}, r"cos: expected float32 \[C, S=3, 1, D=6\]"),
        ({3: (1, 3, 1, 3)}, r"sin: expected float32 \[C=1, S=3, 1, D=6\]"),
        ({2: (3, 3, 1, 6), 3: (3, 3, 1, 6)}, "cos: the first dimension must be 1 or the batch"),
        ({0: (2, 3, 2, 5), 1: (2, 3, 1, 5), 2: (1, 3, 1, 5), 3: (1, 3, 1, 5)}, "q: the head size must be even"),
    ],
)
def test_wrong_arguments_are_named(kernels, change, message):
    shapes = {0: (2, 3, 2, 6), 1: (2, 3, 1, 6), 2: (1, 3, 1, 6), 3: (1, 3, 1, 6), **change}
    arrays = [np.ones(shapes[i], np.float32) for i in range(4)]
    with pytest.raises(KernelError, match=message):
        kernels.call("rope_forward", *arrays, outputs=[arrays[0].copy(), arrays[1].copy()])


def test_a_nan_spoils_its_pair_only(kernels):
    q, k = normal(1, 1, 2, 2, 8), normal(2, 1, 2, 1, 8)
    q[0, 1, 0, 6] = np.nan
    q_out, k_out = run(kernels, "rope_forward", q, k, *angles(1, 2, 8))
    assert sorted(map(tuple, np.argwhere(np.isnan(q_out)))) == [(0, 1, 0, 2), (0, 1, 0, 6)]
    assert np.isfinite(k_out).all()
