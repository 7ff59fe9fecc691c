"""Tiny Llamas that differ in one thing each, and what this project and HF make of them.

Used by the tests of the model and by tools/make_golden.py; only the functions named hf_* need torch.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
from decoder_runs import BATCH, PROMPT, VOCAB, data, fixed_values, hf_greedy, hf_results, our_results

from llm_core.checkpoint.hf import from_hf
from llm_core.models.spec import DecoderSpec, RopeSpec

NEW_TOKENS = 64
TRAINED = 32  # positions; shorter than the batch, so that every scaling is beyond its trained length
NO_PADDING = np.zeros(BATCH, np.int32)
DEEP = ("mha", "gqa", "tied")  # cases with two layers; the others have one, which compiles faster

_ROPE = {"rope_theta": 100.0, "max_position_embeddings": TRAINED}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}
# name -> (what differs in HF's config, what differs in our spec)
CASES: dict[str, tuple[dict, dict]] = {
    "mha": ({"num_key_value_heads": 4}, {"num_kv_heads": 4}),
    "gqa": ({}, {}),
    "tied": ({"tie_word_embeddings": True}, {"tied_head": True}),
    "biases": ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
    "wide_heads": ({"head_dim": 12}, {"head_dim": 12}),
    "linear": (
        _ROPE | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope": RopeSpec(100.0, "linear", 2.0, TRAINED)},
    ),
    "dynamic_ntk": (
        _ROPE | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope": RopeSpec(100.0, "dynamic_ntk", 2.0, TRAINED)},
    ),
    "yarn": (_ROPE | {"rope_scaling": _YARN}, {"rope": RopeSpec(100.0, "yarn", 4.0, TRAINED)}),
    "llama3": (_ROPE | {"rope_scaling": _LLAMA3}, {"rope": RopeSpec(100.0, "llama3", 4.0, TRAINED)}),
}


def spec_of(name: str, **changes) -> DecoderSpec:
    """Our spec of a case."""
    fields = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2 if name in DEEP else 1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_size=40,
        max_position=PROMPT + NEW_TOKENS,
    )
    return DecoderSpec(**(fields | CASES[name][1] | changes))


@cache
def run(name: str) -> SimpleNamespace:
    """Our results on a case, with its CachedDecoder and greedy [B, NEW_TOKENS]."""
    from llm_core.models.cache import CachedDecoder

    results = our_results(spec_of(name))
    results.decoder = CachedDecoder(results.net, BATCH, PROMPT + NEW_TOKENS)
    width = PROMPT if name in DEEP else 1
    results.greedy = greedy(results.decoder, data()[0][:, :PROMPT], NO_PADDING, width)
    return results


def greedy(decoder, prompt: np.ndarray, kv_start: np.ndarray, width: int = PROMPT) -> np.ndarray:
    """Greedy continuation of a left-padded prompt [B, P], read in pieces of `width`: int32 [B, NEW_TOKENS]."""
    from mindspore import Tensor

    def read(tokens, start):
        return decoder(Tensor(tokens), Tensor(np.int32(start)), Tensor(kv_start)).asnumpy()

    for start in range(0, prompt.shape[1], width):
        logits = read(np.ascontiguousarray(prompt[:, start : start + width]), start)
    out = []
    for position in range(prompt.shape[1], prompt.shape[1] + NEW_TOKENS):
        out.append(logits.argmax(-1).astype(np.int32)[:, None])
        logits = read(out[-1], position)
    return np.concatenate(out, 1)


def hf_model(name: str):
    """HF's model of a case with the fixed weights, fp32, in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2 if name in DEEP else 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(LlamaConfig(**(fields | CASES[name][0]))).eval()
    with torch.no_grad():
        for hf_name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(fixed_values(from_hf(hf_name), tuple(parameter.shape))))
    return model


def hf_run(name: str) -> SimpleNamespace:
    """HF's results on a case, with greedy [B, NEW_TOKENS]."""
    theirs = hf_results(hf_model(name), lambda found: {from_hf(name): array for name, array in found.items()})
    theirs.greedy = hf_greedy(hf_model(name), data()[0][:, :PROMPT], NO_PADDING, NEW_TOKENS)
    return theirs
