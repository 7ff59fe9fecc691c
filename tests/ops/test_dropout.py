"""Dropout: exact in its key, right in its rate, independent in every direction that matters."""

from __future__ import annotations

import numpy as np
import pytest

from llm_core import ops as core_ops

ROWS, COLUMNS, RATE = 512, 384, 0.1


@pytest.fixture(scope="module")
def masks() -> dict[str, np.ndarray]:
    """Kept (1) or dropped (0) of one base place and of its neighbours in each coordinate of the key."""
    from mindspore import Tensor, nn

    class Mask(nn.Cell):
        def __init__(self, site):
            super().__init__(auto_prefix=False)
            self.mask = core_ops.DropoutMask(RATE, site)

        def construct(self, key):
            return self.mask(key, ROWS, COLUMNS)

    cells = {site: Mask(site) for site in (0, 1)}

    def of(seed=1, step=5, micro_batch=0, site=0):
        return cells[site](Tensor(core_ops.dropout_key(seed, step, micro_batch))).asnumpy()

    return {
        "base": of(),
        "again": of(),
        "seed": of(seed=2),
        "step": of(step=6),
        "micro_batch": of(micro_batch=1),
        "site": of(site=1),
    }


def test_same_key_same_mask(masks):
    np.testing.assert_array_equal(masks["base"], masks["again"])


def test_rate_and_scale(masks):
    base = masks["base"]
    kept = np.unique(base)
    assert kept[0] == 0 and len(kept) == 2
    assert kept[1] == pytest.approx(1 / (1 - RATE), rel=1e-4)
    error = np.sqrt(RATE * (1 - RATE) / base.size)  # standard error of the measured rate
    assert abs((base == 0).mean() - RATE) < 4 * error
    for axis in (0, 1):  # of whole columns and whole rows too
        rates = (base == 0).mean(axis)
        spread = np.sqrt(RATE * (1 - RATE) / base.shape[axis])
        assert abs(rates - RATE).max() < 5 * spread
        assert rates.std() == pytest.approx(spread, rel=0.2)


def test_neighbours_are_independent(masks):
    base = (masks["base"] == 0).ravel().astype(float) - RATE

    def correlation(a, b):
        return abs((a * b).mean()) / (RATE * (1 - RATE)) * np.sqrt(len(a))  # in standard errors

    for name in ("seed", "step", "micro_batch", "site"):
        other = (masks[name] == 0).ravel().astype(float) - RATE
        for shift in (0, 1, 2, COLUMNS, base.size // 2):
            assert correlation(base[shift:], other[: base.size - shift]) < 5, (name, shift)
    for shift in (1, 2, 3, 64, COLUMNS, COLUMNS + 1, base.size // 2):
        assert correlation(base[shift:], base[:-shift]) < 5, shift


def test_gradient_uses_the_same_mask():
    import mindspore as ms
    from mindspore import Tensor

    cell = core_ops.Dropout(0.5, 3)
    key = Tensor(core_ops.dropout_key(0, 1))
    x = np.random.RandomState(0).uniform(1, 2, (7, 9)).astype(np.float32)  # an odd number of elements
    out = cell(Tensor(x), key).asnumpy()
    gradient = ms.ops.GradOperation()(cell)(Tensor(x), key).asnumpy()
    np.testing.assert_allclose(gradient, out / x, rtol=1e-6)
    assert 0 < (out == 0).mean() < 1


def test_every_backend_drops_the_same():
    """Dropout in one pass, where the backend has it, is multiplication with the mask."""
    from mindspore import Tensor

    key = Tensor(core_ops.dropout_key(4, 2, 1))
    for rows, columns in ((1, 1), (7, 9), (64, 48)):
        x = np.random.RandomState(0).standard_normal((rows, columns)).astype(np.float32)
        mask = core_ops.DropoutMask(0.3, 0xFFFFFFFF)(key, rows, columns).asnumpy()
        np.testing.assert_array_equal(core_ops.Dropout(0.3, 0xFFFFFFFF)(Tensor(x), key).asnumpy(), x * mask)
