"""SwiGLU and GELU, on every instruction set, against their formulas in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from elementwise import called, check_places, differences, normal, relative
from openmp_threads import for_thread_counts

from llm_core.kernels import KernelError

LARGEST = np.finfo(np.float32).max
SHAPES = [(1, 1), (1, 17), (3, 5), (7, 64), (5, 8200)]


def swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def below(x):
    """The normal distribution in fp64, with all its digits in the lower tail."""
    return np.vectorize(lambda v: math.erfc(-v / math.sqrt(2)) / 2)(x.astype(np.float64))


def gelu(x):
    return x * below(x)


def gelu_slope(x):
    return below(x) + x * np.exp(-(x.astype(np.float64) ** 2) / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(kernels, shape):
    gate, up, dy = 3 * normal(1, *shape), normal(2, *shape), normal(3, *shape)
    (y,) = called(kernels, "swiglu_forward", gate, up, shapes=[shape])
    g, u, d = (a.astype(np.float64) for a in (gate, up, dy))
    assert relative(y, swiglu(g, u)) < 3e-7
    dgate, dup = called(kernels, "swiglu_backward", gate, up, dy, shapes=[shape] * 2)
    s = 1 / (1 + np.exp(-g))
    assert relative(dgate, d * u * s * (1 + g * (1 - s))) < 5e-7
    assert relative(dup, d * g * s) < 3e-7


def test_swiglu_without_overflow(kernels):
    gate = np.array([[-LARGEST, -1e30, -104, -100, -88.5, -87, 0, 87, 88.5, 100, 104, 1e30]], np.float32)
    ones = np.ones_like(gate)
    (y,) = called(kernels, "swiglu_forward", gate, ones, shapes=[gate.shape])
    dgate, dup = called(kernels, "swiglu_backward", gate, ones, ones, shapes=[gate.shape] * 2)
    for found, wanted in ((y, np.maximum(gate, 0)), (dup, np.maximum(gate, 0)), (dgate, (gate > 0) + (gate == 0) / 2)):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(kernels, shape):
    x, dy = 2 * normal(1, *shape), normal(2, *shape)
    (y,) = called(kernels, "gelu_forward", x, shapes=[shape])
    assert relative(y, gelu(x.astype(np.float64))) < 2e-7
    (dx,) = called(kernels, "gelu_backward", x, dy, shapes=[shape])
    assert relative(dx, dy * gelu_slope(x)) < 2e-7


def test_gelu_keeps_its_digits_in_the_lower_tail(kernels):
    x = np.concatenate([np.linspace(-12.5, 8, 9001), -np.logspace(-30, 0, 200)]).astype(np.float32)[None]
    (y,) = called(kernels, "gelu_forward", x, shapes=[x.shape])
    error = np.abs(y / gelu(x.astype(np.float64)) - 1)
    assert error.max() < 5e-7
    assert np.quantile(error, 0.98) < 2.5e-7
    (dx,) = called(kernels, "gelu_backward", x, np.ones_like(x), shapes=[x.shape])
    assert np.abs(dx - gelu_slope(x)).max() < 2e-7


def test_gelu_of_large_numbers(kernels):
    x = np.array([[-LARGEST, -1e10, -100, -14, 0, 14, 100, 1e10, LARGEST]], np.float32)
    (y,) = called(kernels, "gelu_forward", x, shapes=[x.shape])
    np.testing.assert_allclose(y, np.maximum(x, 0), atol=1e-35)
    (dx,) = called(kernels, "gelu_backward", x, np.ones_like(x), shapes=[x.shape])
    np.testing.assert_allclose(dx, (x > 0) + (x == 0) / 2, atol=1e-35)


def test_gradients_are_those_of_central_differences(kernels):
    gate, up, dy = normal(1, 3, 7), normal(2, 3, 7), normal(3, 3, 7)
    found = called(kernels, "swiglu_backward", gate, up, dy, shapes=[(3, 7)] * 2)
    found += called(kernels, "gelu_backward", gate, dy, shapes=[(3, 7)])
    wanted = differences(swiglu, [gate, up], dy) + differences(gelu, [gate], dy)
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) < 1e-6


KERNELS = {"swiglu_forward": (2, 1), "swiglu_backward": (3, 2), "gelu_forward": (1, 1), "gelu_backward": (2, 1)}


@pytest.mark.parametrize("name", KERNELS)
def test_every_number_of_threads_and_every_place_gives_the_same_bits(kernels, name):
    inputs, outputs = KERNELS[name]
    arrays = [normal(i, 7, 8191) for i in range(inputs)]
    first, *others = for_thread_counts(kernels, lambda: called(kernels, name, *arrays, shapes=[(7, 8191)] * outputs))
    for other in others:
        np.testing.assert_array_equal(first, other)
    check_places(kernels, name, *(a[:3, :77].copy() for a in arrays), shapes=[(3, 77)] * outputs)


@pytest.mark.parametrize("name", KERNELS)
def test_not_a_number_stays_one(kernels, name):
    inputs, outputs = KERNELS[name]
    for spoilt in range(inputs):
        arrays = [normal(i, 2, 19) for i in range(inputs)]
        arrays[spoilt][1, 18] = np.nan
        found = called(kernels, name, *arrays, shapes=[(2, 19)] * outputs)
        uses = [not (name == "swiglu_backward" and spoilt == 1 and output == 1) for output in range(outputs)]
        for output, used in zip(found, uses, strict=True):
            assert np.isnan(output[1, 18]) == used  # dup alone does not depend on up
            assert np.isnan(output).sum() == used


@pytest.mark.parametrize("name", KERNELS)
def test_wrong_arguments_are_named(kernels, name):
    inputs, outputs = KERNELS[name]
    good = [np.ones((2, 3), np.float32) for _ in range(inputs + outputs)]
    names = {
        "swiglu_forward": ["gate", "up", "y"],
        "swiglu_backward": ["gate", "up", "dy", "dgate", "dup"],
        "gelu_forward": ["x", "y"],
        "gelu_backward": ["x", "dy", "dx"],
    }[name]
    for index, argument in enumerate(names):
        for wrong in (np.ones((2, 3), np.int32), np.ones(6, np.float32), np.ones((2, 3, 1), np.float32)):
            arrays = [*good[:index], wrong, *good[index + 1 :]]
            with pytest.raises(KernelError, match=rf"{name}: {argument}: expected float32 \[N.*got"):
                kernels.call(name, *arrays[:inputs], outputs=arrays[inputs:])


@pytest.mark.parity
def test_gelu_is_torchs(kernels):
    torch = pytest.importorskip("torch")
    x, dy = 2 * normal(1, 9, 131), normal(2, 9, 131)
    leaf = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.gelu(leaf)
    (dx,) = torch.autograd.grad(y, leaf, torch.tensor(dy))
    assert relative(*called(kernels, "gelu_forward", x, shapes=[x.shape]), y.detach().numpy()) < 3e-7
    assert relative(*called(kernels, "gelu_backward", x, dy, shapes=[x.shape]), dx.numpy()) < 3e-7
