"""The gradient of the embedding table, on every instruction set, against a plain sum in fp64."""

from __future__ import annotations

import numpy as np
import pytest
from elementwise import called, check_places, normal, relative
from openmp_threads import for_thread_counts

from llm_core.kernels import KernelError


def run(kernels, ids, dy, vocabulary):
    return called(kernels, "embedding_backward", ids, dy, shapes=[(vocabulary, dy.shape[1])])[0]


def some_ids(count: int, vocabulary: int) -> np.ndarray:
    """Most of them small, as in a text: many fall together."""
    spread = np.random.default_rng(1).random(count) ** 3 * vocabulary
    return spread.astype(np.int32)


@pytest.mark.parametrize(
    "count, width, vocabulary", [(1, 1, 1), (9, 1, 4), (40, 5, 3), (300, 64, 50), (77, 129, 600), (2, 16, 5000)]
)
def test_rows_are_summed(kernels, count, width, vocabulary):
    ids, dy = some_ids(count, vocabulary), normal(2, count, width)
    wanted = np.zeros((vocabulary, width))
    np.add.at(wanted, ids, dy.astype(np.float64))
    found = run(kernels, ids, dy, vocabulary)
    assert relative(found, wanted) < 1e-6
    assert not found[np.setdiff1d(np.arange(vocabulary), ids)].any()


def test_it_is_the_gradient_of_a_look_up(kernels):
    ids, dy = some_ids(6, 4), normal(2, 6, 3)
    table = normal(3, 4, 3).astype(np.float64)
    wanted = np.zeros_like(table)
    for i in np.ndindex(table.shape):  # the look-up is linear: differences of any size are exact
        bumped = table.copy()
        bumped[i] += 1
        wanted[i] = ((bumped[ids] - table[ids]) * dy).sum()
    assert relative(run(kernels, ids, dy, 4), wanted) < 1e-6


def test_every_number_of_threads_and_every_place_gives_the_same_bits(kernels):
    ids, dy = some_ids(900, 700), normal(2, 900, 77)
    first, *others = for_thread_counts(kernels, lambda: run(kernels, ids, dy, 700), (1, 2, 3, 9))
    for other in others:
        np.testing.assert_array_equal(first, other)
    check_places(kernels, "embedding_backward", ids, dy, shapes=[(700, 77)])


@pytest.mark.parametrize("bad", [-1, 10, -(2**31), 2**31 - 1])
def test_an_id_outside_of_the_table_is_named(kernels, bad):
    ids = np.array([0, 9, bad, 3], np.int32)
    with pytest.raises(KernelError, match=f"embedding_backward: ids: {bad} at 2 is not in the table of 10 rows"):
        run(kernels, ids, normal(2, 4, 5), 10)


@pytest.mark.parametrize(
    "ids, dy, table, message",
    [
        (np.zeros(4, np.float32), (4, 5), (9, 5), r"ids: expected int32 \[N\], got float32 \[4\]"),
        (np.zeros((2, 2), np.int32), (4, 5), (9, 5), r"ids: expected int32 \[N\], got int32 \[2, 2\]"),
        (np.zeros(4, np.int32), (3, 5), (9, 5), r"dy: expected float32 \[N=4, D\], got float32 \[3, 5\]"),
        (np.zeros(4, np.int32), (4, 5), (9, 6), r"dtable: expected float32 \[V, D=5\], got float32 \[9, 6\]"),
    ],
)
def test_wrong_arguments_are_named(kernels, ids, dy, table, message):
    with pytest.raises(KernelError, match=message):
        kernels.call("embedding_backward", ids, np.zeros(dy, np.float32), outputs=[np.zeros(table, np.float32)])


def test_bad_numbers_reach_their_row_only(kernels):
    ids, dy = np.array([1, 0, 1], np.int32), normal(2, 3, 4)
    dy[2, 1], dy[1, 3] = np.nan, np.inf
    found = run(kernels, ids, dy, 3)
    assert np.isnan(found[1, 1]) and np.isinf(found[0, 3])
    assert np.isfinite(found).sum() == found.size - 2
