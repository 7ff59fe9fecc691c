"""FlashAttention-2 and attention over a cache, on every instruction set, against attention in fp64."""

from __future__ import annotations

import attention_oracle as oracle
import numpy as np
import pytest
from bfloat16 import rounded, widened
from elementwise import relative
from openmp_threads import for_thread_counts

from llm_core.kernels import BFloat16, KernelError

CASES = oracle.cases()
NONE = np.zeros(1, np.float32)


def settings(case: oracle.Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return case.ranges, NONE if case.bias is None else case.bias, np.array([case.prefix], np.int32)


def forward(kernels, case: oracle.Case, q, k, v, name: str = "attention_forward") -> tuple[np.ndarray, np.ndarray]:
    out, lse = np.full_like(q, 7), np.full((case.batch, case.heads, case.q_len), 7, np.float32)
    kernels.call(name, q, k, v, *settings(case), outputs=[out, lse])
    return out, lse


def backward(kernels, case: oracle.Case, q, k, v, out, lse, dout, name: str = "attention_backward"):
    grads = np.full_like(q, 7), np.full_like(k, 7), np.full_like(v, 7)
    kernels.call(name, q, k, v, *settings(case), out, lse, dout, outputs=grads)
    return grads


@pytest.mark.parametrize("name", CASES)
def test_fp32(kernels, name):
    case = CASES[name]
    q, k, v, dout = case.tensors()
    out, lse = forward(kernels, case, q, k, v)
    wanted, wanted_lse = oracle.attention(q, k, v, case.ranges, case.bias, case.prefix)
    assert relative(out, wanted) < 1e-6
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-5)
    grads = backward(kernels, case, q, k, v, out, lse, dout)
    wanted = oracle.attention_gradients(q, k, v, case.ranges, case.bias, case.prefix, dout)
    for found, gradient in zip(grads, wanted, strict=True):
        assert relative(found, gradient) < 2e-6 or np.abs(found - gradient).max() < 1e-6


@pytest.mark.parametrize("seed", range(12))
def test_any_ranges(kernels, seed):
    case = oracle.any_case(seed)
    q, k, v, dout = case.tensors(seed)
    out, lse = forward(kernels, case, q, k, v)
    wanted, wanted_lse = oracle.attention(q, k, v, case.ranges, case.bias, case.prefix)
    assert relative(out, wanted) < 2e-6
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-5)
    wanted = oracle.attention_gradients(q, k, v, case.ranges, case.bias, case.prefix, dout)
    for found, gradient in zip(backward(kernels, case, q, k, v, out, lse, dout), wanted, strict=True):
        assert relative(found, gradient) < 4e-6


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_products_of_fp32_tensors(isa, kernels, name):
    case = CASES[name]
    q, k, v, dout = case.tensors()
    if isa != "avx512_bf16":
        with pytest.raises(KernelError, match="needs AVX512_BF16"):
            forward(kernels, case, q, k, v, "attention_forward_bf16")
        return
    out, lse = forward(kernels, case, q, k, v, "attention_forward_bf16")
    assert relative(out, oracle.attention(q, k, v, case.ranges, case.bias, case.prefix)[0]) < 1e-2
    grads = backward(kernels, case, q, k, v, out, lse, dout, "attention_backward_bf16")
    wanted = oracle.attention_gradients(q, k, v, case.ranges, case.bias, case.prefix, dout)
    for found, gradient in zip(grads, wanted, strict=True):
        assert relative(found, gradient) < 2e-2 or np.abs(found - gradient).max() < 1e-2


@pytest.mark.parametrize("name", ["causal long", "packed documents", "grouped", "head_dim 80", "odd width", "prefix"])
def test_bfloat16_storage(kernels, name):
    case = CASES[name]
    bits = [rounded(x) for x in case.tensors()]
    q, k, v, dout = (widened(x) for x in bits)
    stored = [BFloat16(x) for x in bits]
    out, lse = BFloat16(np.empty_like(bits[0])), np.empty((case.batch, case.heads, case.q_len), np.float32)
    kernels.call("attention_forward", *stored[:3], *settings(case), outputs=[out, lse])
    assert relative(widened(out.bits), oracle.attention(q, k, v, case.ranges, case.bias, case.prefix)[0]) < 1e-2
    grads = [BFloat16(np.empty_like(x)) for x in bits[:3]]
    kernels.call("attention_backward", *stored[:3], *settings(case), out, lse, stored[3], outputs=grads)
    wanted = oracle.attention_gradients(q, k, v, case.ranges, case.bias, case.prefix, dout)
    for found, gradient in zip(grads, wanted, strict=True):
        assert relative(widened(found.bits), gradient) < 1e-2


@pytest.mark.parametrize("name", ["bias of each row", "packed documents", "grouped", "queries that see nothing"])
def test_the_oracles_gradients_are_finite_differences(name):
    case = CASES[name]
    q, k, v, dout = (x.astype(np.float64) for x in case.tensors())
    wanted = oracle.attention_gradients(q, k, v, case.ranges, case.bias, case.prefix, dout)
    rng = np.random.default_rng(1)
    for position, gradient in enumerate(wanted):
        direction = rng.standard_normal(gradient.shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = [q, k, v]
            moved[position] = moved[position] + step * direction
            values.append((oracle.attention(*moved, case.ranges, case.bias, case.prefix)[0] * dout).sum())
        assert (values[0] - values[1]) / 2e-5 == pytest.approx((gradient * direction).sum(), rel=1e-6, abs=1e-6)


def test_the_number_of_threads_changes_no_bit(kernels):
    case = oracle.Case(2, 700, 700, 6, 2, 64, oracle.causal_ranges(700, 700))
    q, k, v, dout = case.tensors()

    def run():
        out, lse = forward(kernels, case, q, k, v)
        return [out, lse, *backward(kernels, case, q, k, v, out, lse, dout)]

    one, *others = for_thread_counts(kernels, run)
    for other in others:
        for first, second in zip(one, other, strict=True):
            assert np.array_equal(first, second)


@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min, -1e6])
def test_a_bias_may_hide_keys(kernels, lowest):
    """As an additive mask would: what is left is attention over the other keys; a query with none gets 0."""
    case = oracle.Case(1, 50, 50, 2, 2, 32, oracle.causal_ranges(50, 50), np.zeros((1, 2, 50), np.float32))
    case.bias[..., :9] = lowest
    q, k, v, dout = case.tensors()
    out, lse = forward(kernels, case, q, k, v)
    seen = oracle.causal_ranges(50, 50, kv_start=(9,))
    first = 9 if lowest > -1e29 else 0  # a bias that is a mere number leaves the first queries what they have
    assert relative(out[:, first:], oracle.attention(q, k, v, seen)[0][:, first:]) < 1e-6
    dout[:, :first] = 0
    grads = backward(kernels, case, q, k, v, out, lse, dout)
    for found, gradient in zip(grads, oracle.attention_gradients(q, k, v, seen, None, 0, dout), strict=True):
        assert relative(found, gradient) < 3e-6


def test_scores_far_apart_neither_overflow_nor_vanish(kernels):
    case = CASES["causal long"]
    q, k, v, _ = case.tensors()
    out, lse = forward(kernels, case, 40 * q, 40 * k, v)
    wanted, wanted_lse = oracle.attention(40 * q, 40 * k, v, case.ranges)
    assert relative(out, wanted) < 1e-3  # scores of some thousands: fp32 itself keeps no more
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


def test_a_nan_comes_out_as_one(kernels):
    case = CASES["causal"]
    q, k, v, _ = case.tensors()
    k[0, 20, 0, 3] = np.nan
    out, _ = forward(kernels, case, q, k, v)
    assert np.isnan(out[0, 30, 0]).all()
    assert np.isfinite(out[0, :20, 0]).all() and np.isfinite(out[1]).all() and np.isfinite(out[:, :, 1]).all()


@pytest.mark.parametrize("tokens, start, cache, heads, kv_heads, dim, biased", [
    (1, 0, 64, 6, 2, 64, False),
    (1, 37, 64, 4, 1, 80, True),
    (1, 1500, 2048, 6, 2, 64, False),
    (3, 600, 1100, 2, 2, 7, True),
    (8, 5, 16, 3, 3, 32, False),
    (16, 0, 64, 6, 2, 64, True),
    (100, 300, 512, 4, 4, 128, False),
    (2, 600, 700, 4, 2, 33, True),
])  # fmt: skip
def test_cached(kernels, tokens, start, cache, heads, kv_heads, dim, biased):
    rng = np.random.default_rng(0)
    batch, kv_start = 5, np.array([0, 4, start, cache + 9, 2**31 - 1], np.int32)
    q = rng.standard_normal((batch, tokens, heads, dim), np.float32)
    k = rng.standard_normal((batch * kv_heads, cache, dim), np.float32)
    v = rng.standard_normal((batch * kv_heads, cache, dim), np.float32)
    columns = np.arange(start, start + tokens, dtype=np.int32)
    bias = rng.standard_normal((batch, heads, cache), np.float32) if biased else NONE
    k[:, start + tokens :] = np.nan  # what was never written must not be read
    v[:, start + tokens :] = np.nan
    out = np.full_like(q, 7)
    kernels.call("attention_cached", q, k, v, columns, kv_start, bias, outputs=[out])

    seen = start + tokens
    ranges = np.empty((batch, tokens, 2), np.int32)
    ranges[..., 0], ranges[..., 1] = kv_start[:, None], columns + 1
    ranges[..., 1] = np.maximum(ranges[..., 0], ranges[..., 1])
    inside = [x[:, :seen].reshape(batch, kv_heads, seen, dim).transpose(0, 2, 1, 3) for x in (k, v)]
    wanted, _ = oracle.attention(q, *inside, ranges, bias[..., :seen] if biased else None)
    assert relative(out, wanted) < 1e-6


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_the_number_of_threads_changes_no_bit_of_cached(kernels, tokens):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, tokens, 4, 64), np.float32)
    k, v = (rng.standard_normal((4, 1600, 64), np.float32) for _ in range(2))
    columns, out = np.arange(1500, 1500 + tokens, dtype=np.int32), np.empty_like(q)

    def run():
        kernels.call("attention_cached", q, k, v, columns, np.array([0, 700], np.int32), NONE, outputs=[out])
        return out.tobytes()

    assert len(set(for_thread_counts(kernels, run))) == 1


def test_wrong_arguments_are_named(kernels):
    case = CASES["causal"]
    q, k, v, _ = case.tensors()
    lse = np.empty((case.batch, case.heads, case.q_len), np.float32)

    def refusal(**changed) -> str:
        values = dict(q=q, k=k, v=v, ranges=case.ranges, bias=NONE, prefix=np.zeros(1, np.int32), out=np.empty_like(q))
        values.update(changed)
        *inputs, out = values.values()
        with pytest.raises(KernelError) as error:
            kernels.call("attention_forward", *inputs, outputs=[out, lse])
        return str(error.value)

    assert "attention_forward: v: expected float32 [B=2, Sk=64, K=2, D=64]" in refusal(v=v[:, :-1].copy())
    assert "k: its number of heads must divide" in refusal(k=np.repeat(k, 2, 2)[:, :, :3].copy(),
                                                           v=np.repeat(v, 2, 2)[:, :, :3].copy())
    assert "ranges: a key outside" in refusal(ranges=case.ranges + 1)
    assert "ranges: expected int32" in refusal(ranges=case.ranges.astype(np.float32))
    assert "ranges: its first size" in refusal(ranges=np.repeat(case.ranges, 3, 0))
    assert "bias: expected float32 [P, H=2, Sk=64], got float32 [1, 2, 63]" in refusal(bias=np.zeros((1, 2, 63), "f"))
    assert "prefix: outside" in refusal(prefix=np.array([65], np.int32))
    assert "out: expected" in refusal(out=np.empty((1, 64, 2, 64), np.float32))


@pytest.mark.parity
@pytest.mark.parametrize("causal", [True, False])
def test_as_accurate_as_torch(isa, kernels, causal):
    torch = pytest.importorskip("torch")
    length, heads, dim = 600, 2, 64
    ranges = oracle.causal_ranges(length, length) if causal else oracle.full_ranges(length, length)
    case = oracle.Case(1, length, length, heads, heads, dim, ranges)
    q, k, v, dout = case.tensors()
    out, lse = forward(kernels, case, q, k, v)
    grads = backward(kernels, case, q, k, v, out, lse, dout)
    leaves = [torch.from_numpy(x).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
    their_grads = torch.autograd.grad(theirs, leaves, torch.from_numpy(dout).transpose(1, 2))
    wanted = [oracle.attention(q, k, v, ranges)[0], *oracle.attention_gradients(q, k, v, ranges, None, 0, dout)]
    for ours, other, exact in zip([out, *grads], [theirs, *their_grads], wanted, strict=True):
        error_of_torch = relative(other.detach().transpose(1, 2).numpy(), exact)
        # the plain path has no fused multiply-add: each product is rounded once more
        assert relative(ours, exact) <= (1.2 if isa == "plain" else 1.1) * error_of_torch
