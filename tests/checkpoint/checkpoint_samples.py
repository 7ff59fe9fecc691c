"""What several tests of this folder share: a tiny Llama's weights, and how to put them into a file."""

from __future__ import annotations

import numpy as np

from llm_core.checkpoint.dtypes import head_of
from llm_core.checkpoint.files import write_tensors
from llm_core.checkpoint.hf import to_hf
from llm_core.checkpoint.staged import StagedFile

HIDDEN, FFN, KV, VOCAB, LAYERS = 8, 12, 4, 16, 2
SHAPES = {
    "attention.wq": (HIDDEN, HIDDEN),
    "attention.wk": (KV, HIDDEN),
    "attention.wv": (KV, HIDDEN),
    "attention.wo": (HIDDEN, HIDDEN),
    "feed_forward.w1": (FFN, HIDDEN),
    "feed_forward.w2": (HIDDEN, FFN),
    "feed_forward.w3": (FFN, HIDDEN),
    "attention_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
}


def llama(seed=0, tied=False):
    """A tiny Llama's weights under MindFormers' names."""
    rng = np.random.default_rng(seed)
    shapes = {"model.tok_embeddings.embedding_weight": (VOCAB, HIDDEN), "model.norm_out.weight": (HIDDEN,)}
    shapes |= {f"model.layers.{i}.{leaf}.weight": shape for i in range(LAYERS) for leaf, shape in SHAPES.items()}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def joined(weights):
    """The same with qkv_concat."""
    out = {k: v for k, v in weights.items() if not any(f".{p}." in k for p in ("wq", "wk", "wv", "w1", "w3"))}
    for i in range(LAYERS):
        start = f"model.layers.{i}."
        take = [weights[f"{start}attention.{p}.weight"] for p in ("wq", "wk", "wv")]
        out[f"{start}attention.w_qkv.weight"] = np.concatenate(take)
        take = [weights[f"{start}feed_forward.{p}.weight"] for p in ("w1", "w3")]
        out[f"{start}feed_forward.w_gate_hidden.weight"] = np.concatenate(take)
    return out


def write(path, tensors):
    with StagedFile(path, 0) as staged:
        write_tensors(staged, {n: head_of(a) for n, a in tensors.items()}, tensors.__getitem__, {})
        staged.commit()


def assert_same(back, expected):
    assert back.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def hf_names(weights):
    return {to_hf(name): array for name, array in weights.items()}
