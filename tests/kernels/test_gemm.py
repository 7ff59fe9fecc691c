"""Matrix products on every instruction set, against fp64: the C++ function with all its choices, and the operators."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from bfloat16 import to_bfloat16
from openmp_threads import for_thread_counts

from llm_core.kernels import KernelError, Library
from llm_core.kernels.build import SOURCES, library_path

# Sizes within a tile, at its edges and beyond it; then those that take several blocks of each axis.
SHAPES = [
    *itertools.product((1, 3, 8, 17, 65), (1, 17, 64, 129), (1, 2, 33, 577)),
    *((size, size, size) for size in (2, 3, 63, 64, 65, 129, 577)),
    (1300, 130, 70), (10, 2200, 40), (70, 130, 2500), (7, 100, 2500),
]
ORDERS = {"nn": (False, False), "nt": (False, True), "tn": (True, False), "tt": (True, True)}


@pytest.fixture(scope="module")
def gemm_library(isa: str, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """gemm.cpp and the operator of gemm_any.cpp, compiled for `isa`."""
    folder = tmp_path_factory.mktemp("gemm")
    abi, cpu = SOURCES
    for path in (*abi.iterdir(), *cpu.glob("*.h"), cpu / "gemm.cpp", Path(__file__).with_name("gemm_any.cpp")):
        shutil.copy(path, folder)
    return Library(library_path(isa, (folder,)), isa)


@pytest.fixture(params=["fp32", "bf16"])
def number(request: pytest.FixtureRequest, isa: str) -> str:
    """What the factors are rounded to; bfloat16 where the instruction set has it."""
    if request.param == "bf16" and isa != "avx512_bf16":
        pytest.skip(f"{isa} has no bfloat16")
    return request.param


@pytest.fixture
def operators(kernels: Library, isa: str) -> Library:
    """The kernels, of an instruction set that has bfloat16."""
    if isa != "avx512_bf16":
        pytest.skip(f"{isa} has no bfloat16")
    return kernels


def factors(order: str, m: int, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Normal numbers in the shapes in which the operands lie in memory."""
    rng = np.random.default_rng(seed)
    trans_a, trans_b = ORDERS[order]
    shapes = (k, m) if trans_a else (m, k), (n, k) if trans_b else (k, n)
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def gemm(library: Library, number: str, order: str, a: np.ndarray, b: np.ndarray, c: np.ndarray,
         size: tuple[int, int, int], add: bool = False) -> np.ndarray:
    """A copy of c, with the product of parts of a and b in its first m rows and n columns."""
    c = c.copy()
    settings = np.array([number == "bf16", *ORDERS[order], add, *size], np.int32)
    library.call("gemm_any", settings, a, b, outputs=[c])
    return c


def expected(number: str, order: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float]:
    """The product in fp64, and the norm of the products of magnitudes: what rounding errors are relative to."""
    if number == "bf16":
        a, b = to_bfloat16(a), to_bfloat16(b)
    trans_a, trans_b = ORDERS[order]
    a, b = (a.T if trans_a else a).astype(np.float64), (b.T if trans_b else b).astype(np.float64)
    return a @ b, float(np.linalg.norm(np.abs(a) @ np.abs(b)))


@pytest.mark.parametrize("order", ORDERS)
def test_product(gemm_library, number, order):
    for m, n, k in SHAPES:
        a, b = factors(order, m, n, k)
        found = gemm(gemm_library, number, order, a, b, np.full((m, n), np.nan, np.float32), (m, n, k))
        wanted, scale = expected(number, order, a, b)
        assert np.linalg.norm(found - wanted) <= 1e-6 * scale, (m, n, k)


@pytest.mark.parametrize("order", ORDERS)
def test_product_added_within_larger_arrays(gemm_library, number, order):
    """Rows in memory longer than the operands': the numbers beyond are neither used nor changed."""
    for m, n, k in [(1, 5, 40), (4, 70, 33), (8, 64, 64), (17, 63, 577), (150, 200, 129), (600, 65, 1300)]:
        a, b = factors(order, m, n, k)
        wider = [np.pad(x, ((0, 0), (0, 3)), constant_values=np.nan) for x in (a, b)]
        c = np.random.default_rng(1).standard_normal((m + 1, n + 5), np.float32)
        found = gemm(gemm_library, number, order, *wider, c, (m, n, k), add=True)
        wanted, scale = expected(number, order, a, b)
        assert np.linalg.norm(found[:m, :n] - c[:m, :n] - wanted) <= 1e-6 * (scale + np.linalg.norm(c)), (m, n, k)
        assert np.array_equal(found[:m, n:], c[:m, n:]) and np.array_equal(found[m], c[m]), (m, n, k)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [(8, 3000, 300), (97, 700, 65), (700, 129, 1500)])
def test_bits_do_not_depend_on_the_number_of_threads(gemm_library, number, order, size):
    a, b = factors(order, *size)
    c = np.zeros(size[:2], np.float32)
    found = for_thread_counts(gemm_library, lambda: gemm(gemm_library, number, order, a, b, c, size), (1, 2, 3, 7))
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("m", [3, 70])
def test_infinity_and_nan_reach_their_row_and_column_alone(gemm_library, number, order, m):
    n, k = 75, 35
    a, b = (np.abs(x) + 1 for x in factors(order, m, n, k))
    trans_a, trans_b = ORDERS[order]
    (a.T if trans_a else a)[m - 1, k - 1] = np.inf
    (b.T if trans_b else b)[k - 1, n - 1] = np.nan
    found = gemm(gemm_library, number, order, a, b, np.zeros((m, n), np.float32), (m, n, k))
    assert np.isnan(found[:, -1]).all() and np.isposinf(found[-1, :-1]).all() and np.isfinite(found[:-1, :-1]).all()


@pytest.mark.parametrize("order", ["nt", "nn", "tn"])
def test_operators(operators, order):
    for m, n, k in [(1, 1, 1), (2, 130, 63), (130, 577, 65)]:
        a, b = factors(order, m, n, k)
        c = np.full((m, n), np.nan, np.float32)
        operators.call(f"gemm_bf16_{order}", a, b, outputs=[c])
        wanted, scale = expected("bf16", order, a, b)
        assert np.linalg.norm(c - wanted) <= 1e-6 * scale, (m, n, k)


def test_rounding_is_to_the_nearest_even(operators):
    """Numbers half way between two bfloat16, and just beside: the products are exact, so every bit counts."""
    bits = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x3F80FFFF, 0xBF818000, 0x7F7F7FFF], np.uint32)
    a, one = bits.view(np.float32)[:, None], np.ones((1, 1), np.float32)
    for order in ("nt", "nn", "tn"):
        c = np.empty((7, 1), np.float32)
        operators.call(f"gemm_bf16_{order}", np.ascontiguousarray(a.T) if order == "tn" else a, one, outputs=[c])
        assert np.array_equal(c, to_bfloat16(a)), order


@pytest.mark.parametrize("order", ["nt", "nn", "tn"])
def test_operators_say_what_is_wrong(kernels, isa, order):
    a, b = factors(order, 5, 6, 7)
    with pytest.raises(KernelError, match=f"gemm_bf16_{order}: c: expected float32"):
        kernels.call(f"gemm_bf16_{order}", a, b, outputs=[np.empty((5, 7), np.float32)])
    with pytest.raises(KernelError, match=f"gemm_bf16_{order}: b: expected float32"):
        kernels.call(f"gemm_bf16_{order}", a, b[1:, 1:].copy(), outputs=[np.empty((5, 6), np.float32)])
    if isa != "avx512_bf16":
        with pytest.raises(KernelError, match="needs AVX512_BF16"):
            kernels.call(f"gemm_bf16_{order}", a, b, outputs=[np.empty((5, 6), np.float32)])
