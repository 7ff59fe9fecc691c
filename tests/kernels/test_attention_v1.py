"""FlashAttention-1 against fp64."""

from __future__ import annotations

import numpy as np
import pytest
from attention_oracle import Case, alibi_like, attention, attention_gradients, cases, causal_ranges
from openmp_threads import for_thread_counts

from llm_core.kernels import KernelError, Library

CASES = cases()


def arguments(case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    """A case as the kernel takes it: its inputs, and dout."""
    q, k, v, dout = case.tensors()
    bias = np.zeros(1, np.float32) if case.bias is None else case.bias
    return [q, k, v, case.ranges, bias, np.array([case.prefix], np.int32)], dout


def run(kernels: Library, inputs: list[np.ndarray], dout: np.ndarray) -> list[np.ndarray]:
    """out, lse, dq, dk, dv; every output starts as NaN, so that whatever is not written shows."""
    q, k, v = inputs[:3]
    out, dq, dk, dv = (np.full_like(x, np.nan) for x in (q, q, k, v))
    lse = np.full((q.shape[0], q.shape[2], q.shape[1]), np.nan, np.float32)
    kernels.call("attention_v1_forward", *inputs, outputs=[out, lse])
    kernels.call("attention_v1_backward", *inputs, out, lse, dout, outputs=[dq, dk, dv])
    return [out, lse, dq, dk, dv]


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the size of what was expected; absolute where that is 0."""
    return np.linalg.norm(got - expected) / (np.linalg.norm(expected) or 1)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_agrees_with_fp64(kernels: Library, name: str):
    case = CASES[name]
    inputs, dout = arguments(case)
    expected = [*attention(*inputs[:4], case.bias, case.prefix),
                *attention_gradients(*inputs[:4], case.bias, case.prefix, dout)]
    for what, got, right in zip(("out", "lse", "dq", "dk", "dv"), run(kernels, inputs, dout), expected, strict=True):
        assert distance(got, right) < 3e-6, what


def test_large_scores_do_not_overflow(kernels: Library):
    case = Case(1, 80, 80, 2, 1, 64, causal_ranges(80, 80), 1000 * alibi_like(2, 80))
    inputs, dout = arguments(case)
    out, lse = attention(*inputs[:4], case.bias)
    got = run(kernels, inputs, dout)
    assert all(np.isfinite(x).all() for x in got)
    assert distance(got[0], out) < 1e-4 and distance(got[1], lse) < 1e-6


def test_a_nan_comes_out_as_one(kernels: Library):
    """Also where no score of a query is a number, which is not the same as seeing nothing."""
    inputs, dout = arguments(CASES["causal"])
    inputs[0][0, 20, 0, 3] = np.nan
    out, lse, dq, _, _ = run(kernels, inputs, dout)
    for spoilt in (out[0, 20, 0], lse[0, 0, 20], dq[0, 20, 0]):
        assert np.isnan(spoilt).all()
    assert np.isnan(out).sum() == out.shape[3] and np.isnan(lse).sum() == 1


def wrong(inputs: list[np.ndarray], index: int, value: np.ndarray) -> list[np.ndarray]:
    return [*inputs[:index], value, *inputs[index + 1 :]]


@pytest.mark.parametrize(
    ("index", "value", "named"),
    [
        (0, np.zeros((2, 40, 8, 64), np.float64), "q: expected float32"),
        (1, np.zeros((2, 40, 64), np.float32), "k: expected float32"),
        (2, np.zeros((2, 41, 1, 64), np.float32), "v: expected float32"),
        (3, np.full((1, 40, 2), 41, np.int32), "ranges"),
        (3, np.full((1, 40, 2), -1, np.int32), "ranges"),
        (3, np.zeros((3, 40, 2), np.int32), "ranges"),
        (4, np.zeros((3, 8, 40), np.float32), "bias"),
        (5, np.array([41], np.int32), "prefix"),
    ],
)
def test_wrong_arguments_are_named(kernels: Library, index: int, value: np.ndarray, named: str):
    inputs, dout = arguments(CASES["one key head"])
    with pytest.raises(KernelError, match=f"attention_v1_forward: {named}"):
        run(kernels, wrong(inputs, index, value), dout)


def test_key_heads_must_divide_the_heads(kernels: Library):
    inputs, dout = arguments(CASES["odd width"])
    inputs[1] = inputs[2] = np.zeros((1, 23, 3, 7), np.float32)
    with pytest.raises(KernelError, match="attention_v1_forward: k: its number of heads"):
        run(kernels, inputs, dout)


def test_threads_change_no_bit(kernels: Library):
    inputs, dout = arguments(CASES["grouped"])
    one, *others = for_thread_counts(kernels, lambda: [x.tobytes() for x in run(kernels, inputs, dout)])
    assert all(other == one for other in others)
