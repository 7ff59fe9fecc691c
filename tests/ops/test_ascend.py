"""The Ascend operators without an Ascend device: how they are called, and what would come out.

Values: every fused operator is replaced by a stand-in that computes what its document says, in the documented layout,
and refuses dtypes and shapes that the document does not allow. What the Cells make of it must be what the reference
computes, so that a wrong transposition, mask polarity or scale shows. Shapes: the real operators, as far as MindSpore
knows them without a device, that is, through its own inference while it compiles a graph.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest

RANDOM = np.random.RandomState(5)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def rounded(array: np.ndarray) -> np.ndarray:
    """To bfloat16 and back, so that both sides see the same inputs."""
    import mindspore as ms

    return ms.Tensor(array).astype(ms.bfloat16).astype(ms.float32).asnumpy()


@pytest.fixture
def ascend():
    from llm_core.ops import ascend

    return ascend


@pytest.fixture
def graph():
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture
def pynative(graph):
    import mindspore as ms

    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def bound(function, args, kwargs) -> SimpleNamespace:
    """The arguments by the names of the real operator; a TypeError if it does not take them."""
    arguments = inspect.signature(function).bind(*args, **kwargs)
    arguments.apply_defaults()
    return SimpleNamespace(**arguments.arguments)


def attend(q, k, v, hidden, shift, scale, shift_first):
    """What the documents of both attention operators say, in BNSD; NaN for a query from which all keys are hidden."""
    import mindspore as ms
    from mindspore import ops

    batch, heads, q_len, dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    assert q.dtype == k.dtype == v.dtype and q.dtype in (ms.float16, ms.bfloat16)
    assert k.shape == v.shape == (batch, kv_heads, k_len, dim) and heads % kv_heads == 0
    assert dim % 16 == 0 and dim <= 512
    assert hidden.dtype in (ms.bool_, ms.uint8)

    group = heads // kv_heads
    query, key, value = (x.astype(ms.float32) for x in (q, k, v))
    key, value = (
        ops.tile(x.expand_dims(2), (1, 1, group, 1, 1)).reshape(batch, heads, k_len, dim) for x in (key, value)
    )
    scores = ops.BatchMatMul(transpose_b=True)(query, key)
    if shift is not None:
        assert shift.dtype == q.dtype
        assert shift.shape in ((batch, heads, q_len, k_len), (1, heads, q_len, k_len))
        shift = shift.astype(ms.float32)
        scores = (scores + shift) * scale if shift_first else scores * scale + shift
    else:
        scores = scores * scale
    hidden = hidden.astype(ms.bool_)
    out = ops.BatchMatMul()(ops.Softmax(-1)(ops.masked_fill(scores, hidden, -1e30)), value)
    return ops.masked_fill(out, hidden.all(-1, keep_dims=True), float("nan")).astype(q.dtype)


class StandIns:
    """Replacements for the fused operators; `calls` holds (operator, arguments) of the attention operators."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from mindspore import mint, ops
        from mindspore.ops import auto_generate

        from llm_core.ops.ascend import elementwise, loss

        self.calls = []
        self.shift_first = False  # whether `real_shift` is added before the scaling; the documents do not agree
        self.ops = ops
        for module, name in (
            (ops, "flash_attention_score"),
            (ops, "fused_infer_attention_score"),
            (ops, "rotary_position_embedding"),
            (ops, "swiglu"),
            (ops, "embedding"),
            (loss, "cross_entropy_loss"),
        ):
            real = getattr(module, name)
            monkeypatch.setattr(module, name, self.stand_in(getattr(self, name), real))
        monkeypatch.setattr(mint.nn.functional, "gelu", self.gelu)
        rms_norm = self.stand_in(self.rms_norm, auto_generate.rms_norm)
        monkeypatch.setattr(elementwise, "FusedRmsNorm", lambda eps: lambda x, gamma: rms_norm(x, gamma, eps))

    def stand_in(self, compute, real):
        return lambda *args, **kwargs: compute(bound(real, args, kwargs))

    def flash_attention_score(self, a):
        self.calls.append(("flash_attention_score", a))
        unused = (a.drop_mask, a.padding_mask, a.prefix, a.actual_seq_qlen, a.actual_seq_kvlen)
        assert all(argument is None for argument in unused) and a.keep_prob == 1.0
        order = {"BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3)}[a.input_layout]
        q, k, v = (self.ops.transpose(x, order) for x in (a.query, a.key, a.value))
        batch, heads, q_len, _ = q.shape
        assert heads == a.head_num
        hidden = a.attn_mask
        if a.sparse_mode == 3:
            assert hidden.shape == (2048, 2048) and (hidden.asnumpy() == np.triu(np.ones((2048, 2048)), 1)).all()
            rows, columns = np.arange(q_len)[:, None], np.arange(k.shape[2])[None]
            hidden = type(hidden)(columns > rows + k.shape[2] - q_len)
        else:
            assert a.sparse_mode in (0, 1)
            shapes = (batch, heads, q_len, k.shape[2]), (batch, 1, q_len, k.shape[2]), (q_len, k.shape[2])
            assert hidden.shape in shapes
        out = attend(q, k, v, hidden, a.real_shift, a.scalar_value, self.shift_first)
        return self.ops.transpose(out, order)

    def fused_infer_attention_score(self, a):
        self.calls.append(("fused_infer_attention_score", a))
        assert a.input_layout == "BNSD" and a.actual_seq_lengths is None and a.actual_seq_lengths_kv is None
        batch, heads, q_len, _ = a.query.shape
        assert (a.num_heads, a.num_key_value_heads) == (heads, a.key.shape[1])
        assert a.num_heads <= 64 * a.num_key_value_heads
        assert a.sparse_mode in (0, 1) and a.inner_precise in ((0, 1) if q_len == 1 else (0, 1, 2, 3))
        assert a.atten_mask.shape == (batch, 1, q_len, a.key.shape[2])
        out = attend(a.query, a.key, a.value, a.atten_mask, a.pse_shift, a.scale, self.shift_first)
        return out, self.ops.zeros((1,))

    def rotary_position_embedding(self, a):
        batch, length, _, dim = a.x.shape
        assert a.mode == 0 and a.x.dtype == a.cos.dtype == a.sin.dtype
        assert a.cos.shape == a.sin.shape and a.cos.shape in ((1, length, 1, dim), (batch, length, 1, dim))
        low, high = self.ops.split(a.x, dim // 2, -1)
        return a.x * a.cos + self.ops.concat((-high, low), -1) * a.sin

    def swiglu(self, a):
        gate, up = self.ops.split(a.input, a.input.shape[a.dim] // 2, a.dim)
        return gate * self.ops.sigmoid(gate) * up

    def gelu(self, input, *, approximate="none"):
        assert approximate == "none"
        return 0.5 * input * (1 + self.ops.erf(input / 2**0.5))

    def embedding(self, a):
        assert (a.padding_idx, a.max_norm, a.scale_grad_by_freq) == (None, None, False)
        return self.ops.gather(a.weight, a.input, 0)

    def rms_norm(self, a):
        rstd = self.ops.rsqrt((a.x * a.x).mean(-1, keep_dims=True) + a.epsilon)
        return a.x * rstd * a.gamma, rstd

    def cross_entropy_loss(self, a):
        import mindspore as ms

        targets = a.target.asnumpy()
        assert a.target.dtype == ms.int64 and (targets >= 0).all() and (targets < a.input.shape[1]).all()
        assert a.reduction == "none" and a.weight is None and not a.label_smoothing and not a.return_zloss
        log_prob = self.ops.log_softmax(a.input, -1)
        loss = -self.ops.gather_elements(log_prob, 1, a.target.reshape(-1, 1)).reshape(-1)
        return loss, log_prob, None, None


@pytest.fixture
def stand_ins(monkeypatch, pynative):
    return StandIns(monkeypatch)


def value_and_gradients(cell, inputs, constants, sens):
    """Of a Cell with one output, as numpy; the gradients are those to `inputs`."""
    import mindspore as ms

    given = [ms.Tensor(a) for a in (*inputs, *constants)]
    gradient = ms.ops.GradOperation(get_all=True, sens_param=True)(cell)
    gradients = gradient(*given, ms.Tensor(sens))
    return [x.asnumpy() for x in (cell(*given), *gradients[: len(inputs)])]


def check(ours, reference, *inputs, constants=(), tolerance=1e-5):
    """Both Cells have the same value and the same gradients to `inputs`; `constants` follow the inputs."""
    import mindspore as ms

    shape = reference(*(ms.Tensor(a) for a in (*inputs, *constants))).shape
    sens = normal(*shape)
    results = [value_and_gradients(cell, inputs, constants, sens) for cell in (ours, reference)]
    for name, a, b in zip(["value", *(f"gradient {i}" for i in range(len(inputs)))], *results, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), name


def masked_attention(operators, heads, dim, prefix=0, **mask_arguments):
    """Cell(q, k, v) of mask and attention together."""
    from mindspore import Tensor, nn

    names = ("kv_start", "kv_len", "cu_seqlens_q", "cu_seqlens_k", "bias")

    class MaskedAttention(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.mask = operators.AttentionMask(heads, dim, prefix)
            self.attention = operators.Attention(dim)
            self.given = tuple(Tensor(mask_arguments[n]) if n in mask_arguments else None for n in names)

        def construct(self, q, k, v):
            return self.attention(q, k, v, self.mask(q.shape[0], q.shape[1], k.shape[1], *self.given))

    return MaskedAttention()


def ints(*values):
    return np.array(values, np.int32)


DOCUMENTS = ints([0, 2, 5, 5], [1, 3, 4, 4])  # an empty one, and columns before and behind them
MASKS = {
    "causal": {},
    "prefix alone": {"prefix": 3},
    "rows of different length": {"kv_start": ints(2, 0), "kv_len": ints(7, 6)},
    "packed": {"cu_seqlens_q": DOCUMENTS, "cu_seqlens_k": DOCUMENTS},
    "packed behind a prefix": {"cu_seqlens_q": DOCUMENTS, "cu_seqlens_k": DOCUMENTS, "prefix": 2},
    "padded behind a prefix": {"kv_start": ints(3, 1), "prefix": 2},
    "bias of all rows": {"bias": normal(1, 4, 7) * 3},
    "bias and left padding": {"bias": normal(2, 4, 7) * 3, "kv_start": ints(2, 1)},
}


def key_length(case: str) -> int:
    """Packed rows are about keys of their own queries alone; otherwise there are two keys more than queries."""
    return 5 + MASKS[case].get("prefix", 0) if "packed" in case else 7


class TestAttention:
    def check(self, ascend, case, kv_heads=2):
        from llm_core.ops import reference

        lengths_and_heads = ((5, 4), (key_length(case), kv_heads), (key_length(case), kv_heads))
        qkv = [rounded(normal(2, length, heads, 16)) for length, heads in lengths_and_heads]
        cells = [masked_attention(operators, 4, 16, **MASKS[case]) for operators in (ascend, reference)]
        check(*cells, *qkv, tolerance=1e-2)

    @pytest.mark.parametrize("case", MASKS)
    def test_is_the_references(self, ascend, stand_ins, case):
        self.check(ascend, case)

    @pytest.mark.parametrize("kv_heads", [1, 4])
    def test_other_groups_of_heads(self, ascend, stand_ins, kv_heads):
        self.check(ascend, "causal", kv_heads)

    def test_bias_whether_it_is_added_before_or_after_the_scaling(self, ascend, stand_ins):
        stand_ins.shift_first = True
        self.check(ascend, "bias and left padding")

    def test_scale_that_is_no_power_of_two(self, ascend, stand_ins):
        from llm_core.ops import reference

        qkv = [normal(2, 5, 4, 48) for _ in range(3)]
        check(*(masked_attention(operators, 4, 48) for operators in (ascend, reference)), *qkv, tolerance=1e-2)

    @pytest.mark.parametrize("case", MASKS)
    def test_fast_causal_mode_only_where_nothing_else_is_asked_for(self, ascend, stand_ins, case):
        import mindspore as ms

        cell = masked_attention(ascend, 4, 16, **MASKS[case])
        cell(*(ms.Tensor(normal(2, n, 4, 16)) for n in (5, key_length(case), key_length(case))))
        [(name, arguments)] = stand_ins.calls
        assert (name, arguments.input_layout) == ("flash_attention_score", "BSND")
        assert (arguments.sparse_mode == 3) == (case in ("causal", "prefix alone"))

    def test_row_without_keys_is_finite(self, ascend, stand_ins):
        import mindspore as ms

        cell = masked_attention(ascend, 4, 16, kv_start=ints(7, 0))
        assert np.isfinite(cell(*(ms.Tensor(normal(2, n, 4, 16)) for n in (5, 7, 7))).asnumpy()).all()

    @pytest.mark.parametrize("dim", [8, 40, 528])
    def test_head_sizes_that_it_does_not_take_are_the_references(self, ascend, dim):
        from llm_core.ops import reference

        assert isinstance(ascend.Attention(dim), reference.Attention)
        assert isinstance(ascend.AttentionMask(4, dim), reference.AttentionMask)
        assert isinstance(ascend.CachedAttention(dim), reference.CachedAttention)
        assert isinstance(ascend.CacheMask(dim), reference.CacheMask)

    def test_dropout_is_the_references(self, ascend):
        from llm_core.ops import reference

        assert isinstance(ascend.Attention(64, dropout=True), reference.Attention)
        assert isinstance(ascend.AttentionMask(4, 64, dropout=True), reference.AttentionMask)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (65, 1)])
@pytest.mark.parametrize("columns", [[4], [2, 3, 4]])
def test_cached_attention(ascend, stand_ins, columns, heads, kv_heads, with_bias):
    import mindspore as ms

    from llm_core.ops import reference

    q = rounded(normal(2, len(columns), heads, 16))
    k, v = (rounded(normal(2 * kv_heads, 7, 16)) for _ in range(2))
    bias = normal(2, heads, 7) * 3 if with_bias else None
    results = []
    for operators in (ascend, reference):
        given = [ms.Tensor(ints(*columns)), ms.Tensor(ints(2, 0)), 7, None if bias is None else ms.Tensor(bias)]
        mask = operators.CacheMask(16)(*given)
        results.append(operators.CachedAttention(16)(*(ms.Tensor(x) for x in (q, k, v)), mask).asnumpy())
    assert np.linalg.norm(results[0] - results[1]) <= 1e-2 * np.linalg.norm(results[1])
    few = heads <= 64 * kv_heads
    assert [name for name, _ in stand_ins.calls] == ["fused_infer_attention_score" if few else "flash_attention_score"]


class TestElementwise:
    @pytest.fixture(autouse=True)
    def operators(self, ascend, stand_ins):
        from llm_core.ops import reference

        self.both = (ascend, reference)

    def test_rms_norm(self):
        check(*(o.RmsNorm(1e-2) for o in self.both), normal(7, 48), normal(48))

    def test_layer_norm_which_runs_here(self):
        check(*(o.LayerNorm(1e-2) for o in self.both), normal(7, 48) + 2, normal(48), normal(48))

    def test_swiglu(self):
        check(*(o.SwiGlu() for o in self.both), normal(5, 33) * 2, normal(5, 33))

    def test_gelu(self):
        check(*(o.Gelu() for o in self.both), normal(5, 33) * 2)

    def test_embedding(self):
        ids = ints(4, 0, 4, 1, 4, 0)
        check(*(o.EmbeddingLookup(11) for o in self.both), normal(11, 12), constants=(ids,))

    @pytest.mark.parametrize("rows", [1, 2])
    def test_rope(self, rows):
        from mindspore import nn, ops

        class Joined(nn.Cell):
            """Both results in one tensor."""

            def __init__(self, operators):
                super().__init__(auto_prefix=False)
                self.rope = operators.Rope()

            def construct(self, q, k, cos, sin):
                return ops.concat(self.rope(q, k, cos, sin), 2)

        angles = RANDOM.uniform(-3, 3, (rows, 6, 1, 4)).astype(np.float32)
        cos = np.concatenate([np.cos(angles)] * 2, -1)
        sin = np.concatenate([-np.sin(angles), np.sin(angles)], -1)
        check(*map(Joined, self.both), normal(2, 6, 3, 8), normal(2, 6, 1, 8), constants=(cos, sin))

    @pytest.mark.parametrize("fused", [False, True])
    def test_token_loss(self, fused):
        from mindspore import nn

        class Loss(nn.Cell):
            def __init__(self, operators):
                super().__init__(auto_prefix=False)
                self.nll = operators.LinearNll() if fused else operators.TokenNll()

            def construct(self, *inputs):
                return self.nll(*inputs)[0]

        labels = ints(3, -100, 0, 10, -1, 7)
        inputs = (normal(6, 9), normal(11, 9)) if fused else (normal(6, 11),)
        check(*map(Loss, self.both), *inputs, constants=(labels,))


def signature(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_names_and_calls_are_the_references(ascend):
    from llm_core.ops import OPERATORS, reference

    assert set(ascend.__all__) == set(reference.__all__) > set(OPERATORS)
    arguments = {"heads": 4, "head_dim": 64, "eps": 1e-5, "vocab_size": 7, "betas": (0.9, 0.95), "weight_decay": 0.1}
    arguments |= {"decoupled": True, "bias_correction": True, "prefix": 0, "dropout": False, "bf16": True}
    arguments |= {"frozen": True, "rate": 0.1, "site": 3}
    for name in reference.__all__:
        ours, theirs = getattr(ascend, name), getattr(reference, name)
        if name in OPERATORS:
            given = {n: arguments[n] for n in signature(theirs) if n not in ("args", "kwargs")}
            ours, theirs = ours(**given).construct, theirs(**given).construct
        assert signature(ours) == signature(theirs), name


X, TABLE, IDS = normal(6, 16), normal(11, 16), ints(3, 0, 10, -1, 7, 2)
Q, K, ANGLES = normal(2, 5, 4, 16), normal(2, 5, 2, 16), normal(1, 5, 1, 16)
GRAPHS = {  # name: (Cell of the operators, its inputs, how many of them have gradients, its outputs' shapes)
    "causal": (lambda o: masked_attention(o, 4, 16), (Q, K, K), 3, [Q.shape]),
    "packed": (lambda o: masked_attention(o, 4, 16, **MASKS["packed"]), (Q, K, K), 3, [Q.shape]),
    "biased": (lambda o: masked_attention(o, 4, 16, bias=normal(1, 4, 5)), (Q, K, K), 3, [Q.shape]),
    "rms norm": (lambda o: o.RmsNorm(1e-5), (X, normal(16)), 2, [X.shape]),
    "layer norm": (lambda o: o.LayerNorm(1e-5), (X, normal(16), normal(16)), 3, [X.shape]),
    "swiglu": (lambda o: o.SwiGlu(), (X, X), 2, [X.shape]),
    "gelu": (lambda o: o.Gelu(), (X,), 1, [X.shape]),
    "rope": (lambda o: o.Rope(), (Q, K, ANGLES, ANGLES), 2, [Q.shape, K.shape]),
    "embedding": (lambda o: o.EmbeddingLookup(11), (TABLE, IDS), 1, [X.shape]),
    "product": (lambda o: o.LinearProduct(bf16=True), (X, TABLE), 2, [(6, 11)]),
    "loss": (lambda o: o.TokenNll(), (X, IDS), 1, [(), ()]),
    "loss of product": (lambda o: o.LinearNll(bf16=True), (X, TABLE, IDS), 2, [(), ()]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_shape_inference_of_the_operators_themselves(ascend, graph, name):
    """A graph of the Cell and its gradient, of which only shapes and dtypes are used: those are constants, nothing else
    is left of the graph, and so it runs where its operators do not."""
    import mindspore as ms
    from mindspore import nn

    make, inputs, count, outputs = GRAPHS[name]

    class Shapes(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.cell = make(ascend)
            self.gradient = ms.ops.GradOperation(get_all=True)

        def construct(self, *given):
            results = self.cell(*given)
            if not isinstance(results, tuple):
                results = (results,)
            found = ()
            for x in (*results, *self.gradient(self.cell)(*given)):
                found = (*found, (x.shape, x.dtype))
            return found

    found = Shapes()(*(ms.Tensor(a) for a in inputs))[: len(outputs) + count]
    assert found == tuple((shape, ms.float32) for shape in (*outputs, *(x.shape for x in inputs[:count])))


@pytest.mark.parametrize("columns", [[4], [2, 3, 4]])
def test_shape_inference_of_the_cached_path(ascend, graph, columns):
    import mindspore as ms
    from mindspore import nn

    class Shapes(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.mask, self.attention = ascend.CacheMask(16), ascend.CachedAttention(16)

        def construct(self, q, k, columns, kv_start, bias):
            out = self.attention(q, k, k, self.mask(columns, kv_start, 7, bias))
            return out.shape, out.dtype

    given = normal(2, len(columns), 4, 16), normal(4, 7, 16), ints(*columns), ints(2, 0), normal(2, 4, 7)
    assert Shapes()(*(ms.Tensor(x) for x in given)) == ((2, len(columns), 4, 16), ms.float32)
