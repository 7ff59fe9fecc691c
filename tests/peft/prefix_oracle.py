"""A decoder with trained keys and values before its own, in plain numpy and float64: what the prefix is tested against.

Written from the papers' formulas, one row and one head at a time, knowing nothing of the model's code but its spec and
its parameters' names.
"""

from __future__ import annotations

import math

import numpy as np

Weights = dict[str, np.ndarray]


def logits(weights: Weights, spec, tokens: np.ndarray, prefix: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """float64 [B, S, V]. prefix: keys and values [P, Hkv, D] of every layer."""
    table = weights["model.tok_embeddings.embedding_weight"]
    head = table if spec.tied_head else weights["lm_head.weight"]
    rows = []
    for row in tokens:
        x = table[row]
        for i, pair in enumerate(prefix):
            x = _layer(weights, f"model.layers.{i}", spec, x, pair)
        rows.append(_norm(weights, "model.norm_out", spec, x) @ head.T)
    return np.stack(rows)


def loss(weights: Weights, spec, tokens: np.ndarray, labels: np.ndarray, prefix) -> float:
    """Sum of -log p(label) where the label is not negative."""
    scores = logits(weights, spec, tokens, prefix)
    highest = scores.max(-1, keepdims=True)
    log_p = scores - highest - np.log(np.exp(scores - highest).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return -float(picked[labels >= 0].sum())


def prefix_of(weights: Weights, spec, kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values of every layer, from the adapter's parameters. kind: prefixtuning or ptuning2."""
    x = weights[f"mindpet_delta_{kind}_embedding.embedding_table"]
    mlp = f"mindpet_delta_{kind}_trans"
    if f"{mlp}.0.weight" in weights:
        x = np.tanh(x @ weights[f"{mlp}.0.weight"].T + weights[f"{mlp}.0.bias"])
        x = x @ weights[f"{mlp}.2.weight"].T + weights[f"{mlp}.2.bias"]
    x = x.reshape(len(x), spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
    return [(x[:, i, 0], x[:, i, 1]) for i in range(spec.num_layers)]


def _layer(weights: Weights, name: str, spec, x: np.ndarray, prefix) -> np.ndarray:
    normed = _norm(weights, f"{name}.attention_norm", spec, x)
    attended = _attention(weights, f"{name}.attention", spec, normed, prefix)
    if spec.residual == "sequential":
        x = x + attended
        return x + _feed_forward(weights, name, spec, _norm(weights, f"{name}.ffn_norm", spec, x))
    if spec.residual == "parallel_two_norms":
        normed = _norm(weights, f"{name}.ffn_norm", spec, x)
    return x + attended + _feed_forward(weights, name, spec, normed)


def _norm(weights: Weights, name: str, spec, x: np.ndarray) -> np.ndarray:
    if spec.norm == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * weights[f"{name}.weight"]
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def _attention(weights: Weights, name: str, spec, x: np.ndarray, prefix) -> np.ndarray:
    length, dim = len(x), spec.head_dim
    if spec.qkv_concat:
        joined = _linear(weights, f"{name}.w_qkv", x)
        q, k, v = np.split(joined, np.cumsum([spec.q_size, spec.kv_size]), -1)
    else:
        q, k, v = (_linear(weights, f"{name}.{leaf}", x) for leaf in ("wq", "wk", "wv"))
    q = q.reshape(length, spec.num_heads, dim)
    k, v = k.reshape(length, spec.num_kv_heads, dim), v.reshape(length, spec.num_kv_heads, dim)
    if spec.position == "rope":
        q, k = _turn(q, spec.rope.theta), _turn(k, spec.rope.theta)
    k, v = np.concatenate([prefix[0], k]), np.concatenate([prefix[1], v])
    places = len(prefix[0])
    heads = []
    for head in range(spec.num_heads):
        served_by = head // (spec.num_heads // spec.num_kv_heads)
        scores = q[:, head] @ k[:, served_by].T
        if spec.position == "alibi":  # a power of two of heads: the slopes need no rounding
            slope = 2.0 ** (-8 * (head + 1) / spec.num_heads)
            scores = scores + slope * np.concatenate([np.zeros(places), np.arange(length)])
        scores = scores / math.sqrt(dim)
        future = np.arange(length)[None, :] > np.arange(length)[:, None]
        scores[:, places:][future] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(p / p.sum(-1, keepdims=True) @ v[:, served_by])
    return _linear(weights, f"{name}.wo", np.concatenate(heads, -1))


def _turn(x: np.ndarray, theta: float) -> np.ndarray:
    length, _, dim = x.shape
    angle = np.outer(np.arange(length), theta ** (-np.arange(0, dim, 2) / dim))[:, None]
    low, high = x[..., : dim // 2], x[..., dim // 2 :]
    return np.concatenate(
        [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], -1
    )


def _feed_forward(weights: Weights, layer: str, spec, x: np.ndarray) -> np.ndarray:
    name = f"{layer}.feed_forward"
    if spec.mlp == "gelu":
        up = _linear(weights, f"{name}.w1", x)
        hidden = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
    else:
        if spec.qkv_concat:
            gate, up = np.split(_linear(weights, f"{name}.w_gate_hidden", x), 2, -1)
        else:
            gate, up = _linear(weights, f"{name}.w1", x), _linear(weights, f"{name}.w3", x)
        hidden = gate / (1 + np.exp(-gate)) * up
    return _linear(weights, f"{name}.w2", hidden)
