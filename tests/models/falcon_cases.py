"""Tiny Falcons, one of each architecture, and what this project and HF make of them.

Used by the tests of the model and by tools/make_golden.py; only the functions named hf_* need torch.
"""

from __future__ import annotations

import re
from functools import cache
from types import SimpleNamespace

import numpy as np
from decoder_runs import PROMPT, VOCAB, data, fixed_values, hf_greedy, hf_results, our_results

from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import DecoderSpec, spec_from_config

NEW_TOKENS = 32
KV_START = np.array([0, 4, 7], np.int32)  # the prompts of the generation differ in length, padded on the left

_OLD = {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "bias": True}
_SEVEN = {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False}
_FORTY = {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}
# name -> keys of the config, which HF's FalconConfig and this project's share. The slopes of 4 heads are powers of two;
# those of 12 heads are not, and show that they are rounded to bfloat16.
CASES: dict[str, dict] = {
    "rw": _OLD | {"alibi": True, "hidden_size": 48, "num_heads": 12},
    "rw_rope": _OLD | {"alibi": False},
    "7b": _SEVEN | {"alibi": False},
    "40b": _FORTY | {"alibi": False, "tie_word_embeddings": False, "ffn_hidden_size": 40},
    "7b_alibi": _SEVEN | {"alibi": True},
    "40b_alibi": _FORTY | {"alibi": True, "hidden_size": 48, "num_heads": 12},
}
DEEP = ("rw", "40b")  # cases with two layers; the others have one, which compiles faster


def _config(name: str) -> dict:
    common = dict(vocab_size=VOCAB, hidden_size=32, num_heads=4, num_layers=2 if name in DEEP else 1)
    return common | CASES[name]


def spec_of(name: str) -> DecoderSpec:
    """Our spec of a case, by way of the `model` section of a run file."""
    from llm_core.config.model_section import FalconConfig

    config = FalconConfig(type="FalconConfig", seq_length=PROMPT + NEW_TOKENS, **_config(name))
    return spec_from_config(SimpleNamespace(arch=SimpleNamespace(type="FalconForCausalLM"), config=config))


@cache
def run(name: str) -> SimpleNamespace:
    """Our results on a case, with the greedy continuation of the left-padded prompts, int32 [B, NEW_TOKENS]."""
    from llm_core.infer.generate import Generator
    from llm_core.infer.sampling import SamplingParams

    spec = spec_of(name)
    results = our_results(spec)
    prompts = [row[first:PROMPT].tolist() for row, first in zip(data()[0], KV_START, strict=True)]
    generator = Generator(results.net, spec, eos_ids=[], pad_id=0)
    answers = generator.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS))
    results.greedy = np.array([answer.token_ids for answer in answers])
    return results


def hf_model(name: str):
    """HF's model of a case with the fixed weights, fp32, in eval mode.

    Attention is "sdpa", HF's default: its "eager" adds ALiBi twice (transformers 4.57.1).
    """
    import torch
    from transformers import FalconConfig, FalconForCausalLM

    fields = _config(name)
    fields = fields | {"num_attention_heads": fields.pop("num_heads"), "num_hidden_layers": fields.pop("num_layers")}
    model = FalconForCausalLM(FalconConfig(**fields, attn_implementation="sdpa")).eval()
    spec = spec_of(name)
    ours = {name: fixed_values(name, shape) for name, shape in parameter_shapes(spec).items()}
    values = {name: torch.from_numpy(array) for name, array in to_hf(ours, spec).items()}
    report = model.load_state_dict(values, strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys == (["lm_head.weight"] if spec.tied_head else [])
    return model


def hf_run(name: str) -> SimpleNamespace:
    """HF's results on a case, with greedy [B, NEW_TOKENS]."""
    theirs = hf_results(hf_model(name), lambda found: from_hf(found, spec_of(name)))
    theirs.greedy = hf_greedy(hf_model(name), data()[0][:, :PROMPT], KV_START, NEW_TOKENS)
    return theirs


# ------------------------------------------------------------------------------------------------ names and layouts

_LEAVES = {
    "self_attention.dense": "attention.wo",
    "mlp.dense_h_to_4h": "feed_forward.w1",
    "mlp.dense_4h_to_h": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TWO_NORMS = {"ln_attn": "attention_norm", "ln_mlp": "ffn_norm"}  # instead of the last two, in Falcon-40B
_TOP = {
    "transformer.word_embeddings.weight": "model.tok_embeddings.embedding_weight",
    "transformer.ln_f.weight": "model.norm_out.weight",
    "transformer.ln_f.bias": "model.norm_out.bias",
    "lm_head.weight": "lm_head.weight",
}
_QKV = ("attention.wq", "attention.wk", "attention.wv")
_THEIR_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)")
_OUR_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def from_hf(tensors: dict[str, np.ndarray], spec: DecoderSpec) -> dict[str, np.ndarray]:
    """HF's names and fused projections -> MindFormers' names and separate ones. KeyError for what no Falcon has."""
    leaves = _LEAVES | _TWO_NORMS
    ours = {}
    for name, array in tensors.items():
        layer = _THEIR_LAYER.fullmatch(name)
        if layer is None:
            ours[_TOP[name]] = array
            continue
        number, leaf, kind = layer.groups()
        start = f"model.layers.{number}."
        if leaf == "self_attention.query_key_value":
            parts = split_qkv(array, spec)
            ours |= {f"{start}{part}.{kind}": rows for part, rows in zip(_QKV, parts, strict=True)}
        else:
            ours[f"{start}{leaves[leaf]}.{kind}"] = array
    return ours


def to_hf(tensors: dict[str, np.ndarray], spec: DecoderSpec) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`."""
    leaves = {ours: theirs for theirs, ours in _LEAVES.items()}
    if spec.residual == "parallel_two_norms":
        leaves |= {ours: theirs for theirs, ours in _TWO_NORMS.items()}
    top = {ours: theirs for theirs, ours in _TOP.items()}
    theirs = {}
    for name, array in tensors.items():
        layer = _OUR_LAYER.fullmatch(name)
        if layer is None:
            theirs[top[name]] = array
            continue
        number, leaf, kind = layer.groups()
        start = f"transformer.h.{number}."
        if leaf == _QKV[0]:
            parts = [tensors[f"model.layers.{number}.{part}.{kind}"] for part in _QKV]
            theirs[f"{start}self_attention.query_key_value.{kind}"] = join_qkv(*parts, spec)
        elif leaf not in _QKV:
            theirs[f"{start}{leaves[leaf]}.{kind}"] = array
    return theirs


def split_qkv(fused: np.ndarray, spec: DecoderSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of HF's query_key_value -> those of wq, wk, wv; a weight [rows, in] or a bias [rows].

    All three layouts are one: for each key/value head its query heads, then its key head, then its value head. With
    multi_query that is all query heads, one key, one value; with as many key/value heads as query heads, (q, k, v)
    head by head.
    """
    grouped = fused.reshape(spec.num_kv_heads, -1, spec.head_dim, *fused.shape[1:])
    parts = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    return tuple(part.reshape(-1, *fused.shape[1:]) for part in parts)


def join_qkv(q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: DecoderSpec) -> np.ndarray:
    """The inverse of `split_qkv`."""
    grouped = [part.reshape(spec.num_kv_heads, -1, spec.head_dim, *part.shape[1:]) for part in (q, k, v)]
    return np.concatenate(grouped, 1).reshape(-1, *q.shape[1:])
