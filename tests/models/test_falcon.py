"""What is Falcon's own: ALiBi, left padding with it, parallel branches. `test_against_hf` compares the rest with HF."""

from __future__ import annotations

from dataclasses import replace

import falcon_cases
import numpy as np
import pytest
from decoder_runs import BATCH, PROMPT, data
from falcon_cases import KV_START, NEW_TOKENS, TRAINED

from llm_core.models.alibi import alibi_slopes


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


@pytest.mark.parametrize("name", ["rw", "7b", "40b", "40b_alibi", "11b", "linear"])
def test_cached_equals_uncached(name):
    """Greedy steps with the cache choose what whole forward passes over the unpadded rows choose."""
    from mindspore import Tensor

    ours = falcon_cases.run(name)
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
    from llm_core.models.layers import Parts

    rate, layer, key = 0.25, 3, Tensor(core_ops.dropout_key(seed=1, step=2))
    spec = replace(falcon_cases.spec_of("7b_alibi"), hidden_dropout=rate)
    block = Block(layer, spec, Parts(), seed=0)
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


@pytest.mark.parity
@pytest.mark.parametrize("name", ["rw", "7b", "40b"])
def test_the_cache_holds_what_hf_holds(name):
    """Keys and values after the prompt, turned already; each key/value head once, where HF's new decoder repeats it."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from mindspore import Tensor

    from llm_core.models.cache import CachedDecoder

    ours = falcon_cases.run(name)
    spec, prompts = ours.net.spec, np.ascontiguousarray(data()[0][:, :PROMPT])
    decoder = CachedDecoder(ours.net, BATCH, PROMPT + NEW_TOKENS)
    decoder(Tensor(prompts), Tensor(np.int32(0)), Tensor(np.zeros(BATCH, np.int32)))
    with torch.no_grad():
        tokens = torch.from_numpy(prompts.astype(np.int64))
        theirs = falcon_cases.hf_model(name)(tokens, use_cache=True).past_key_values
    for layer in range(spec.num_layers):
        for found, expected in ((decoder.keys, theirs[layer][0]), (decoder.values, theirs[layer][1])):
            cache = found[layer].asnumpy().reshape(BATCH, spec.num_kv_heads, -1, spec.head_dim)
            each = expected.shape[1] // spec.num_kv_heads
            assert np.abs(cache[:, :, :PROMPT] - expected[:, ::each].numpy()).max() < 1e-5
            assert not cache[:, :, PROMPT:].any()


def test_scaled_frequencies():
    """Linear slows every channel at any length; dynamic changes nothing up to the trained length, and slows beyond."""
    from llm_core.models.rope import rope_frequencies

    linear, dynamic = (falcon_cases.spec_of(name) for name in ("linear", "dynamic"))
    plain, _ = rope_frequencies(replace(linear.rope, method="none"), linear.head_dim)
    np.testing.assert_allclose(rope_frequencies(linear.rope, linear.head_dim)[0], plain / 2, rtol=1e-6)
    for length in (1, TRAINED):
        np.testing.assert_array_equal(rope_frequencies(dynamic.rope, dynamic.head_dim, length)[0], plain)
    longer, _ = rope_frequencies(dynamic.rope, dynamic.head_dim, 2 * TRAINED)
    assert longer[0] == plain[0] and (longer[1:] < plain[1:]).all()


def test_sampling_repeats_with_its_seed():
    from llm_core.infer.generate import Generator
    from llm_core.infer.sampling import SamplingParams

    ours = falcon_cases.run("rw")
    generator = Generator(ours.net, ours.net.spec, eos_ids=[], pad_id=0)
    params = SamplingParams(max_new_tokens=8, do_sample=True, top_k=0, temperature=2.0)
    prompts = [row[first:PROMPT].tolist() for row, first in zip(data()[0], KV_START, strict=True)]
    first, again, other = (
        [answer.token_ids for answer in generator.generate(prompts, params, seed=seed)] for seed in (1, 1, 9)
    )
    assert first == again != other
