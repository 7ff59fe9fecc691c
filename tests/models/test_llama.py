"""What is Llama's own: joined projections, and its cache. `test_against_hf` compares the rest with HF."""

from __future__ import annotations

import llama_cases
import numpy as np
import pytest
from decoder_runs import BATCH, PROMPT, data, hf_greedy
from llama_cases import NEW_TOKENS


def test_concatenated_projections():
    """w_qkv and w_gate_hidden give what the separate matrices give."""
    import mindspore as ms
    from mindspore import Tensor

    from llm_core.models.decoder import CausalLM

    split = llama_cases.run("gqa")
    values = {name: p.asnumpy() for name, p in split.net.parameters_dict().items()}
    net = CausalLM(llama_cases.spec_of("gqa", qkv_concat=True), seed=None)
    for name, parameter in net.parameters_dict().items():
        if name.endswith("w_qkv.weight"):
            parts = [name.replace("w_qkv", w) for w in ("wq", "wk", "wv")]
        elif name.endswith("w_gate_hidden.weight"):
            parts = [name.replace("w_gate_hidden", w) for w in ("w1", "w3")]
        else:
            parts = [name]
        parameter.set_data(Tensor(np.concatenate([values[part] for part in parts]), ms.float32))
    logits = net(Tensor(data()[0])).asnumpy()
    assert np.abs(logits - split.logits).max() < 1e-6


def test_cached_equals_uncached():
    """64 greedy steps with the cache and 64 whole forward passes choose the same tokens."""
    from mindspore import Tensor

    ours = llama_cases.run("gqa")
    tokens = np.zeros((BATCH, PROMPT + NEW_TOKENS), np.int32)
    tokens[:, :PROMPT] = data()[0][:, :PROMPT]
    for position in range(PROMPT, PROMPT + NEW_TOKENS):
        logits = ours.net(Tensor(tokens)).asnumpy()[:, position - 1]
        tokens[:, position] = logits.argmax(-1)
    np.testing.assert_array_equal(ours.greedy, tokens[:, PROMPT:])


def test_left_padding():
    """Rows of different lengths, padded on the left, continue as they do alone; what stands in the pads is nothing."""
    from mindspore import Tensor

    ours = llama_cases.run("gqa")
    prompts = data()[0][:, :PROMPT].copy()
    kv_start = np.array([0, 4, 7], np.int32)
    padded = llama_cases.greedy(ours.decoder, prompts, kv_start)
    np.testing.assert_array_equal(padded[0], ours.greedy[0])
    for row, first in enumerate(kv_start):
        alone = np.zeros((BATCH, PROMPT + NEW_TOKENS), np.int32)
        alone[:, : PROMPT - first] = prompts[row, first:]
        length = PROMPT - first
        for step in range(8):
            logits = ours.net(Tensor(alone)).asnumpy()[0, length + step - 1]
            assert logits.argmax() == padded[row, step]
            alone[:, length + step] = padded[row, step]
    for row, first in enumerate(kv_start):
        prompts[row, :first] = 1 + row
    np.testing.assert_array_equal(llama_cases.greedy(ours.decoder, prompts, kv_start), padded)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["gqa", "biases"])
def test_left_padding_live(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    ours = llama_cases.run(name)
    prompts = data()[0][:, :PROMPT]
    kv_start = np.array([0, 4, 7], np.int32)
    theirs = hf_greedy(llama_cases.hf_model(name), prompts, kv_start, NEW_TOKENS)
    np.testing.assert_array_equal(llama_cases.greedy(ours.decoder, prompts, kv_start), theirs)
