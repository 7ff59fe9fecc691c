"""The instructions of Hopper and the attention built on them, in the emulator, against NumPy and attention in fp64."""

from __future__ import annotations

import shutil
from pathlib import Path

import attention_oracle as oracle
import numpy as np
import pytest
from bfloat16 import rounded, widened
from elementwise import relative
from test_attention import settings

from llm_core.kernels import BFloat16, Emulator, KernelError
from llm_core.kernels.build import EMULATOR_SOURCES, built, emulator_target

CASES = {name: case for name, case in oracle.cases().items() if case.dim in (64, 128)}
CASES["wide and long"] = oracle.Case(1, 450, 450, 1, 1, 128, oracle.causal_ranges(450, 450))  # the ring goes round
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}  # what a number of a dtype may be off by


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The operators of hopper_instructions.cu."""
    folder = tmp_path_factory.mktemp("hopper")
    abi, cuda, emulation = EMULATOR_SOURCES
    operators = Path(__file__).with_name("hopper_instructions.cu")
    for path in (*abi.iterdir(), *cuda.glob("*.h"), *emulation.iterdir(), operators):
        shutil.copy(path, folder)
    return Emulator(built(emulator_target((folder,))), "emulator")


def stored(x: np.ndarray, dtype: str) -> tuple[np.ndarray | BFloat16, np.ndarray]:
    """Numbers as a kernel takes them, and as fp32."""
    if dtype == "float16":
        return x.astype(np.float16), x.astype(np.float16).astype(np.float32)
    return BFloat16(rounded(x)), widened(rounded(x))


@pytest.mark.parametrize("at", [(0, 0, 0, 0), (64, 2, 5, 1), (64, 1, 90, 0), (0, 1, -3, 1), (0, 0, 200, 1)])
def test_a_box_lands_swizzled_with_zeros_outside_the_tensor(instructions, at):
    """16 bytes c of row r lie at c ^ (r % 8)."""
    x = np.arange(1, 2 * 100 * 3 * 128 + 1, dtype=np.uint32).astype(np.uint16).reshape(2, 100, 3, 128)
    for seed in range(3):
        instructions.seed(seed)
        found = np.full((32, 64), 7, np.uint16)
        instructions.call("copy_one_box", BFloat16(x), np.array(at, np.int32), outputs=[BFloat16(found)])
        column, head, row, batch = at
        wanted = np.zeros((32, 8, 8), np.uint16)
        for r in range(32):
            if 0 <= row + r < 100:
                pieces = x[batch, row + r, head, column : column + 64].reshape(8, 8)
                wanted[r, np.arange(8) ^ r % 8] = pieces
        np.testing.assert_array_equal(found, wanted.reshape(32, 64))


def test_a_phase_that_awaits_more_bytes_than_come_is_found(instructions):
    x, found = np.ones((1, 32, 1, 64), np.uint16), np.empty((32, 64), np.uint16)
    with pytest.raises(KernelError, match="waits for ever: a barrier in shared memory"):
        instructions.call("copy_one_box_of_more_bytes", BFloat16(x), np.zeros(4, np.int32), outputs=[BFloat16(found)])


@pytest.mark.parametrize(("name", "dtype", "width", "transposed"), [
    ("k_major_64", "bfloat16", 64, False), ("k_major_128", "float16", 128, False),
    ("mn_major_64", "float16", 64, True), ("mn_major_128", "bfloat16", 128, True),
    ("k_major_64_registers", "float16", 64, False), ("mn_major_128_shared", "bfloat16", 128, True),
])
def test_a_warpgroups_product_is_numpys(instructions, name, dtype, width, transposed):
    rng = np.random.default_rng(0)
    left, wide_left = stored(rng.standard_normal((64, 128), np.float32), dtype)
    shape = (128, width) if transposed else (width, 128)
    right, wide_right = stored(rng.standard_normal(shape, np.float32), dtype)
    before = rng.standard_normal((64, width), np.float32)
    found = before.copy()
    instructions.call(name, left, right, outputs=[found])
    product = wide_left.astype(np.float64) @ (wide_right if transposed else wide_right.T)
    assert relative(found, before + product) < 1e-6


def output(shape: tuple[int, ...], dtype: str) -> np.ndarray | BFloat16:
    """An array for a kernel to write, full of sevens that would show."""
    return BFloat16(np.full(shape, 7, np.uint16)) if dtype == "bfloat16" else np.full(shape, 7, np.float16)


def read(x: np.ndarray | BFloat16) -> np.ndarray:
    """A kernel's numbers as fp32."""
    return widened(x.bits) if isinstance(x, BFloat16) else x.astype(np.float32)


def attend(emulator: Emulator, case: oracle.Case, q, k, v, dtype: str):
    """out and lse, as the kernel writes them."""
    out, lse = output(read(q).shape, dtype), np.full((case.batch, case.heads, case.q_len), 7, np.float32)
    emulator.call("attention_hopper_forward", q, k, v, *settings(case), outputs=[out, lse])
    return out, lse


def check(emulator: Emulator, case: oracle.Case, dtype: str) -> None:
    """Compare every batch row and head with fp64, and the bits at several orders of the threads with each other."""
    (q, k, v, dout), (wide_q, wide_k, wide_v, wide_dout) = zip(*(stored(x, dtype) for x in case.tensors()), strict=True)
    problem = case.ranges, case.bias, case.prefix
    wanted, wanted_lse = oracle.attention(wide_q, wide_k, wide_v, *problem)
    gradients = oracle.attention_gradients(wide_q, wide_k, wide_v, *problem, wide_dout)
    found = []
    for seed in range(3):
        emulator.seed(seed)
        out, lse = attend(emulator, case, q, k, v, dtype)
        grads = [output(read(x).shape, dtype) for x in (q, k, v)]
        emulator.call("attention_hopper_backward", q, k, v, *settings(case), out, lse, dout, outputs=grads)
        found.append([read(out), lse, *map(read, grads)])
    np.testing.assert_allclose(lse, wanted_lse, atol=2e-6 * max(1, np.abs(wanted_lse).max()))
    for array, reference in zip([found[0][0], *found[0][2:]], [wanted, *gradients], strict=True):
        for b in range(case.batch):
            for head in range(array.shape[2]):
                off = array[b, :, head] - reference[b, :, head]
                assert (np.linalg.norm(off) < 2 * ROUNDING[dtype] * np.linalg.norm(reference[b, :, head])
                        or np.abs(off).max() < ROUNDING[dtype] / 4), (b, head)
    for other in found[1:]:
        for array, first in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(array, first)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", CASES)
def test_attention(emulator, name, dtype):
    check(emulator, CASES[name], dtype)


@pytest.mark.parametrize("seed", range(6))
def test_attention_of_any_ranges(emulator, seed):
    """Ranges in no order, overlapping, backwards, empty; the ring of tiles goes round several times."""
    rng = np.random.default_rng(seed)
    batch, kv_heads, group, dim = rng.integers(1, 3), rng.integers(1, 3), rng.integers(1, 3), (64, 128)[seed % 2]
    q_len, k_len = rng.integers(1, 300), rng.integers(2, 500)
    ranges = rng.integers(0, k_len + 1, (rng.choice([1, batch]), q_len, 2)).astype(np.int32)
    ranges[:, : rng.integers(q_len)] = rng.choice([0, k_len])  # queries that see the prefix, if that
    heads = kv_heads * group
    bias = (8 * rng.standard_normal((rng.choice([1, batch]), heads, k_len))).astype(np.float32) if seed % 3 else None
    prefix = rng.choice([0, rng.integers(k_len)])
    check(emulator, oracle.Case(batch, q_len, k_len, heads, kv_heads, dim, ranges, bias, prefix), "bfloat16")


@pytest.mark.parametrize(("q_len", "k_len"), [(130, 700), (700, 130)])
def test_full_attention_over_many_tiles(emulator, q_len, k_len):
    check(emulator, oracle.Case(1, q_len, k_len, 1, 1, 128, oracle.full_ranges(q_len, k_len)), "float16")


@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min, -1e30])
def test_a_bias_may_hide_keys(emulator, lowest):
    """As an additive mask would: some keys of one head, all of another, which gives 0."""
    bias = np.zeros((1, 2, 150), np.float32)
    bias[:, 0, :100] = bias[:, 1] = lowest
    case = oracle.Case(1, 70, 150, 2, 2, 64, oracle.full_ranges(70, 150), bias)
    (q, k, v, dout), wide = zip(*(stored(x, "bfloat16") for x in case.tensors()), strict=True)
    out, lse = attend(emulator, case, q, k, v, "bfloat16")
    grads = [output(read(x).shape, "bfloat16") for x in (q, k, v)]
    emulator.call("attention_hopper_backward", q, k, v, *settings(case), out, lse, dout, outputs=grads)
    shown = np.array([[[100, 150]]], np.int32).repeat(70, 1)
    wanted = [oracle.attention(*wide[:3], shown)[0], *oracle.attention_gradients(*wide[:3], shown, None, 0, wide[3])]
    for found, reference in zip(map(read, [out, *grads]), wanted, strict=True):
        assert relative(found[:, :, 0], reference[:, :, 0]) < 2 * ROUNDING["bfloat16"]
        assert not found[:, :, 1].any()
    assert not lse[:, 1].any()


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_an_output_that_begins_between_multiples_of_16_bytes_is_refused(emulator, name):
    case = CASES["causal"]
    (q, k, v, dout), _ = zip(*(stored(x, "float16") for x in case.tensors()), strict=True)
    outputs = {each: np.empty(q.shape, np.float16) for each in ("out", "dq", "dk", "dv")}
    room = np.zeros(q.size + 8, np.float16)
    begin = (2 - room.ctypes.data) % 16 // 2
    outputs[name] = room[begin : begin + q.size].reshape(q.shape)
    out, *grads = outputs.values()
    lse = np.zeros((case.batch, case.heads, case.q_len), np.float32)
    with pytest.raises(KernelError, match=f": {name}: it does not begin at a multiple of 16 bytes"):
        if name == "out":
            emulator.call("attention_hopper_forward", q, k, v, *settings(case), outputs=[out, lse])
        else:
            emulator.call("attention_hopper_backward", q, k, v, *settings(case), q, lse, dout, outputs=grads)


def test_other_widths_and_dtypes_are_refused(emulator):
    case = oracle.cases()["head_dim 96"]
    tensors = [stored(x, "bfloat16")[0] for x in case.tensors()[:3]]
    with pytest.raises(KernelError, match="attention_hopper_forward: q: its heads are neither 64 nor 128 wide"):
        attend(emulator, case, *tensors, "bfloat16")
    q, k, v, _ = CASES["causal"].tensors()
    with pytest.raises(KernelError, match=r"attention_hopper_forward: q: .*bfloat16 and float16.*attention_forward"):
        attend(emulator, CASES["causal"], q, k, v, "bfloat16")
