"""Products of a few rows with a weight matrix, on every instruction set, against fp64."""

from __future__ import annotations

import numpy as np
import pytest
from elementwise import called, check_places, normal, relative
from openmp_threads import for_thread_counts

SHAPES = [(1, 1, 1), (1, 3, 5), (2, 4, 16), (3, 9, 33), (5, 130, 384), (1, 300, 700)]


@pytest.mark.parametrize("rows, columns, width", SHAPES)
def test_product(kernels, rows, columns, width):
    x, weight = normal(1, rows, width), normal(2, columns, width)
    (y,) = called(kernels, "linear_few", x, weight, shapes=[(rows, columns)])
    assert relative(y, x.astype(np.float64) @ weight.T.astype(np.float64)) < 1e-6


def test_every_number_of_threads_and_every_place_gives_the_same_bits(kernels):
    x, weight, shapes = normal(1, 3, 100), normal(2, 333, 100), [(3, 333)]
    first, *others = for_thread_counts(kernels, lambda: called(kernels, "linear_few", x, weight, shapes=shapes)[0],
                                       (1, 2, 3, 9))
    for other in others:
        np.testing.assert_array_equal(first, other)
    check_places(kernels, "linear_few", x, weight, shapes=shapes)
