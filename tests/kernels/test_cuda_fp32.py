"""The CUDA kernels for fp32 tensors, on the emulator, against attention in fp64: FlashAttention-1, -2, and 3xTF32."""

from __future__ import annotations

import attention_oracle as oracle
import numpy as np
import pytest
from elementwise import placed
from small_gpu import small_gpu
from test_attention import NONE, backward, forward

from llm_core.kernels import KernelError

CASES = {name: case for name, case in oracle.cases().items() if case.dim <= 128}
FORWARD = ["attention_forward", "attention_v1_forward", "attention_rows_forward", "attention_forward_tf32"]
BACKWARD = {name: name.replace("forward", "backward") for name in FORWARD if "rows" not in name}


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest over batch items and heads of the error's norm over the norm of what is wanted: [B, S, H, D] each.

    Gradients may be 0 but for rounding, that of numbers near 1: no norm counts as less than that of numbers of 0.1.
    """
    error, size = (np.linalg.norm(x, axis=(1, 3)) for x in (found - wanted, wanted))
    return float((error / np.maximum(size, 0.1 * np.sqrt(wanted.shape[1] * wanted.shape[3]))).max())


def check(found: list[np.ndarray], case: oracle.Case, tensors: tuple[np.ndarray, ...]) -> None:
    """out and lse, then dq, dk and dv if they are there, against fp64."""
    *qkv, dout = tensors
    out, lse = oracle.attention(*qkv, case.ranges, case.bias, case.prefix)
    assert distance(found[0], out) < 2e-6
    np.testing.assert_allclose(found[1], lse, atol=1e-5, rtol=1e-6)
    if found[2:]:
        wanted = oracle.attention_gradients(*qkv, case.ranges, case.bias, case.prefix, dout)
        for what, gradient, right in zip(("dq", "dk", "dv"), found[2:], wanted, strict=True):
            assert distance(gradient, right) < 4e-6, what


def run(emulator, case: oracle.Case, tensors: tuple[np.ndarray, ...], name: str) -> list[np.ndarray]:
    """out, lse, and where the kernel has a backward, dq, dk, dv."""
    *qkv, dout = tensors
    found = forward(emulator, case, *qkv, name)
    gradients = backward(emulator, case, *qkv, *found, dout, BACKWARD[name]) if name in BACKWARD else ()
    return [*found, *gradients]


@pytest.mark.parametrize("kernel", ["attention_forward", "attention_forward_tf32"])
def test_a_long_row_does_not_drift(emulator, kernel):
    """128 blocks of keys, most of which leave the maximum as it is: what has been summed must stay as it is, too,
    though a fused multiply-add finds another difference between two equal numbers than 0."""
    case = oracle.Case(1, 8, 8192, 1, 1, 64, oracle.full_ranges(8, 8192))
    q, *others = case.tensors()
    tensors = (8 * q, *others)  # the difference grows with the scores
    check(list(forward(emulator, case, *tensors[:3], kernel)), case, tensors)


@pytest.mark.parametrize("kernel", FORWARD)
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_any_order_of_threads(emulator, name, kernel):
    case = CASES[name]
    tensors = case.tensors()
    results = []
    for seed in range(2):
        emulator.seed(seed)
        results.append(run(emulator, case, tensors, kernel))
    check(results[0], case, tensors)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kernel", FORWARD)
@pytest.mark.parametrize("seed", range(4))
def test_any_ranges(emulator, seed, kernel):
    case = oracle.any_case(seed)
    tensors = case.tensors(seed)
    emulator.seed(seed)
    check(run(emulator, case, tensors, kernel), case, tensors)


@pytest.mark.parametrize("kernel", FORWARD)
@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min, -1e6])
def test_a_bias_may_hide_keys(emulator, lowest, kernel):
    """As an additive mask would: what is left is attention over the other keys, and 0 for a query with none."""
    case = oracle.Case(1, 50, 50, 2, 2, 32, oracle.causal_ranges(50, 50), np.zeros((1, 2, 50), np.float32))
    case.bias[..., :9] = lowest
    others = oracle.Case(1, 50, 50, 2, 2, 32, oracle.causal_ranges(50, 50, kv_start=(9,)))
    tensors = case.tensors()
    if lowest > -1e29:  # a mere number: the first queries attend to what they see
        tensors[3][:, :9] = 0
    found = run(emulator, case, tensors, kernel)
    if lowest > -1e29:
        found[0][:, :9], found[1][..., :9] = 0, 0
    check(found, others, tensors)


@pytest.mark.parametrize("kernel", FORWARD)
def test_arrays_may_begin_anywhere(emulator, kernel):
    case = CASES["bias of each row"]
    tensors = case.tensors()
    wanted = run(emulator, case, tensors, kernel)
    moved = tuple(placed(x, offset) for x, offset in zip(tensors, (4, 36, 8, 20), strict=True))
    for found, right in zip(run(emulator, case, moved, kernel), wanted, strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("kernel", FORWARD)
def test_what_lies_outside_the_keys_is_cut_off(emulator, kernel):
    """Ranges and prefix are on the device and cannot be checked before the launch."""
    case = CASES["full"]
    outside = oracle.Case(2, 64, 64, 2, 2, 64, np.tile(np.array([-5, 99], np.int32), (1, 64, 1)), prefix=-3)
    tensors = case.tensors()
    check(run(emulator, outside, tensors, kernel), case, tensors)


@pytest.mark.parametrize("kernel", BACKWARD)
def test_a_nan_comes_out_as_one_and_in_no_other_query(emulator, kernel):
    case = CASES["causal long"]
    tensors = case.tensors()
    tensors[0][0, 100, 0, 3] = np.nan
    out, lse, dq, dk, dv = run(emulator, case, tensors, kernel)
    for spoilt in (out[0, 100], dq[0, 100], lse[0, 0, 100], dk[0, :101], dv[0, :101]):
        assert np.isnan(spoilt).all()
    for good in (np.delete(out, 100, 1), np.delete(dq, 100, 1), np.delete(lse, 100, 2)):
        assert np.isfinite(good).all()


@pytest.mark.parametrize("kernel", FORWARD)
def test_large_scores_do_not_overflow(emulator, kernel):
    case = oracle.Case(1, 80, 80, 2, 1, 64, oracle.causal_ranges(80, 80), 1000 * oracle.alibi_like(2, 80))
    tensors = case.tensors()
    out, lse, *gradients = run(emulator, case, tensors, kernel)
    wanted, wanted_lse = oracle.attention(*tensors[:3], case.ranges, case.bias)
    assert distance(out, wanted) < 1e-4
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("kernel", [*FORWARD, *BACKWARD.values()])
def test_wrong_arguments_are_named(emulator, kernel):
    def refusal(dtype=np.float32, heads=2, kv_heads=2, dim=8) -> str:
        q, k = np.zeros((1, 5, heads, dim), dtype), np.zeros((1, 5, kv_heads, dim), dtype)
        case = oracle.Case(1, 5, 5, heads, kv_heads, dim, oracle.causal_ranges(5, 5))
        with pytest.raises(KernelError) as error:
            if kernel in FORWARD:
                forward(emulator, case, q, k, k, kernel)
            else:
                backward(emulator, case, q, k, k, q, np.zeros((1, heads, 5), np.float32), q, kernel)
        return str(error.value)

    assert refusal(dim=129).startswith(f"{kernel}: q: its heads are wider than 128, the most")
    assert refusal(heads=3).startswith(f"{kernel}: k: its number of heads must divide")
    assert refusal(dtype=np.float64).startswith(f"{kernel}: q: ")
    assert "float32" in refusal(dtype=np.float64)
    if "_tf32" in kernel or "v1" in kernel or "rows" in kernel:
        assert "call attention_forward and attention_backward" in refusal(dtype=np.float16)


def test_a_gpu_with_little_shared_memory_is_named(emulator):
    """A block of the fp32 kernels at D 128 finds no room in 99 KB."""
    case = oracle.Case(1, 5, 5, 1, 1, 128, oracle.causal_ranges(5, 5))
    with small_gpu(emulator), pytest.raises(KernelError, match=(
            r"needs \d{6} bytes of shared memory .* 101376 .*A100.*KERNELS=reference")):
        forward(emulator, case, *case.tensors()[:3])


def test_none_means_no_bias(emulator):
    case = CASES["causal"]
    q, k, v, _ = case.tensors()
    out = np.empty_like(q)
    lse = np.empty((case.batch, case.heads, case.q_len), np.float32)
    with pytest.raises(KernelError, match="bias: expected float32"):
        emulator.call("attention_forward", q, k, v, case.ranges, np.zeros((1, 2, 63), np.float32),
                      np.zeros(1, np.int32), outputs=[out, lse])
    emulator.call("attention_forward", q, k, v, case.ranges, NONE, np.zeros(1, np.int32), outputs=[out, lse])
    np.testing.assert_array_equal(out, forward(emulator, case, q, k, v)[0])
