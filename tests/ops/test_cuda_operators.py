"""The operators for a GPU, with the kernels' emulator in place of its library: the arguments of both are the same.

`TestAttention` is that of the other backends, run again.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_operators import TestAttention, check, normal, tensors  # noqa: F401  collected here too

from llm_core import kernels, ops


@pytest.fixture(scope="session")
def emulated() -> kernels.Emulator:
    return kernels.emulator()


@pytest.fixture
def core_ops(emulated, monkeypatch):
    """The operators for a GPU, in GRAPH_MODE."""
    import mindspore as ms

    from llm_core.ops import cuda

    monkeypatch.setattr(kernels, "cuda_library", lambda: emulated)
    ms.set_context(mode=ms.GRAPH_MODE)
    return cuda


def masked(operators, **attention):
    """Cell(q, k, v), causal, with heads of 64."""
    from mindspore import nn

    class Causal(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.mask, self.attention = operators.AttentionMask(4, 64), operators.Attention(64, **attention)

        def construct(self, q, k, v):
            return self.attention(q, k, v, self.mask(q.shape[0], q.shape[1], k.shape[1]))

    return Causal()


def value_and_gradients(cell, inputs, sens) -> list[np.ndarray]:
    import mindspore as ms

    gradients = ms.ops.GradOperation(get_all=True, sens_param=True)(cell)(*inputs, sens)
    return [x.asnumpy() for x in (cell(*inputs), *gradients)]


def test_bfloat16_is_the_tensor_cores(core_ops):
    """The same up to bfloat16's precision, and not the same: float32 in and out, bfloat16 in between."""
    from llm_core.ops import reference

    *inputs, sens = tensors([normal(2, 70, 4, 64), *(normal(2, 70, 2, 64) for _ in range(2)), normal(2, 70, 4, 64)])
    exact = value_and_gradients(masked(reference), inputs, sens)
    for bf16, lowest, highest in ((True, 1e-4, 1e-2), (False, 0, 1e-5)):
        found = value_and_gradients(masked(core_ops, bf16=bf16), inputs, sens)
        for name, ours, theirs in zip("out dq dk dv".split(), found, exact, strict=True):
            assert ours.dtype == np.float32 and ours.shape == theirs.shape
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            assert lowest <= error < highest, (bf16, name)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("columns", [[4], [2, 3, 4]])
def test_cached_attention_is_the_references(core_ops, columns, with_bias):
    from mindspore import Tensor

    from llm_core.ops import reference

    q, k, v = normal(2, len(columns), 4, 16), normal(4, 7, 16), normal(4, 7, 16)
    bias = Tensor(normal(2, 4, 7) * 3) if with_bias else None
    results = []
    for operators in (core_ops, reference):
        mask = operators.CacheMask(16)(*tensors([np.array(x, np.int32) for x in (columns, [2, 0])]), 7, bias)
        results.append(operators.CachedAttention(16)(*tensors([q, k, v]), mask).asnumpy())
    np.testing.assert_allclose(*results, atol=1e-5)


def test_what_the_kernels_do_not_take_is_the_references(core_ops):
    from llm_core.ops import reference

    for dim, dropout in ((129, False), (64, True)):
        assert isinstance(core_ops.Attention(dim, dropout), reference.Attention)
        assert isinstance(core_ops.AttentionMask(4, dim, dropout=dropout), reference.AttentionMask)
    assert isinstance(core_ops.CachedAttention(129), reference.CachedAttention)
    assert isinstance(core_ops.CacheMask(129), reference.CacheMask)
    assert not isinstance(core_ops.Attention(128), reference.Attention)
    assert set(core_ops.__all__) == set(reference.__all__)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """MindSpore says that it runs on a GPU; the choice of operators is made anew."""
    import mindspore as ms

    monkeypatch.delenv("KERNELS", raising=False)
    monkeypatch.setattr(ms, "get_context", lambda name: "GPU")
    monkeypatch.setattr(ops, "backend", ops._choose)


def test_a_gpu_gets_them_and_the_log_says_so(core_ops, on_a_gpu, emulated):
    chosen = ops.backend()
    assert (chosen.name, chosen.operators, chosen.library) == ("cuda", core_ops, emulated.path)
    line = ops.describe(head_dim=256, attention_dropout=0.0, bf16=True)
    assert line == ("kernels: cuda (CUDA kernels, not verified on a device); attention: reference, since head_dim 256 "
                    "is above 128; products: float32, since only attention has kernels for bfloat16")


@pytest.mark.parametrize(("variable", "value", "reason"), [
    ("KERNELS", "reference", "KERNELS=reference"),
    ("NVCC", "no-such-nvcc", "NVCC=no-such-nvcc: there is no such compiler"),
])
def test_without_kernels_the_reference_runs_and_says_why(on_a_gpu, monkeypatch, variable, value, reason):
    monkeypatch.setenv(variable, value)
    kernels.cuda_library.cache_clear()
    line = ops.describe(head_dim=64, attention_dropout=0.0, bf16=False)
    assert line == f"kernels: reference ({reason})"
