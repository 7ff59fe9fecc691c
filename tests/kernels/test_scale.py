"""Multiplying in place, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from elementwise import called, normal


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (700, 129)])
def test_scale_in_place(kernels, shape):
    x, factor = normal(1, *shape), np.array([-0.3], np.float32)
    wanted = x * factor
    (done,) = called(kernels, "scale_in_place", x, factor, shapes=[(1,)])
    np.testing.assert_array_equal(x, wanted)
    assert done == 1
