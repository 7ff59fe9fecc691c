"""RMSNorm and LayerNorm, on every instruction set, against their formulas in fp64."""

from __future__ import annotations

import numpy as np
import pytest
from elementwise import called, check_places, differences, normal, relative
from openmp_threads import for_thread_counts

from llm_core.kernels import KernelError

SHAPES = [(1, 1), (5, 1), (1, 7), (3, 16), (33, 17), (70, 64), (130, 257), (2, 5000)]
EPS = np.array([1e-5], np.float32)


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS.astype(np.float64)) * weight


def layer_norm(x, weight, bias):
    away = x - x.mean(-1, keepdims=True)
    return away / np.sqrt((away * away).mean(-1, keepdims=True) + EPS.astype(np.float64)) * weight + bias


def rms_norm_gradients(x, weight, dy):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS.astype(np.float64))
    return r * (dy * weight - x * r * r * (dy * weight * x).mean(-1, keepdims=True)), (dy * x * r).sum(0)


def layer_norm_gradients(x, weight, dy):
    away = x - x.mean(-1, keepdims=True)
    r = 1 / np.sqrt((away * away).mean(-1, keepdims=True) + EPS.astype(np.float64))
    h, g = away * r, dy * weight
    dx = r * (g - g.mean(-1, keepdims=True) - h * (g * h).mean(-1, keepdims=True))
    return dx, (dy * h).sum(0), dy.sum(0)


def inputs(rows: int, width: int, shift: float = 0):
    """x, weight, bias and dy."""
    x, dy = normal(1, rows, width) + np.float32(shift), normal(2, rows, width)
    return x, 1 + normal(3, width) / 4, normal(4, width), dy


def run_rms_norm(kernels, x, weight, dy):
    """y, rstd, dx, dweight."""
    rows, width = x.shape
    y, rstd = called(kernels, "rms_norm_forward", x, weight, EPS, shapes=[x.shape, (rows,)])
    return y, rstd, *called(kernels, "rms_norm_backward", x, weight, rstd, dy, shapes=[x.shape, (width,)])


def run_layer_norm(kernels, x, weight, bias, dy):
    """y, mean, rstd, dx, dweight, dbias."""
    rows, width = x.shape
    forward = called(kernels, "layer_norm_forward", x, weight, bias, EPS, shapes=[x.shape, (rows,), (rows,)])
    shapes = [x.shape, (width,), (width,)]
    return *forward, *called(kernels, "layer_norm_backward", x, weight, *forward[1:], dy, shapes=shapes)


def check_dx(found, wanted, rstd, weight, dy):
    """dx is a difference of terms as large as r dy weight; in a row of one number they cancel."""
    assert np.linalg.norm(found - wanted) < 5e-7 * np.linalg.norm(rstd[:, None] * dy * weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(kernels, shape):
    x, weight, _, dy = inputs(*shape)
    y, rstd, dx, dweight = run_rms_norm(kernels, x, weight, dy)
    x, weight, dy = (a.astype(np.float64) for a in (x, weight, dy))
    assert relative(y, rms_norm(x, weight)) < 3e-7
    assert relative(rstd, 1 / np.sqrt((x**2).mean(-1) + EPS[0])) < 3e-7
    wanted_dx, wanted_dweight = rms_norm_gradients(x, weight, dy)
    check_dx(dx, wanted_dx, rstd, weight, dy)
    assert relative(dweight, wanted_dweight) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(kernels, shape):
    x, weight, bias, dy = inputs(*shape)
    y, mean, rstd, dx, dweight, dbias = run_layer_norm(kernels, x, weight, bias, dy)
    x, weight, bias, dy = (a.astype(np.float64) for a in (x, weight, bias, dy))
    assert relative(y, layer_norm(x, weight, bias)) < 3e-7
    np.testing.assert_allclose(mean, x.mean(-1), atol=2e-7, rtol=2e-7)
    assert relative(rstd, 1 / np.sqrt(x.var(-1) + EPS[0])) < 3e-7
    wanted_dx, *wanted = layer_norm_gradients(x, weight, dy)
    check_dx(dx, wanted_dx, rstd, weight, dy)
    for found, gradient in zip((dweight, dbias), wanted, strict=True):
        assert relative(found, gradient) < 1e-6


def test_gradients_are_those_of_central_differences(kernels):
    x, weight, bias, dy = inputs(4, 5)
    found = run_rms_norm(kernels, x, weight, dy)[2:]
    for gradient, wanted in zip(found, differences(rms_norm, [x, weight], dy), strict=True):
        assert relative(gradient, wanted) < 1e-6
    found = run_layer_norm(kernels, x, weight, bias, dy)[3:]
    for gradient, wanted in zip(found, differences(layer_norm, [x, weight, bias], dy), strict=True):
        assert relative(gradient, wanted) < 1e-6


@pytest.mark.parametrize("shift", [1000, -3e4])
def test_rows_far_from_zero_keep_their_digits(kernels, shift):
    x, weight, bias, dy = inputs(40, 300, shift)
    found = run_layer_norm(kernels, x, weight, bias, dy)
    x, weight, bias, dy = (a.astype(np.float64) for a in (x, weight, bias, dy))
    assert np.abs(found[0] - layer_norm(x, weight, bias)).max() < 2e-6
    # the mean that the gradient is given is rounded to the digits of x
    tolerance = 2e-7 * abs(shift)
    for gradient, wanted in zip(found[3:], layer_norm_gradients(x, weight, dy), strict=True):
        assert relative(gradient, wanted) < tolerance


def test_every_number_of_threads_and_every_place_gives_the_same_bits(kernels):
    x, weight, bias, dy = inputs(403, 257)
    for run in (lambda: run_rms_norm(kernels, x, weight, dy), lambda: run_layer_norm(kernels, x, weight, bias, dy)):
        first, *others = for_thread_counts(kernels, run)
        for other in others:
            for a, b in zip(first, other, strict=True):
                np.testing.assert_array_equal(a, b)
    x, weight, bias, dy = inputs(40, 77)
    check_places(kernels, "rms_norm_forward", x, weight, EPS, shapes=[x.shape, (40,)])
    check_places(kernels, "layer_norm_forward", x, weight, bias, EPS, shapes=[x.shape, (40,), (40,)])
    _, mean, rstd, *_ = run_layer_norm(kernels, x, weight, bias, dy)
    check_places(kernels, "rms_norm_backward", x, weight, rstd, dy, shapes=[x.shape, (77,)])
    check_places(kernels, "layer_norm_backward", x, weight, mean, rstd, dy, shapes=[x.shape, (77,), (77,)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_spoils_its_row_only(kernels, bad):
    x, weight, bias, dy = inputs(5, 33)
    rms, layer = run_rms_norm(kernels, x, weight, dy), run_layer_norm(kernels, x, weight, bias, dy)
    x[2, 7] = bad
    spoilt_rms, spoilt_layer = run_rms_norm(kernels, x, weight, dy), run_layer_norm(kernels, x, weight, bias, dy)
    rest = [0, 1, 3, 4]
    for good, spoilt in ((rms[0], spoilt_rms[0]), (rms[2], spoilt_rms[2]), (layer[0], spoilt_layer[0]),
                         (layer[3], spoilt_layer[3])):
        np.testing.assert_array_equal(good[rest], spoilt[rest])
        assert not np.isfinite(spoilt[2, 7])
    assert not np.isfinite(spoilt_rms[3]).all() and not np.isfinite(spoilt_layer[4]).all()  # dweight


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: np.zeros(6, np.float32)}, r"layer_norm_forward: x: expected float32 \[N, D\], got float32 \[6\]"),
        ({0: np.zeros((3, 6), np.int32)}, r"x: expected float32 \[N, D\], got int32 \[3, 6\]"),
        ({1: np.zeros(5, np.float32)}, r"weight: expected float32 \[D=6\], got float32 \[5\]"),
        ({2: np.zeros(7, np.float32)}, r"bias: expected float32 \[D=6\]"),
        ({3: np.zeros(2, np.float32)}, r"eps: expected float32 \[1\]"),
        ({4: np.zeros((3, 5), np.float32)}, r"y: expected float32 \[N=3, D=6\]"),
        ({6: np.zeros(4, np.float32)}, r"rstd: expected float32 \[N=3\]"),
    ],
)
def test_wrong_arguments_are_named(kernels, change, message):
    arguments = [np.zeros(s, np.float32) for s in ((3, 6), 6, 6, 1, (3, 6), 3, 3)]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(KernelError, match=message):
        kernels.call("layer_norm_forward", *arguments[:4], outputs=arguments[4:])


def test_too_few_and_too_many_arguments_are_refused(kernels):
    x, weight, rstd = np.ones((3, 6), np.float32), np.ones(6, np.float32), np.ones(3, np.float32)
    with pytest.raises(KernelError, match="dweight: missing"):
        kernels.call("rms_norm_backward", x, weight, rstd, x, outputs=[x.copy()])
    with pytest.raises(KernelError, match="got 7 arguments, takes 6"):
        kernels.call("rms_norm_backward", x, weight, rstd, x, outputs=[x.copy(), weight.copy(), rstd])


@pytest.mark.parity
@pytest.mark.parametrize("shift", [0, 1000])
def test_layer_norm_is_torchs(kernels, shift):
    torch = pytest.importorskip("torch")
    arrays = inputs(37, 130, shift)
    found = run_layer_norm(kernels, *arrays)
    x, weight, bias, dy = (torch.tensor(a) for a in arrays)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = torch.nn.functional.layer_norm(x, (130,), weight, bias, float(EPS[0]))
    tolerance = 1e-6 if shift == 0 else 1e-4
    assert relative(found[0], y.detach().numpy()) < tolerance
    for gradient, wanted in zip(found[3:], torch.autograd.grad(y, leaves, dy), strict=True):
        assert relative(gradient, wanted.numpy()) < tolerance
