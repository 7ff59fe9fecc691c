"""What the tests of the elementwise kernels share: numbers, calls, central differences, arrays at odd addresses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llm_core.kernels import Library


def normal(seed: int, *shape: int) -> np.ndarray:
    """fp32 numbers of a standard normal distribution."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def called(kernels: Library, name: str, *inputs: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The kernel's fp32 outputs of the given shapes; a number that it does not write would be a NaN."""
    outputs = [np.full(shape, np.nan, np.float32) for shape in shapes]
    kernels.call(name, *inputs, outputs=outputs)
    return outputs


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of what is wanted."""
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))


def differences(forward: Callable[..., np.ndarray], inputs: list[np.ndarray], pull: np.ndarray) -> list[np.ndarray]:
    """Gradients of sum(forward(*inputs) * pull) to every input, in fp64 by central differences."""
    wide = [x.astype(np.float64) for x in inputs]
    gradients = []
    for x in wide:
        gradient = np.empty_like(x)
        for i in np.ndindex(x.shape):
            middle, sides = x[i], []
            for x[i] in (middle + 1e-5, middle - 1e-5):
                sides.append((forward(*wide) * pull).sum())
            x[i] = middle
            gradient[i] = (sides[0] - sides[1]) / 2e-5
        gradients.append(gradient)
    return gradients


def placed(x: np.ndarray, offset: int) -> np.ndarray:
    """A copy of x that starts `offset` bytes past a boundary of 64."""
    memory = np.empty(x.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def check_places(kernels: Library, name: str, *inputs: np.ndarray, shapes: list[tuple[int, ...]]) -> None:
    """The kernel's results are the same bit for bit wherever its arrays lie."""
    expected = called(kernels, name, *inputs, shapes=shapes)
    for offset in (4, 16, 36, 60):
        outputs = [placed(np.full(shape, np.nan, np.float32), offset) for shape in shapes]
        kernels.call(name, *(placed(x, (offset + 4 * i) % 64) for i, x in enumerate(inputs)), outputs=outputs)
        for found, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
