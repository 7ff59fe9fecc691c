"""Cross entropy of logits that never exist as a whole, against fp64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bfloat16 import to_bfloat16
from openmp_threads import for_thread_counts

from llm_core.kernels import KernelError, Library


def linear_cross_entropy(x, weight, labels, rounded=lambda a: a) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss, dx and dweight in fp64; `rounded` is applied to both factors of every product."""
    x, weight = rounded(x).astype(np.float64), rounded(weight).astype(np.float64)
    logits = x @ weight.T
    largest = logits.max(1, keepdims=True)
    exponentials = np.exp(logits - largest)
    total = exponentials.sum(1, keepdims=True)
    rows = np.flatnonzero(labels >= 0)
    loss = (np.log(total)[rows, 0] + largest[rows, 0] - logits[rows, labels[rows]]).sum()
    gradient = np.zeros_like(logits)
    gradient[rows] = (exponentials / total)[rows]
    gradient[rows, labels[rows]] -= 1
    gradient = rounded(gradient)
    return loss, gradient @ weight, gradient.T @ x


def problem(rows: int, width: int, vocabulary: int, ignored: float = 0.3) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, width), np.float32)
    weight = (2 * width**-0.5 * rng.standard_normal((vocabulary, width))).astype(np.float32)
    labels = rng.integers(0, vocabulary, rows).astype(np.int32)
    labels[rng.random(rows) < ignored] = -100
    return x, weight, labels


def run(kernels: Library, x, weight, labels, suffix: str = "") -> list[np.ndarray]:
    """The loss from the forward alone, then loss, dx and dweight; outputs start as NaN.

    With frozen weights loss and dx are the same, to the bit.
    """
    alone, loss = np.full(1, np.nan, np.float32), np.full(1, np.nan, np.float32)
    dx, dweight = np.full_like(x, np.nan), np.full_like(weight, np.nan)
    kernels.call("linear_cross_entropy_forward" + suffix, x, weight, labels, outputs=[alone])
    kernels.call("linear_cross_entropy" + suffix, x, weight, labels, outputs=[loss, dx, dweight])
    frozen = [np.full_like(loss, np.nan), np.full_like(x, np.nan)]
    kernels.call("linear_cross_entropy_frozen" + suffix, x, weight, labels, outputs=frozen)
    np.testing.assert_array_equal(frozen[0], loss)
    np.testing.assert_array_equal(frozen[1], dx)
    return [alone, loss, dx, dweight]


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    return np.linalg.norm(got - expected) / (np.linalg.norm(expected) or 1)


# The largest take several chunks of rows and several blocks of the vocabulary, none of them whole.
SHAPES = [(1, 1, 2), (1, 8, 40), (3, 5, 7), (17, 33, 65), (64, 64, 1024), (1450, 24, 1031), (500, 12, 8230)]


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_fp64(kernels: Library, shape: tuple[int, int, int]):
    x, weight, labels = problem(*shape)
    labels[-1] = shape[2] - 1
    alone, loss, dx, dweight = run(kernels, x, weight, labels)
    expected = linear_cross_entropy(x, weight, labels)
    assert loss[0] == pytest.approx(expected[0], rel=1e-6)
    assert alone[0] == pytest.approx(expected[0], rel=1e-6)
    assert distance(dx, expected[1]) < 2e-6 and distance(dweight, expected[2]) < 2e-6
    assert not dx[labels < 0].any()


def test_the_gradients_are_finite_differences():
    x, weight, labels = problem(9, 6, 20)
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    _, dx, dweight = linear_cross_entropy(x, weight, labels)
    rng, step = np.random.default_rng(1), 1e-5
    for tensor, gradient in ((x, dx), (weight, dweight)):
        direction = rng.standard_normal(tensor.shape)
        losses = []
        for sign in (1, -1):
            tensor += sign * step * direction
            losses.append(linear_cross_entropy(x, weight, labels)[0])
            tensor -= sign * step * direction
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx((gradient * direction).sum(), rel=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_products(kernels: Library, isa: str, shape: tuple[int, int, int]):
    x, weight, labels = problem(*shape)
    labels[-1] = shape[2] - 1
    if isa != "avx512_bf16":
        with pytest.raises(KernelError, match="linear_cross_entropy_forward_bf16: .*AVX512_BF16"):
            run(kernels, x, weight, labels, "_bf16")
        return
    alone, loss, dx, dweight = run(kernels, x, weight, labels, "_bf16")
    exact = linear_cross_entropy(x, weight, labels)
    rounded = linear_cross_entropy(x, weight, labels, to_bfloat16)
    assert loss[0] == pytest.approx(rounded[0], rel=1e-5) and alone[0] == pytest.approx(rounded[0], rel=1e-5)
    # A gradient on the edge between two bfloat16 numbers may be rounded to the other one: hence more than 1e-5.
    assert distance(dx, rounded[1]) < 2e-4 and distance(dweight, rounded[2]) < 2e-4
    assert distance(dx, exact[1]) < 1e-2 and distance(dweight, exact[2]) < 1e-2


@pytest.mark.parametrize("supervised", [[], [0], [699], [3, 4, 500]])
def test_few_supervised_rows(kernels: Library, supervised: list[int]):
    x, weight, labels = problem(700, 40, 1500, ignored=0)
    labels[np.setdiff1d(np.arange(700), supervised)] = -1
    x[labels < 0] = np.nan  # an ignored row is not looked at
    alone, loss, dx, dweight = run(kernels, x, weight, labels)
    assert not dx[labels < 0].any()
    expected = linear_cross_entropy(x[supervised], weight, labels[supervised])
    assert loss[0] == pytest.approx(expected[0], rel=1e-6) and alone[0] == pytest.approx(expected[0], rel=1e-6)
    assert distance(dx[supervised], expected[1]) < 2e-6 and distance(dweight, expected[2]) < 2e-6


def test_what_is_not_finite_shows(kernels: Library):
    x, weight, labels = problem(20, 16, 1200, ignored=0)
    x[7, 3] = np.inf
    alone, loss, dx, dweight = run(kernels, x, weight, labels)
    assert not np.isfinite(alone[0]) and not np.isfinite(loss[0])
    assert not np.isfinite(dx[7]).any() and not np.isfinite(dweight).any()
    assert np.isfinite(np.delete(dx, 7, axis=0)).all()


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy_forward"])
def test_a_label_outside_the_vocabulary_is_named(kernels: Library, name: str):
    x, weight, labels = problem(4, 8, 100)
    labels[2] = 123
    outputs = [np.zeros(1, np.float32), np.zeros_like(x), np.zeros_like(weight)]
    with pytest.raises(KernelError, match=f"{name}: labels: label 123 of row 2 is not below the vocabulary size 100"):
        kernels.call(name, x, weight, labels, outputs=outputs[: 1 if name.endswith("forward") else 3])


def test_a_wrong_width_is_named(kernels: Library):
    x, weight, labels = problem(4, 8, 100)
    with pytest.raises(KernelError, match=r"linear_cross_entropy_forward: weight: expected float32 \[V, H=8\]"):
        run(kernels, x, np.zeros((100, 9), np.float32), labels)


@pytest.mark.parametrize("suffix", ["", "_bf16"])
def test_threads_change_no_bit(kernels: Library, isa: str, suffix: str):
    if suffix and isa != "avx512_bf16":
        pytest.skip(f"{isa} has no bfloat16 products")
    arrays = problem(450, 9, 8300)
    one, *others = for_thread_counts(kernels, lambda: [x.tobytes() for x in run(kernels, *arrays, suffix)])
    assert all(other == one for other in others)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak from")
def test_the_logits_never_exist_as_a_whole(kernels: Library):
    """The peak of a process grows by the chunk's logits and the packed blocks, not by all logits (201 MB).

    (getrusage would not do: what it gives a process starts at its parent's peak.)
    """
    rows, width, vocabulary = 1024, 64, 49152
    script = f"""
import re, sys
import numpy as np
from llm_core.kernels import library
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
kernels = library(sys.argv[1])
x, weight = np.ones(({rows}, {width}), np.float32), np.ones(({vocabulary}, {width}), np.float32)
labels = np.arange({rows}, dtype=np.int32)
outputs = [np.ones(1, np.float32), np.ones_like(x), np.ones_like(weight)]
before = peak()
kernels.call("linear_cross_entropy", x, weight, labels, outputs=outputs)
print(peak() - before)
"""
    printed = subprocess.run([sys.executable, "-c", script, kernels.isa], capture_output=True, text=True, check=True,
                             cwd=Path(__file__).parents[2]).stdout
    assert 1e6 < int(printed) < 0.3 * rows * vocabulary * 4
