"""The emulator of a GPU: what a right kernel gives, and that it shows what is wrong with a wrong one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from bfloat16 import rounded, widened
from openmp_threads import for_thread_counts

from llm_core.kernels import BFloat16, Emulator, KernelError
from llm_core.kernels.build import EMULATOR_SOURCES, built, emulator_target

FROM = np.arange(1, 65, dtype=np.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The kernels of emulator_kernels.cu."""
    folder = tmp_path_factory.mktemp("emulator")
    abi, cuda, emulation = EMULATOR_SOURCES
    kernels = Path(__file__).with_name("emulator_kernels.cu")
    for path in (*abi.iterdir(), *cuda.glob("*.h"), *emulation.iterdir(), kernels):
        shutil.copy(path, folder)
    return Emulator(built(emulator_target((folder,))), "emulator")


def results(small: Emulator, name: str, *inputs, to: np.ndarray, seeds: int = 8) -> list[np.ndarray]:
    """What a kernel writes to `to`, seed by seed."""
    found = []
    for seed in range(seeds):
        small.seed(seed)
        found.append(to.copy())
        small.call(name, *inputs, outputs=[found[-1]])
    return found


def distinct(found: list[np.ndarray]) -> int:
    return len({array.tobytes() for array in found})


@pytest.mark.parametrize(("right", "wrong", "wanted"), [
    ("turn", "turn_without_barrier", np.arange(63, -1, -1)),
    ("hand_over", "hand_over_unawaited", np.arange(32)),
])
def test_a_missing_barrier_is_a_race(small, right, wrong, wanted):
    to = np.zeros(len(wanted), np.float32)
    assert all(np.array_equal(found, wanted) for found in results(small, right, to=to))
    with pytest.raises(KernelError, match="a race: thread .* with no barrier in between: byte"):
        results(small, wrong, to=to, seeds=1)


RACES = [  # in the order of emulator_kernels.cu
    "writes what thread (5|37) has written",
    "(reads what thread .* has written|writes what thread .* has read), with no barrier in between",
    "(writes what thread .* has read|reads what thread .* has written), with no barrier in between",
    "(reads what thread .* has written|writes what thread .* has read), with no barrier in between",
    "(writes what thread .* has read|reads what an asynchronous copy writes|reads what thread .* has written)",
    "writes where an asynchronous copy writes",
    "(reads what thread .* has written|writes what thread .* has read), with no barrier in between",
    "(writes what thread .* has read|reads what thread .* has written), with no barrier in between",
    "(reads what thread .* has written|writes what thread .* has read), with nothing in between",
    "writes what another block has written",
    "(reads what another block has written|writes what another block has read)",
    "(writes what thread .* has read|reads what thread .* has written), with no barrier in between",
    "reads what an asynchronous copy writes|writes what thread .* has read",
    "wgmma reads what thread .* has written, with no fence_async",
]


@pytest.mark.parametrize("which", range(len(RACES)))
def test_a_race_ends_the_launch_whatever_the_order_of_threads(small, which):
    for seed in range(16):
        small.seed(seed)
        for right in (1, 0):
            arguments = [np.array([which], np.int32), np.array([right], np.int32), FROM]
            if right:
                small.call("race", *arguments, outputs=[np.zeros(128, np.float32)])
                continue
            with pytest.raises(KernelError, match=RACES[which]):
                small.call("race", *arguments, outputs=[np.zeros(128, np.float32)])


def test_the_same_seed_gives_the_same_order_of_threads(small):
    def messages():
        for seed in range(8):
            small.seed(seed)
            with pytest.raises(KernelError) as caught:
                small.call("turn_without_barrier", outputs=[np.zeros(64, np.float32)])
            yield str(caught.value)

    first, second = list(messages()), list(messages())
    assert first == second and len(set(first)) > 4


def test_shared_memory_begins_as_nans(small):
    for found in results(small, "read_shared", to=np.zeros(64, np.float32)):
        assert np.isnan(found).all()


def test_blocks_run_in_an_order_that_changes_with_the_seed(small):
    assert distinct([found - found.min() for found in results(small, "count_blocks", to=np.zeros(16, np.int32))]) > 4


@pytest.mark.parametrize("name", ["copy_twice_wait_for_none", "copy_twice_wait_for_one"])
def test_who_reads_a_copy_before_the_wait_for_it_ends_the_launch(small, name):
    with pytest.raises(KernelError, match="a race: thread .* reads what an asynchronous copy writes"):
        results(small, name, FROM, to=np.zeros((64, 2), np.float32))


def test_a_copy_is_there_after_the_wait_for_it(small):
    for found in results(small, "copy_twice_wait_for_both", FROM, to=np.zeros((64, 2), np.float32)):
        np.testing.assert_array_equal(found, np.tile(np.array([1, 5], np.float32), (64, 1)))


def test_a_copy_that_is_not_valid_brings_zeros(small):
    for found in results(small, "copy_nothing", FROM, to=np.ones(64, np.float32)):
        np.testing.assert_array_equal(found, np.where(np.arange(64) % 2, FROM, 0))


FAULTS = {  # in the order of the kernel's
    "lanes of a warp part ways: (shuffle_xor and any_lane|any_lane and shuffle_xor)": 0,
    r"thread \d+ of block \(0, 0, 0\) waits for ever: shuffle": 1,
    r"thread \d+ of block \(0, 0, 0\) waits for ever: a barrier": 2,
    "written past the end of shared memory: byte 256 of 256": 3,
    "an asynchronous copy: a misaligned address": 4,
    "an asynchronous copy: a misaligned source": 5,
    "an asynchronous copy: an address outside shared memory": 6,
    r"thread \d+ of block .* ended before its asynchronous copies": 7,
    "load_matrices: an address outside shared memory": 8,
    "load_matrices: a misaligned address": 9,
    "no such barrier: 16 of 64 threads": 10,
    r"thread 63 of block \(0, 0, 0\) reads or writes outside the kernel's arrays": 11,
    r"thread 63 of block .* reads or writes outside .*, or writes to an input: at 0x[0-9a-f]+000$": 12,
    r"thread \d+ of block .* or writes to an input: at 0x": 13,
    "thread 63 of block .* reads or writes outside the kernel's arrays, or": 14,
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_ends_the_launch_and_says_what_it_is(small, message):
    to = np.zeros(64, np.float32)
    for seed in range(3):
        small.seed(seed)
        with pytest.raises(KernelError, match=message):
            small.call("commit", np.array([FAULTS[message]], np.int32), FROM, outputs=[to])
    for found in results(small, "turn", to=to):  # it leaves no trace
        np.testing.assert_array_equal(found, 63 - np.arange(64))


def test_a_barrier_that_a_block_leaves_half_full_is_empty_for_the_next(small):
    def run():  # both blocks in one thread, in either order
        for seed in range(4):
            small.seed(seed)
            with pytest.raises(KernelError, match="waits for ever: a barrier"):
                small.call("half_a_barrier")

    for_thread_counts(small, run)


@pytest.mark.parametrize(("sizes", "message"), [
    ((2, 3, 4, 96, 1024), None),
    ((1, 1, 1, 33, 0), "a block of 33 threads"),
    ((1, 1, 1, 1056, 0), "a block of 1056 threads"),
    ((1, 1, 1, 32, 232449), "232449 bytes of shared memory"),
    ((0, 1, 1, 32, 0), r"a grid of \(0, 1, 1\) blocks"),
    ((1, 65536, 1, 32, 0), r"a grid of \(1, 65536, 1\) blocks"),
])
def test_a_launch_that_no_gpu_takes_is_refused(small, sizes, message):
    if message is None:
        small.call("launch_nothing", np.array(sizes, np.int32))
        return
    with pytest.raises(KernelError, match=message):
        small.call("launch_nothing", np.array(sizes, np.int32))


def test_scratch_memory_begins_as_nans(small):
    (found,) = results(small, "read_scratch", to=np.zeros(8, np.float32), seeds=1)
    assert np.isnan(found).all()


def test_lanes_exchange_numbers(small):
    rng = np.random.default_rng(0)
    x, source = rng.standard_normal(32).astype(np.float32), rng.integers(0, 32, 32, np.int32)
    for negative in (False, True):
        x = -np.abs(x) if negative else x
        to, anyone = np.zeros((2, 32), np.float32), np.full(32, 7, np.int32)
        small.call("exchange", x, source, outputs=[to, anyone])
        np.testing.assert_array_equal(to, [x[source], x[np.arange(32) ^ 5]])
        np.testing.assert_array_equal(anyone, np.full(32, not negative))


@pytest.mark.parametrize("transposed", [False, True])
def test_four_matrices_become_fragments(small, transposed):
    matrices = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    found = np.zeros((32, 4), np.int32)
    small.call("load_transposed" if transposed else "load", BFloat16(matrices.reshape(32, 8)), outputs=[found])
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    wanted = matrices.reshape(4, 32, 2).transpose(1, 0, 2)  # a lane has two neighbours of a row, the lower one first
    np.testing.assert_array_equal(found.view(np.uint16).reshape(32, 4, 2), wanted)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_product_of_fragments_is_numpys(small, dtype):
    rng = np.random.default_rng(0)
    a, b, before = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    if dtype == "bf16":
        given, wide = [BFloat16(rounded(x)) for x in (a, b)], [widened(rounded(x)) for x in (a, b)]
    else:
        given = wide = [x.astype(np.float16) for x in (a, b)]
    wanted = before + wide[0].astype(np.float64) @ wide[1].astype(np.float64)
    for found in results(small, f"multiply_{dtype}", *given, before, to=np.zeros((16, 8), np.float32)):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6)


def as_tf32(x: np.ndarray) -> np.ndarray:
    """Cut to 10 bits of mantissa."""
    return (x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)


def test_a_product_in_tf32_is_numpys(small):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
    found = np.zeros((16, 8), np.float32)
    small.call("multiply_tf32", a, b, outputs=[found])
    np.testing.assert_allclose(found, as_tf32(a) @ as_tf32(b), rtol=0, atol=3e-6)
    assert np.abs(found - a.astype(np.float64) @ b).max() > 1e-4, "not fp32's product"


def numbers_to_round() -> np.ndarray:
    """fp32 numbers of every size, NaN and infinity among them; and those around every tie of fp16 and of bfloat16."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    ties = (halves[1:].astype(np.float64) + halves[:-1]) / 2
    ties = np.concatenate([ties, [65519.99, 65520, 65536]]).astype(np.float32)
    upper = np.arange(2**16, dtype=np.uint32) << 16 | 0x8000
    around = [np.nextafter(ties, np.float32(way)) for way in (-np.inf, np.inf)]
    return np.concatenate([anything, halves, ties, *around, upper.view(np.float32), (upper + 1).view(np.float32)])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_numbers_are_rounded_to_the_nearest_even(small, dtype):
    numbers = numbers_to_round()
    numbers = np.concatenate([numbers, numbers[: len(numbers) % 2]])
    found = np.zeros(len(numbers), np.uint16)
    small.call(f"round_{dtype}", numbers, outputs=[BFloat16(found) if dtype == "bf16" else found.view(np.float16)])
    real = ~np.isnan(numbers)
    with np.errstate(over="ignore"):
        wanted = rounded(numbers) if dtype == "bf16" else numbers.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(found[real], wanted[real])
    assert (found[~real] == 0x7FFF).all(), "NVIDIA's NaN"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_all_16_bit_numbers_widen_to_what_they_are(small, dtype):
    every = np.arange(2**16, dtype=np.uint16)
    found = np.zeros(2**16, np.float32)
    small.call(f"widen_{dtype}", BFloat16(every) if dtype == "bf16" else every.view(np.float16), outputs=[found])
    wanted = widened(every) if dtype == "bf16" else every.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found, wanted)  # NaNs are equal here
    np.testing.assert_array_equal(np.signbit(found), every >= 2**15)
