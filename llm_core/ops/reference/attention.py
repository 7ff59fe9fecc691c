"""Scaled dot-product attention in plain MindSpore operators.

Who sees whom is decided once a forward pass, by `AttentionMask`, and its result is handed to every layer's
`Attention`: what it holds is this backend's own affair.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

HIDDEN = -1e30  # added to the score of a key that a query must not see; finite, so that no row can become NaN


class AttentionMask(nn.Cell):
    """What is added to the scores of all heads: fp32 [B * heads * Sq, Sk].

    Causal, aligned bottom-right: query i sees the keys j <= i + Sk - Sq, of them only those that the optional
    arguments leave: `kv_start` int32 [B] (first real key of each row), `kv_len` int32 [B] (first key past the
    real ones), `cu_seqlens_q` and `cu_seqlens_k` int32 [B, n + 1] (packed rows: cumulative lengths of the
    documents; a query sees the keys of its own document). The first `prefix` keys are seen by every query
    whatever these say, and the others are counted from there. `bias` fp32 [1|B, heads, Sk] is added to the
    scores before they are scaled by 1 / sqrt(head_dim). dropout: whether `Attention` will be given a `keep`.
    """

    def __init__(self, heads: int, head_dim: int, prefix: int = 0, dropout: bool = False):
        super().__init__(auto_prefix=False)
        self.heads, self.scale, self.prefix = heads, head_dim**-0.5, prefix

    def construct(
        self,
        batch: int,
        q_len: int,
        k_len: int,
        kv_start: Tensor | None = None,
        kv_len: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        prefix = self.prefix
        key = ops.arange(k_len).reshape(1, 1, k_len) - prefix
        query = ops.arange(q_len).reshape(1, q_len, 1)
        visible = key <= query + (k_len - prefix - q_len)
        if kv_start is not None:
            visible = ops.logical_and(visible, key >= kv_start.reshape(batch, 1, 1))
        if kv_len is not None:
            visible = ops.logical_and(visible, key < kv_len.reshape(batch, 1, 1))
        if cu_seqlens_q is not None:
            query_document = self._document(query.reshape(1, q_len, 1), cu_seqlens_q)
            key_document = self._document(key.reshape(1, k_len, 1), cu_seqlens_k)
            visible = ops.logical_and(visible, query_document == ops.transpose(key_document, (0, 2, 1)))
        if prefix:
            visible = ops.logical_or(visible, key < 0)
        added = ops.expand_dims(ops.cast(ops.logical_not(visible), ms.float32) * HIDDEN, 1)  # [1|B, 1, Sq, Sk]
        if bias is not None:
            added = added + ops.expand_dims(bias, 2) * self.scale  # [1|B, heads, Sq, Sk]
        added = ops.tile(added, (batch // added.shape[0], self.heads // added.shape[1], 1, 1))
        return added.reshape(-1, k_len)

    def _document(self, position: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Number of the document that a position lies in: [1, S, 1], [B, n + 1] -> [B, S, 1]."""
        return ops.cast(position >= ops.expand_dims(cu_seqlens, 1), ms.int32).sum(-1, keepdims=True)


class Attention(nn.Cell):
    """softmax(q k^T / sqrt(D) + mask) v with grouped key/value heads.

    q fp32 [B, Sq, H, D]; k, v fp32 [B, Sk, Hkv, D], Sk >= Sq; mask from AttentionMask(H, D); keep (optional,
    dropout of the attention weights) fp32 [B * H * Sq, Sk], 0 or 1 / (1 - rate) -> fp32 [B, Sq, H, D].
    A query that sees no key gets some average of the values, never NaN. dropout: whether there will be a `keep`.
    bf16: products of bfloat16-rounded numbers, where the backend has them.
    """

    def __init__(self, head_dim: int, dropout: bool = False, bf16: bool = False):
        super().__init__(auto_prefix=False)
        self.core = _GroupedAttention()

    def construct(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, keep: Tensor | None = None) -> Tensor:
        batch, q_len, heads, dim = q.shape
        k_len, kv_heads = k.shape[1], k.shape[2]
        group = heads // kv_heads
        q = ops.transpose(q.reshape(batch, q_len, kv_heads, group, dim), (0, 2, 3, 1, 4))
        q = q.reshape(batch * kv_heads, group * q_len, dim) * (dim**-0.5)
        k = ops.transpose(k, (0, 2, 1, 3)).reshape(batch * kv_heads, k_len, dim)
        v = ops.transpose(v, (0, 2, 1, 3)).reshape(batch * kv_heads, k_len, dim)
        out, _ = self.core(q, k, v, mask, keep)
        out = ops.transpose(out.reshape(batch, kv_heads, group, q_len, dim), (0, 3, 1, 2, 4))
        return out.reshape(batch, q_len, heads, dim)


class _GroupedAttention(nn.Cell):
    """softmax(q k^T + mask) v: q [N, Q, D]; k, v [N, K, D]; mask and keep [N * Q, K] -> [N, Q, D] and the weights.

    The weights P come out only so that the gradient can use them. It needs dS = P (keep dP - delta) with
    dP = dO v^T and delta = rowsum(dO O) (arXiv 2307.08691, section 2.3.2); without dropout the difference
    comes out of one product, of dO with -delta appended and v with 1 appended.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.bmm = ops.BatchMatMul()
        self.bmm_ta = ops.BatchMatMul(transpose_a=True)
        self.bmm_tb = ops.BatchMatMul(transpose_b=True)
        self.row_sum = ops.ReduceSum(keep_dims=True)
        self.softmax = ops.Softmax(-1)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        shape = (q.shape[0], q.shape[1], k.shape[1])
        weights = self.softmax(self.bmm_tb(q, k).reshape(-1, k.shape[1]) + mask)
        used = weights if keep is None else weights * keep
        return self.bmm(used.reshape(shape), v), weights

    def bprop(self, q, k, v, mask, keep, out, dout):
        context, weights = out
        d_context = dout[0]
        dim, k_len = q.shape[2], k.shape[1]
        shape = (q.shape[0], q.shape[1], k_len)
        delta = self.row_sum((d_context * context).reshape(-1, dim), -1)  # [N * Q, 1]
        if keep is None:
            used = weights
            left = ops.concat((d_context, -delta.reshape(shape[0], shape[1], 1)), -1)
            right = ops.concat((v, ops.ones((shape[0], k_len, 1), v.dtype)), -1)
            d_scores = weights * self.bmm_tb(left, right).reshape(-1, k_len)
        else:
            used = weights * keep
            d_weights = self.bmm_tb(d_context, v).reshape(-1, k_len) * keep
            d_scores = weights * (d_weights - delta)
        d_scores = d_scores.reshape(shape)
        dq = self.bmm(d_scores, k)
        dk = self.bmm_ta(d_scores, q)
        dv = self.bmm_ta(used.reshape(shape), d_context)
        return dq, dk, dv, ops.zeros_like(mask), (None if keep is None else ops.zeros_like(keep))


class CacheMask(nn.Cell):
    """Which columns of a cache the new tokens see: added to their scores, fp32 [B, 1|heads, S, T].

    `columns` int32 [S] are the cache columns of the new tokens; a token sees the columns up to its own, from
    its row's first real one, kv_start int32 [B]. `bias` fp32 [B, heads, T] is added to the scores before they are
    scaled by 1 / sqrt(head_dim).
    """

    def __init__(self, head_dim: int):
        super().__init__(auto_prefix=False)
        self.scale = head_dim**-0.5

    def construct(self, columns: Tensor, kv_start: Tensor, cache_length: int, bias: Tensor | None = None) -> Tensor:
        key = ops.arange(cache_length).reshape(1, 1, cache_length)
        visible = ops.logical_and(key <= columns.reshape(1, -1, 1), key >= kv_start.reshape(-1, 1, 1))
        added = ops.expand_dims(ops.cast(ops.logical_not(visible), ms.float32) * HIDDEN, 1)
        return added if bias is None else added + ops.expand_dims(bias, 2) * self.scale


class CachedAttention(nn.Cell):
    """Attention of new tokens over a key/value cache that keeps heads outside, so that nothing is copied.

    q fp32 [B, S, H, D]; k, v fp32 [B * Hkv, T, D]; mask from CacheMask, with a bias or without ->
    fp32 [B, S, H, D]. For inference: no gradient is meant to go through it.
    """

    def __init__(self, head_dim: int):
        super().__init__(auto_prefix=False)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        batch, q_len, heads, dim = q.shape
        kv_heads, k_len = k.shape[0] // batch, k.shape[1]
        group = heads // kv_heads
        q = q.reshape(batch, q_len, kv_heads, group, dim)
        if q_len > 1:
            q = ops.transpose(q, (0, 2, 1, 3, 4))
        q = q.reshape(batch * kv_heads, q_len * group, dim) * (dim**-0.5)
        scores = ops.BatchMatMul(transpose_b=True)(q, k).reshape(batch, kv_heads, q_len, group, k_len)
        if mask.shape[1] == 1:
            mask = mask.reshape(batch, 1, q_len, 1, k_len)
        else:
            mask = ops.transpose(mask.reshape(batch, kv_heads, group, q_len, k_len), (0, 1, 3, 2, 4))
        scores = scores + mask
        weights = ops.Softmax(-1)(scores).reshape(batch * kv_heads, q_len * group, k_len)
        out = ops.BatchMatMul()(weights, v)
        if q_len > 1:
            out = ops.transpose(out.reshape(batch, kv_heads, q_len, group, dim), (0, 2, 1, 3, 4))
        return out.reshape(batch, q_len, heads, dim)
