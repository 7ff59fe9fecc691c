"""Dropout on every instruction set: bit for bit the reference's function, here once more in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from elementwise import called, check_places, normal
from openmp_threads import for_thread_counts

from llm_core.kernels import KernelError
from llm_core.ops.reference.dropout import dropout_key, place_of


def mixed(x: np.ndarray, middle: int = 0) -> np.ndarray:
    x = (x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB)
    x = (x ^ (x >> np.uint32(11))) * np.uint32(0xAC4C1B51) ^ np.asarray(middle, np.uint32)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB)
    return x ^ (x >> np.uint32(14))


def dropped(x: np.ndarray, key: np.ndarray, place: np.ndarray) -> np.ndarray:
    key, place = key.view(np.uint32), place.view(np.uint32)
    first = mixed(mixed(key[:1] + place[:1]) + key[1:])
    second = mixed(first + np.uint32(0x85EBCA6B))
    bits = mixed(np.arange((x.size + 1) // 2, dtype=np.uint32) ^ first, second)
    own = np.concatenate([bits & np.uint32(0xFFFF), bits >> np.uint32(16)])[: x.size]
    kept = np.float32(65536 / (65536 - int(place[1])))
    return x * np.where(own >= place[1], kept, np.float32(0)).reshape(x.shape)


def place(rate: float, site: int) -> np.ndarray:
    return np.array(place_of(rate, site), np.uint32).view(np.int32)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (7, 9), (16, 32), (300, 257)])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.999])
def test_it_is_the_references_function(kernels, shape, rate):
    x, key, where = normal(1, *shape), dropout_key(3, 14, 2), place(rate, 0xABCDEF01)
    (found,) = called(kernels, "dropout", x, key, where, shapes=[shape])
    np.testing.assert_array_equal(found, dropped(x, key, where))
    if x.size > 1000 and rate:
        assert abs((found == 0).mean() - rate) < 0.01


def test_threads_and_places_change_no_bit(kernels):
    x, key, where = normal(1, 301, 333), dropout_key(0, 1), place(0.1, 5)
    one, *others = for_thread_counts(
        kernels, lambda: called(kernels, "dropout", x, key, where, shapes=[x.shape])[0].tobytes()
    )
    assert all(other == one for other in others)
    check_places(kernels, "dropout", x[:40], key, where, shapes=[x[:40].shape])


@pytest.mark.parametrize("threshold", [-1, 65536])
def test_a_rate_of_one_is_refused(kernels, threshold):
    x = normal(1, 2, 2)
    with pytest.raises(KernelError, match="dropout: place: the rate must be below 1"):
        called(kernels, "dropout", x, dropout_key(0, 1), np.array([0, threshold], np.int32), shapes=[x.shape])
