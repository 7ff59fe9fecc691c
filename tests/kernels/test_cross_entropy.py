"""Cross entropy of given logits against fp64."""

from __future__ import annotations

import numpy as np
import pytest
from openmp_threads import for_thread_counts

from llm_core.kernels import KernelError, Library


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss, log-sum-exp (0 in ignored rows) and gradient in fp64."""
    logits = logits.astype(np.float64)
    largest = logits.max(1, keepdims=True)
    total = np.exp(logits - largest).sum(1, keepdims=True)
    lse = (np.log(total) + largest)[:, 0]
    rows = np.flatnonzero(labels >= 0)
    gradient = np.zeros_like(logits)
    gradient[rows] = (np.exp(logits - largest) / total)[rows]
    gradient[rows, labels[rows]] -= 1
    loss = (np.log(total)[rows, 0] + (largest[rows, 0] - logits[rows, labels[rows]])).sum()
    return loss, np.where(labels >= 0, lse, 0), gradient


def problem(rows: int, vocabulary: int, ignored: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((rows, vocabulary), np.float32)
    labels = rng.integers(0, vocabulary, rows).astype(np.int32)
    labels[rng.random(rows) < ignored] = rng.choice([-1, -100])
    return logits, labels


def run(kernels: Library, logits: np.ndarray, labels: np.ndarray, dloss: float = 1) -> list[np.ndarray]:
    """Loss, log-sum-exp and gradient; the logits given are left as they are."""
    loss, lse = np.full(1, np.nan, np.float32), np.full(len(labels), np.nan, np.float32)
    kernels.call("cross_entropy_forward", logits, labels, outputs=[loss, lse])
    gradient, done = logits.copy(), np.zeros(1, np.float32)
    kernels.call("cross_entropy_backward", gradient, labels, lse, np.array([dloss], np.float32), outputs=[done])
    return [loss, lse, gradient]


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 15), (7, 16), (4, 17), (9, 1000), (2, 2048), (33, 6151)])
def test_agrees_with_fp64(kernels: Library, shape: tuple[int, int]):
    logits, labels = problem(*shape)
    labels[0] = shape[1] - 1
    loss, lse, gradient = run(kernels, logits, labels, dloss=0.37)
    expected_loss, expected_lse, expected_gradient = cross_entropy(logits, labels)
    assert loss[0] == pytest.approx(expected_loss, rel=1e-6, abs=2e-7)  # abs: a vocabulary of 1 has loss 0
    assert np.allclose(lse, expected_lse, rtol=1e-6, atol=1e-7)
    assert np.linalg.norm(gradient / 0.37 - expected_gradient) <= 1e-6 * np.linalg.norm(expected_gradient) + 2e-7
    assert not gradient[labels < 0].any()


def test_the_gradient_is_finite_differences():
    logits, labels = problem(6, 50)
    logits = logits.astype(np.float64)
    direction = np.random.default_rng(1).standard_normal(logits.shape)
    ahead, behind = (cross_entropy(logits + step * direction, labels)[0] for step in (1e-5, -1e-5))
    assert (ahead - behind) / 2e-5 == pytest.approx((cross_entropy(logits, labels)[2] * direction).sum(), rel=1e-7)


def test_all_rows_ignored(kernels: Library):
    logits, labels = problem(8, 100, ignored=1)
    loss, lse, gradient = run(kernels, logits, labels)
    assert loss[0] == 0 and not lse.any() and not gradient.any()


def test_confident_rows_keep_their_digits(kernels: Library):
    """The loss beside logits of 60 is not the difference of two numbers around 60 that are rounded by 4e-6."""
    logits, labels = problem(20, 300, ignored=0)
    logits += 60
    logits[np.arange(20), labels] = logits.max(1) + 15
    loss, _, _ = run(kernels, logits, labels)
    assert loss[0] == pytest.approx(cross_entropy(logits, labels)[0], abs=20 * 2e-7)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_logits_far_apart(kernels: Library, scale: float):
    logits, labels = problem(6, 70, ignored=0)
    logits *= np.float32(scale)
    loss, _, gradient = run(kernels, logits, labels)
    expected, _, expected_gradient = cross_entropy(logits, labels)
    assert loss[0] == pytest.approx(expected, rel=1e-6)
    assert np.allclose(gradient, expected_gradient, atol=1e-6)


def test_the_largest_logit_in_any_place(kernels: Library):
    """Each lane of each vector, the tail included, must be seen by the maximum."""
    rows = 67
    logits, labels = np.zeros((rows, rows), np.float32), np.zeros(rows, np.int32)
    np.fill_diagonal(logits, 200)  # e^200 overflows where this one is missed
    loss, lse, _ = run(kernels, logits, labels)
    assert np.allclose(lse, 200) and loss[0] == pytest.approx(200 * (rows - 1))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("column", [0, 5, 16, 100, 2047, 2200, 2202])
def test_what_is_not_finite_shows(kernels: Library, value: float, column: int):
    logits, labels = problem(4, 2203, ignored=0)
    logits[2, column] = value
    loss, lse, gradient = run(kernels, logits, labels)
    assert not np.isfinite(loss[0])
    assert list(np.isfinite(lse)) == [True, True, False, True]
    assert list(np.isfinite(gradient).any(1)) == [True, True, False, True]


def test_an_ignored_row_may_hold_anything(kernels: Library):
    logits, labels = problem(3, 40, ignored=0)
    labels[1], logits[1] = -100, np.nan
    loss, _, gradient = run(kernels, logits, labels)
    assert np.isfinite(loss[0]) and np.isfinite(gradient).all() and not gradient[1].any()


def test_a_label_outside_the_vocabulary_is_named(kernels: Library):
    logits, labels = problem(4, 100)
    labels[3] = 100
    named = "labels: label 100 of row 3 is not below the vocabulary size 100"
    with pytest.raises(KernelError, match=f"cross_entropy_forward: {named}"):
        run(kernels, logits, labels)
    one = np.ones(1, np.float32)
    with pytest.raises(KernelError, match=f"cross_entropy_backward: {named}"):
        kernels.call("cross_entropy_backward", logits, labels, np.zeros(4, np.float32), one, outputs=[one])


def test_threads_change_no_bit(kernels: Library):
    logits, labels = problem(101, 1003)
    one, *others = for_thread_counts(kernels, lambda: [x.tobytes() for x in run(kernels, logits, labels)])
    assert all(other == one for other in others)
