"""Scaled dot-product attention in plain MindSpore operators."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

HIDDEN = -1e30  # added to the score of a key that a query must not see; finite, so that no row can become NaN


class Attention(nn.Cell):
    """softmax((q k^T + bias) / sqrt(D)) v, causal and aligned bottom-right, grouped key/value heads.

    q fp32 [B, Sq, H, D]; k, v fp32 [B, Sk, Hkv, D], Sk >= Sq -> fp32 [B, Sq, H, D]. Query i sees the keys
    j <= i + Sk - Sq. A row that sees no key at all gets the mean of all values (never NaN).
    """

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, q_len, heads, dim = q.shape
        k_len, kv_heads = k.shape[1], k.shape[2]
        group = heads // kv_heads
        q = ops.transpose(q.reshape(batch, q_len, kv_heads, group, dim), (0, 2, 3, 1, 4))
        q = q.reshape(batch, kv_heads, group * q_len, dim) * (dim**-0.5)
        k = ops.transpose(k, (0, 2, 1, 3))
        v = ops.transpose(v, (0, 2, 1, 3))
        scores = ops.BatchMatMul(transpose_b=True)(q, k).reshape(batch, kv_heads, group, q_len, k_len)
        visible = ops.arange(k_len) <= (ops.arange(q_len) + (k_len - q_len)).reshape(q_len, 1)
        scores = scores + ops.cast(ops.logical_not(visible), ms.float32) * HIDDEN
        weights = ops.softmax(scores, -1).reshape(batch, kv_heads, group * q_len, k_len)
        out = ops.BatchMatMul()(weights, v).reshape(batch, kv_heads, group, q_len, dim)
        return ops.transpose(out, (0, 3, 1, 2, 4)).reshape(batch, q_len, heads, dim)


class CachedAttention(nn.Cell):
    """Attention of new tokens over a key/value cache that keeps heads outside, so that nothing is copied.

    q fp32 [B, S, H, D]; k, v fp32 [B, Hkv, T, D]; hidden fp32 [B, S, T], 0 where query i may see key j and a
    large negative number elsewhere -> fp32 [B, S, H, D].
    """

    def construct(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        batch, q_len, heads, dim = q.shape
        kv_heads, k_len = k.shape[1], k.shape[2]
        group = heads // kv_heads
        q = q.reshape(batch, q_len, kv_heads, group, dim)
        if q_len > 1:
            q = ops.transpose(q, (0, 2, 1, 3, 4))
        q = q.reshape(batch, kv_heads, q_len * group, dim) * (dim**-0.5)
        scores = ops.BatchMatMul(transpose_b=True)(q, k).reshape(batch, kv_heads, q_len, group, k_len)
        scores = scores + hidden.reshape(batch, 1, q_len, 1, k_len)
        weights = ops.softmax(scores, -1).reshape(batch, kv_heads, q_len * group, k_len)
        out = ops.BatchMatMul()(weights, v)
        if q_len > 1:
            out = ops.transpose(out.reshape(batch, kv_heads, q_len, group, dim), (0, 2, 1, 3, 4))
        return out.reshape(batch, q_len, heads, dim)
