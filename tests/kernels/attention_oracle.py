"""Attention and its gradients in fp64 NumPy, written as the definition reads, and the cases every kernel must pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def visible(ranges: np.ndarray, k_len: int, prefix: int) -> np.ndarray:
    """Who sees whom: ranges int32 [R, Sq, 2] -> bool [R, Sq, Sk], true where j < prefix or start <= j < end."""
    key = np.arange(k_len)
    return (key < prefix) | ((key >= ranges[..., :1]) & (key < ranges[..., 1:]))


def _weights(q, k, ranges, bias, prefix) -> tuple[np.ndarray, np.ndarray]:
    """Softmax weights fp64 [B, H, Sq, Sk] (rows of zeros where no key is seen) and lse [B, H, Sq] (0 there)."""
    heads, dim, kv_heads = q.shape[2], q.shape[3], k.shape[2]
    k = np.repeat(k.astype(np.float64), heads // kv_heads, axis=2)
    scores = np.einsum("bihd,bjhd->bhij", q.astype(np.float64), k)
    if bias is not None:
        scores = scores + bias.astype(np.float64)[:, :, None, :]
    scores = np.where(visible(ranges, k.shape[1], prefix)[:, None], scores * dim**-0.5, -np.inf)
    largest = scores.max(-1, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0)
    shifted = np.exp(scores - largest)
    total = shifted.sum(-1, keepdims=True)
    total = np.where(total > 0, total, 1)
    return shifted / total, (np.log(total) + largest)[..., 0]


def attention(q, k, v, ranges, bias=None, prefix=0) -> tuple[np.ndarray, np.ndarray]:
    """softmax((q k^T + bias) / sqrt(D)) v over the keys that each query sees.

    q [B, Sq, H, D]; k, v [B, Sk, K, D] with H a multiple of K (head h reads key head h // (H / K));
    ranges int32 [1|B, Sq, 2]; bias [1|B, H, Sk] or None -> out fp64 [B, Sq, H, D] and lse fp64 [B, H, Sq], the
    natural logarithm of the sum of exponentials. A query that sees no key has out 0 and lse 0.
    """
    weights, lse = _weights(q, k, ranges, bias, prefix)
    v = np.repeat(v.astype(np.float64), q.shape[2] // v.shape[2], axis=2)
    return np.einsum("bhij,bjhd->bihd", weights, v), lse


def attention_gradients(q, k, v, ranges, bias, prefix, dout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of sum(attention(...)[0] * dout): dq, dk, dv in fp64, shaped like q, k, v."""
    weights, _ = _weights(q, k, ranges, bias, prefix)
    heads, dim, kv_heads = q.shape[2], q.shape[3], k.shape[2]
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    k, v = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    d_weights = np.einsum("bihd,bjhd->bhij", dout, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * dim**-0.5
    dq = np.einsum("bhij,bjhd->bihd", d_scores, k)
    dk = np.einsum("bhij,bihd->bjhd", d_scores, q)
    dv = np.einsum("bhij,bihd->bjhd", weights, dout)
    grouped = (*k.shape[:2], kv_heads, heads // kv_heads, dim)
    return dq, dk.reshape(grouped).sum(3), dv.reshape(grouped).sum(3)


@dataclass(frozen=True)
class Case:
    """One problem: sizes, who sees whom, and the bias. Arrays of numbers come from `tensors`."""

    batch: int
    q_len: int
    k_len: int
    heads: int
    kv_heads: int
    dim: int
    ranges: np.ndarray  # int32 [1|B, Sq, 2]
    bias: np.ndarray | None = None  # fp32 [1|B, H, Sk]
    prefix: int = 0

    def tensors(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v and dout in fp32, normally distributed."""
        rng = np.random.default_rng(seed)
        q_shape = (self.batch, self.q_len, self.heads, self.dim)
        k_shape = (self.batch, self.k_len, self.kv_heads, self.dim)
        return tuple(rng.standard_normal(shape, np.float32) for shape in (q_shape, k_shape, k_shape, q_shape))


def causal_ranges(q_len: int, k_len: int, kv_start=(0,), kv_len=None, documents=None, prefix: int = 0) -> np.ndarray:
    """The ranges int32 [R, Sq, 2] of causal attention, aligned bottom-right, behind a prefix that all see.

    Positions of `kv_start` (first real key of each row), `kv_len` (first key past the real ones) and `documents`
    (lists of document lengths, a list a row; Sq = Sk) are counted from the end of the prefix.
    """
    own = k_len - prefix
    end = np.arange(1, q_len + 1) + own - q_len
    if documents is not None:
        starts = [np.repeat(np.cumsum([0, *lengths[:-1]]), lengths) for lengths in documents]
        rows = [(start, end) for start in starts]
    elif kv_len is not None:
        rows = [(np.zeros(q_len, int), np.minimum(end, length)) for length in kv_len]
    else:
        rows = [(np.full(q_len, start), end) for start in kv_start]
    ranges = np.stack([np.stack(row, -1) for row in rows])
    ranges[..., 1] = np.maximum(ranges[..., 1], ranges[..., 0])  # a query before its row's first key sees none
    return (ranges + prefix).astype(np.int32)


def full_ranges(q_len: int, k_len: int) -> np.ndarray:
    """Every query sees every key."""
    return np.tile(np.array([0, k_len], np.int32), (1, q_len, 1))


def alibi_like(heads: int, k_len: int, batch: int = 1) -> np.ndarray:
    """A per-key bias fp32 [batch, heads, Sk] that grows with the key's position at another rate in each head."""
    slopes = 2.0 ** -np.arange(1, heads + 1)
    rows = np.arange(batch)[:, None, None]
    return (slopes[:, None] * (np.arange(k_len) - 3 * rows)).astype(np.float32)


def cases() -> dict[str, Case]:
    """The standard set, by name: small enough that all of them take about a second."""
    packed = causal_ranges(96, 96, documents=[[17, 1, 30, 48], [64, 32]])
    some_blind = np.array([[[0, 3], [5, 5], [2, 9], [0, 0], [8, 9]]], np.int32)
    prefixed = causal_ranges(40, 45, kv_start=(0, 7), prefix=5)
    found = {
        "causal": Case(2, 64, 64, 2, 2, 64, causal_ranges(64, 64)),
        "causal long": Case(1, 517, 517, 1, 1, 64, causal_ranges(517, 517)),
        "full": Case(2, 64, 64, 2, 2, 64, full_ranges(64, 64)),
        "full long": Case(1, 300, 403, 2, 1, 32, full_ranges(300, 403)),
        "bottom right": Case(2, 33, 150, 2, 2, 64, causal_ranges(33, 150)),
        "more queries than keys": Case(1, 70, 50, 2, 2, 32, full_ranges(70, 50)),
        "packed documents": Case(2, 96, 96, 2, 1, 64, packed),
        "many short documents": Case(1, 300, 300, 2, 2, 64, causal_ranges(300, 300, documents=[[7] * 42 + [6]])),
        "left padding": Case(3, 50, 50, 2, 2, 64, causal_ranges(50, 50, kv_start=(0, 13, 49))),
        "right padding": Case(3, 50, 50, 2, 2, 64, causal_ranges(50, 50, kv_len=(50, 21, 1))),
        "queries that see nothing": Case(2, 5, 9, 2, 1, 32, some_blind),
        "a row that sees nothing": Case(2, 20, 20, 2, 1, 64, causal_ranges(20, 20, kv_start=(20, 3))),
        "prefix": Case(2, 40, 45, 2, 2, 64, prefixed, prefix=5),
        "only the prefix": Case(1, 5, 9, 2, 2, 32, np.full((1, 5, 2), 4, np.int32), prefix=4),
        "prefix inside the range": Case(1, 20, 30, 2, 2, 32, full_ranges(20, 30), prefix=6),
        "bias": Case(2, 65, 65, 4, 4, 64, causal_ranges(65, 65), alibi_like(4, 65)),
        "bias of each row": Case(2, 40, 45, 4, 2, 32, prefixed, alibi_like(4, 45, batch=2), prefix=5),
        "grouped": Case(2, 77, 77, 9, 3, 64, causal_ranges(77, 77)),
        "one key head": Case(2, 40, 40, 8, 1, 64, causal_ranges(40, 40)),
        "single query": Case(2, 1, 129, 4, 2, 64, full_ranges(1, 129)),
        "few queries": Case(1, 3, 300, 4, 2, 128, causal_ranges(3, 300)),
        "single key": Case(2, 1, 1, 3, 3, 16, full_ranges(1, 1)),
        "odd width": Case(1, 19, 23, 2, 1, 7, causal_ranges(19, 23)),
        "width 1": Case(1, 9, 9, 1, 1, 1, causal_ranges(9, 9)),
    }
    for dim in (32, 40, 80, 96, 128, 200):
        found[f"head_dim {dim}"] = Case(1, 101, 101, 2, 1, dim, causal_ranges(101, 101))
    return found


def any_case(seed: int) -> Case:
    """Ranges in no order, overlapping, backwards, empty; several tiles and blocks, none of them whole."""
    rng = np.random.default_rng(seed)
    batch, kv_heads, group = rng.integers(1, 3), rng.integers(1, 3), rng.integers(1, 4)
    dim = rng.choice([3, 20, 64, 100])
    q_len, k_len = rng.integers(1, 230), rng.integers(2, 600)
    heads = kv_heads * group
    ranges = rng.integers(0, k_len + 1, (rng.choice([1, batch]), q_len, 2)).astype(np.int32)
    ranges[:, : rng.integers(q_len)] = rng.choice([0, k_len])  # queries that see the prefix, if that
    bias = (8 * rng.standard_normal((rng.choice([1, batch]), heads, k_len))).astype(np.float32) if seed % 2 else None
    prefix = rng.choice([0, rng.integers(k_len), k_len])
    return Case(batch, q_len, k_len, heads, kv_heads, dim, ranges, bias, prefix)
