"""Every operator of every backend against float64 numpy: values, and gradients by central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

RANDOM = np.random.RandomState(3)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def tensors(arrays):
    from mindspore import Tensor

    return [Tensor(a) for a in arrays]


def check(cell, oracle, *inputs: np.ndarray, constants: tuple = (), tolerance: float = 1e-5) -> None:
    """The cell's value and its gradients to `inputs` are the oracle's; `constants` follow the inputs."""
    import mindspore as ms
    from mindspore import nn

    class ValueAndGradients(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.cell = cell
            self.gradient = ms.ops.GradOperation(get_all=True, sens_param=True)

        def construct(self, sens, *args):
            return self.cell(*args), self.gradient(self.cell)(*args, sens)

    wide = [a.astype(np.float64) for a in inputs]
    expected = oracle(*wide, *constants)
    sens = normal(*np.shape(expected))
    value, gradients = ValueAndGradients()(tensors([sens])[0], *tensors([*inputs, *constants]))
    value = value.asnumpy()
    assert value.shape == np.shape(expected)
    assert np.linalg.norm(value - expected) <= tolerance * np.linalg.norm(expected)
    for i, gradient in enumerate(gradients[: len(inputs)]):
        direction, h = normal(*inputs[i].shape).astype(np.float64), 1e-5
        ends = [oracle(*wide[:i], wide[i] + s * h * direction, *wide[i + 1 :], *constants) for s in (1, -1)]
        slope = ((ends[0] - ends[1]) * sens).sum() / (2 * h)
        ours = (gradient.asnumpy().astype(np.float64) * direction).sum()
        size = np.linalg.norm(gradient.asnumpy()) * np.linalg.norm(direction)
        assert abs(ours - slope) <= 1e-5 * size, f"gradient of input {i}"


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_rms_norm(core_ops):
    def oracle(x, w):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w

    check(core_ops.RmsNorm(1e-5), oracle, normal(7, 48) * 3, normal(48))


def test_layer_norm(core_ops):
    def oracle(x, w, b):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w + b

    check(core_ops.LayerNorm(1e-5), oracle, normal(7, 48) * 3 + 5, normal(48), normal(48))


def test_gelu_is_the_erf_form(core_ops):
    erf = np.vectorize(math.erf)
    check(core_ops.Gelu(), lambda x: x * (1 + erf(x / math.sqrt(2))) / 2, normal(5, 33) * 2)


def test_swiglu(core_ops):
    check(core_ops.SwiGlu(), lambda g, u: g / (1 + np.exp(-g)) * u, normal(5, 33) * 2, normal(5, 33))


def test_rope_turns_pairs(core_ops):
    from mindspore import nn, ops

    angles = RANDOM.uniform(-3, 3, (1, 6, 1, 4))
    cos = np.concatenate([np.cos(angles)] * 2, -1).astype(np.float32)
    sin = np.concatenate([-np.sin(angles), np.sin(angles)], -1).astype(np.float32)

    def oracle(q, k, cos, sin):
        x = np.concatenate([q, k], 2)
        turned = (x[..., :4] + 1j * x[..., 4:]) * (cos[..., :4].astype(np.float64) + 1j * sin[..., 4:])
        return np.concatenate([turned.real, turned.imag], -1)

    class Joined(nn.Cell):
        """Both results in one tensor."""

        def __init__(self):
            super().__init__(auto_prefix=False)
            self.rope = core_ops.Rope()

        def construct(self, q, k, cos, sin):
            return ops.concat(self.rope(q, k, cos, sin), 2)

    check(Joined(), oracle, normal(2, 6, 3, 8), normal(2, 6, 1, 8), constants=(cos, sin))


class TestAttention:
    """Every argument of the attention contract, with grouped heads and Sk > Sq."""

    batch, q_len, k_len, heads, kv_heads, dim = 2, 5, 7, 4, 2, 6

    @pytest.fixture(autouse=True)
    def operators(self, core_ops):
        self.core_ops = core_ops

    def oracle(self, visible, bias=None, keep=None):
        """Attention over `visible` [B, Sq, Sk]."""

        def attention(q, k, v):
            group = self.heads // self.kv_heads
            k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
            scores = np.einsum("bqhd,bkhd->bhqk", q, k)
            if bias is not None:
                scores = scores + bias[:, :, None, :]
            scores = np.where(visible[:, None], scores / np.sqrt(self.dim), -np.inf)
            weights = softmax(scores)
            if keep is not None:
                weights = weights * keep.reshape(weights.shape)
            return np.einsum("bhqk,bkhd->bqhd", weights, v)

        return attention

    def cell(self, prefix=0, keep=None, **mask_arguments):
        from mindspore import Tensor, nn

        case = self

        class MaskedAttention(nn.Cell):
            def __init__(self):
                super().__init__(auto_prefix=False)
                self.mask = case.core_ops.AttentionMask(case.heads, case.dim, prefix, keep is not None)
                self.attention = case.core_ops.Attention(case.dim, keep is not None)
                self.names = ("kv_start", "kv_len", "cu_seqlens_q", "cu_seqlens_k", "bias")
                self.given = tuple(
                    Tensor(mask_arguments[n]) if n in mask_arguments else None for n in self.names
                )
                self.keep = None if keep is None else Tensor(keep)

            def construct(self, q, k, v):
                mask = self.mask(q.shape[0], q.shape[1], k.shape[1], *self.given)
                return self.attention(q, k, v, mask, self.keep)

        return MaskedAttention()

    def qkv(self, k_len=None):
        k_len = k_len or self.k_len
        q = normal(self.batch, self.q_len, self.heads, self.dim)
        return q, *(normal(self.batch, k_len, self.kv_heads, self.dim) for _ in range(2))

    def causal(self):
        rows, columns = np.arange(self.q_len)[:, None], np.arange(self.k_len)[None]
        visible = columns <= rows + self.k_len - self.q_len
        return np.broadcast_to(visible, (self.batch, self.q_len, self.k_len)).copy()

    def test_causal(self):
        check(self.cell(), self.oracle(self.causal()), *self.qkv())

    def test_rows_of_different_length(self):
        start, length = np.array([2, 0], np.int32), np.array([7, 6], np.int32)
        columns = np.arange(self.k_len)[None, None]
        visible = self.causal() & (columns >= start[:, None, None]) & (columns < length[:, None, None])
        check(self.cell(kv_start=start, kv_len=length), self.oracle(visible), *self.qkv())

    def test_packed_documents(self):
        cu = np.array([[0, 2, 5, 5], [0, 3, 4, 5]], np.int32)
        document = (np.arange(5)[None, :, None] >= cu[:, None]).sum(-1)
        visible = np.tril(np.ones((5, 5), bool)) & (document[:, :, None] == document[:, None])
        check(self.cell(cu_seqlens_q=cu, cu_seqlens_k=cu), self.oracle(visible), *self.qkv(5))

    def test_prefix_is_seen_by_all(self):
        start, prefix = np.array([3, 1], np.int32), 2
        columns = np.arange(self.k_len)[None, None] - prefix
        visible = self.causal() & (columns >= start[:, None, None]) | (columns < 0)
        check(self.cell(prefix=prefix, kv_start=start), self.oracle(visible), *self.qkv())

    @pytest.mark.parametrize("rows", [1, 2])
    def test_bias(self, rows):
        bias = normal(rows, self.heads, self.k_len)
        check(self.cell(bias=bias), self.oracle(self.causal(), bias), *self.qkv())

    def test_dropped_weights(self):
        shape = (self.batch * self.heads * self.q_len, self.k_len)
        keep = (RANDOM.uniform(size=shape) > 0.3).astype(np.float32) / np.float32(0.7)
        check(self.cell(keep=keep), self.oracle(self.causal(), keep=keep), *self.qkv())

    def test_row_without_keys_is_finite(self):
        out = self.cell(kv_start=np.array([7, 0], np.int32))(*tensors(self.qkv())).asnumpy()
        assert np.isfinite(out).all()


class TestTokenLoss:
    """TokenNll and LinearNll: value, gradients, and ignored rows."""

    labels = np.array([3, -100, 0, 10, -100, 7], np.int32)

    @pytest.fixture(autouse=True)
    def operators(self, core_ops):
        self.core_ops = core_ops

    def oracle(self, x, weight, labels):
        chosen = np.log(softmax(x @ weight.T))[np.arange(len(labels)), np.maximum(labels, 0)]
        return -(chosen * (labels >= 0)).sum()

    def loss_only(self, fused, training, frozen=False):
        from mindspore import nn

        operators = self.core_ops

        class Loss(nn.Cell):
            def __init__(self):
                super().__init__(auto_prefix=False)
                self.nll = operators.LinearNll(frozen=frozen) if fused else operators.TokenNll()
                self.product = operators.LinearProduct()
                self.set_train(training)

            def construct(self, x, weight, labels):
                if fused:
                    return self.nll(x, weight, labels)[0]
                return self.nll(self.product(x, weight), labels)[0]

        return Loss()

    @pytest.mark.parametrize(("fused", "training"), [(False, True), (True, True), (True, False)])
    def test_value_and_gradient(self, fused, training):
        loss = self.loss_only(fused, training)
        check(loss, self.oracle, normal(6, 9) * 2, normal(11, 9), constants=(self.labels,))

    @pytest.mark.parametrize("fused", [False, True])
    def test_ignored_rows_are_exactly_zero(self, fused):
        import mindspore as ms

        arguments = tensors([normal(6, 9), normal(11, 9), self.labels])
        gradient = ms.ops.GradOperation()(self.loss_only(fused, True))(*arguments).asnumpy()
        assert (gradient[self.labels < 0] == 0).all()
        assert (gradient[self.labels >= 0] != 0).any()

    @pytest.mark.parametrize("training", [True, False])
    def test_a_frozen_head_changes_neither_loss_nor_gradient(self, training):
        import mindspore as ms

        arguments = tensors([normal(6, 9), normal(11, 9), self.labels])
        cells = [self.loss_only(True, training, frozen) for frozen in (False, True)]
        plain, frozen = (cell(*arguments).asnumpy() for cell in cells)
        assert plain == frozen
        plain, frozen = (ms.ops.GradOperation()(cell)(*arguments).asnumpy() for cell in cells)
        np.testing.assert_array_equal(plain, frozen)

    def test_count_of_supervised_tokens(self):
        _, count = self.core_ops.LinearNll()(*tensors([normal(6, 9), normal(11, 9), self.labels]))
        assert float(count.asnumpy()) == 4


@pytest.mark.parametrize("vocab", [5, 64])
def test_embedding(core_ops, vocab):
    ids = np.array([4, 0, 4, 1, 4, 0], np.int32)

    check(core_ops.EmbeddingLookup(vocab), lambda table, ids: table[ids], normal(vocab, 12), constants=(ids,))


@pytest.mark.parametrize("rows", [1, 40])
def test_linear_product(core_ops, rows):
    check(core_ops.LinearProduct(), lambda x, weight: x @ weight.T, normal(rows, 12), normal(9, 12))


def test_squared_norm(core_ops):
    x = normal(37, 11)
    norm = core_ops.SquaredNorm()(*tensors([x])).asnumpy()
    assert norm.shape == ()
    assert abs(norm - (x.astype(np.float64) ** 2).sum()) <= 1e-6 * norm


@pytest.mark.parametrize("seed", range(6))
def test_ranges_are_the_visible_keys_of_the_reference(seed):
    """Random lengths, packings, starts and prefixes: both masks show every query the same keys."""
    import mindspore as ms

    from llm_core.ops import cpu, reference

    random = np.random.RandomState(seed)
    batch, q_len, prefix = random.randint(1, 4), random.randint(1, 9), 3 * random.randint(0, 2)
    k_len = q_len + prefix + random.randint(0, 6)
    given = {}
    if seed % 2:
        given["kv_start"] = random.randint(0, 4, batch)
    if seed % 3:
        given["kv_len"] = random.randint(k_len - prefix - 3, k_len - prefix + 1, batch)
    if seed > 2:  # documents, some empty, not all of the row
        for name, length in (("cu_seqlens_q", q_len), ("cu_seqlens_k", k_len - prefix)):
            given[name] = np.sort(random.randint(0, length + 1, (batch, 4)), 1)
            given[name][:, 0] = 0
    arguments = {name: ms.Tensor(values.astype(np.int32)) for name, values in given.items()}
    added = reference.AttentionMask(1, 4, prefix)(batch, q_len, k_len, **arguments).asnumpy()
    ranges, _, _ = cpu.AttentionMask(1, 4, prefix)(batch, q_len, k_len, **arguments)
    key = np.arange(k_len)
    seen = (key >= ranges.asnumpy()[..., :1]) & (key < ranges.asnumpy()[..., 1:]) | (key < prefix)
    assert np.array_equal(np.broadcast_to(seen, (batch, q_len, k_len)), added.reshape(batch, q_len, k_len) == 0)
