"""The decoder against HF's Falcon: from golden files always, live where torch is installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import falcon_cases
import numpy as np
import pytest
from decoder_runs import BATCH, PROMPT, compare, compare_golden, data
from falcon_cases import KV_START, NEW_TOKENS

from llm_core.models.alibi import alibi_slopes

GOLDEN = Path(__file__).parent.parent / "golden" / "falcon.npz"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.mark.parametrize("name", falcon_cases.CASES)
def test_golden(name, golden):
    ours = falcon_cases.run(name)
    compare_golden(ours, golden, name)
    np.testing.assert_array_equal(ours.greedy, golden[f"{name}/greedy"])


@pytest.mark.parity
@pytest.mark.parametrize("name", falcon_cases.CASES)
def test_live(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    ours, theirs = falcon_cases.run(name), falcon_cases.hf_run(name)
    compare(ours, theirs)
    np.testing.assert_array_equal(ours.greedy, theirs.greedy)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["rw", "40b_alibi"])
def test_left_padded_logits(name):
    """Logits of the first and the second call of the cached decoder, for rows padded on the left, with ALiBi."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from mindspore import Tensor

    from llm_core.models.cache import CachedDecoder

    prompts = data()[0][:, :PROMPT]
    mask = (np.arange(PROMPT)[None] >= KV_START[:, None]).astype(np.int64)
    with torch.no_grad():
        tokens, mask = torch.from_numpy(prompts.astype(np.int64)), torch.from_numpy(mask)
        theirs = falcon_cases.hf_model(name)(tokens, attention_mask=mask).logits
    decoder = CachedDecoder(falcon_cases.run(name).net, BATCH, PROMPT + NEW_TOKENS)
    for start, end in ((0, PROMPT - 1), (PROMPT - 1, PROMPT)):
        tokens = Tensor(np.ascontiguousarray(prompts[:, start:end]))
        ours = decoder(tokens, Tensor(np.int32(start)), Tensor(KV_START)).asnumpy()
        assert np.abs(ours - theirs[:, end - 1].numpy()).max() < 1e-5


def test_cached_equals_uncached():
    """Greedy steps with the cache choose what whole forward passes over the unpadded rows choose."""
    from mindspore import Tensor

    ours = falcon_cases.run("40b_alibi")
    tokens = np.zeros((BATCH, PROMPT + NEW_TOKENS), np.int32)
    for row, first in enumerate(KV_START):
        text = np.concatenate([data()[0][row, first:PROMPT], ours.greedy[row]])
        tokens[row, : len(text)] = text
    chosen = ours.net(Tensor(tokens)).asnumpy().argmax(-1)
    for row, length in enumerate(PROMPT - KV_START):
        np.testing.assert_array_equal(ours.greedy[row], chosen[row, length - 1 : length - 1 + NEW_TOKENS])


def test_hidden_dropout_applies_to_the_sum_of_parallel_branches():
    from mindspore import Tensor

    from llm_core import ops as core_ops
    from llm_core.models.decoder import Block
    from llm_core.models.layers import Linear

    rate, layer, key = 0.25, 3, Tensor(core_ops.dropout_key(seed=1, step=2))
    spec = replace(falcon_cases.spec_of("7b_alibi"), hidden_dropout=rate)
    block = Block(layer, spec, Linear, seed=0)
    x = np.random.RandomState(1).standard_normal((2 * 5, spec.hidden_size)).astype(np.float32)
    mask = core_ops.AttentionMask(spec.num_heads, spec.head_dim)(2, 5, 5)
    whole = block(Tensor(x), None, mask, None, 2).asnumpy() - x
    dropped = block(Tensor(x), None, mask, key, 2).asnumpy() - x
    keep = core_ops.DropoutMask(rate, 3 * layer + 2)(key, *x.shape).asnumpy()
    assert 0.1 < (keep == 0).mean() < 0.4
    np.testing.assert_allclose(dropped, whole * keep, atol=1e-6)


def test_alibi_slopes():
    np.testing.assert_array_equal(alibi_slopes(4), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    np.testing.assert_allclose(alibi_slopes(6), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    assert alibi_slopes(71).shape == (71,)


@pytest.mark.parity
@pytest.mark.parametrize("heads", [1, 12, 32, 71])
def test_alibi_has_the_bits_of_hf(heads):
    torch = pytest.importorskip("torch")
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    from mindspore import Tensor

    from llm_core.models.alibi import AlibiBias

    mask = torch.ones(2, 2048, dtype=torch.long)
    mask[1, :5] = 0
    theirs = falcon.build_alibi_tensor(mask, heads, torch.float32).reshape(2, heads, -1).numpy()
    positions = ((mask.cumsum(-1) - 1) * mask).numpy().astype(np.int32)
    np.testing.assert_array_equal(AlibiBias(heads)(Tensor(positions)).asnumpy(), theirs)


def test_fused_projections_are_split_head_by_head():
    """Rows numbered by what HF's layout says they are come out sorted by query, key and value head."""
    rows = {
        "rw_rope": "q0 k0 v0 q1 k1 v1 q2 k2 v2 q3 k3 v3",
        "7b": "q0 q1 q2 q3 k0 v0",
        "40b": "q0 q1 k0 v0 q2 q3 k1 v1",
    }
    for name, order in rows.items():
        spec = falcon_cases.spec_of(name)
        heads = np.array(order.split())
        q, k, v = falcon_cases.split_qkv(np.repeat(heads, spec.head_dim), spec)
        assert list(q[:: spec.head_dim]) == sorted(h for h in heads if h[0] == "q")
        assert list(k[:: spec.head_dim]) == sorted(h for h in heads if h[0] == "k")
        assert list(v[:: spec.head_dim]) == sorted(h for h in heads if h[0] == "v")
        np.testing.assert_array_equal(falcon_cases.join_qkv(q, k, v, spec), np.repeat(heads, spec.head_dim))
