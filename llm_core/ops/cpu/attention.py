"""Scaled dot-product attention by the FlashAttention kernels.

Who sees whom is decided once a forward pass, by `AttentionMask`: every query sees one range of keys, and the prefix.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from llm_core.ops.cpu.custom import bf16_refusal, kernel
from llm_core.ops.reference import attention as reference

WIDEST_HEAD = 256


def attention_refusal(head_dim: int, dropout: bool) -> str:
    """Why the kernels do not take such attention, "" if they do; its Cells are then the reference's."""
    if dropout:
        return "attention_dropout_rate is above 0"
    if head_dim > WIDEST_HEAD:
        return f"head_dim {head_dim} is above {WIDEST_HEAD}"
    return ""


def AttentionMask(heads: int, head_dim: int, prefix: int = 0, dropout: bool = False) -> nn.Cell:
    """The Cell that makes the mask for `Attention`; called as the reference's."""
    if attention_refusal(head_dim, dropout):
        return reference.AttentionMask(heads, head_dim, prefix, dropout)
    return _Ranges(prefix)


def Attention(head_dim: int, dropout: bool = False, bf16: bool = False) -> nn.Cell:
    """softmax(q k^T / sqrt(D) + mask) v; called as the reference's. bf16: products of bfloat16-rounded numbers."""
    if attention_refusal(head_dim, dropout):
        return reference.Attention(head_dim, dropout, bf16)
    return _Attention(bf16)


class _Ranges(nn.Cell):
    """The mask: (first key and end of the range that each query sees, int32 [1|B, Sq, 2]; bias; prefix int32 [1])."""

    def __init__(self, prefix: int):
        super().__init__(auto_prefix=False)
        self.prefix = prefix
        self.prefix_tensor = Tensor(np.array([prefix], np.int32))
        self.no_bias = Tensor(np.zeros(1, np.float32))

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys = k_len - self.prefix  # those that the ranges are about
        query = ops.cast(ops.arange(q_len), ms.int32).reshape(1, q_len)
        start, end = ops.zeros_like(query), query + (keys - q_len + 1)
        if cu_seqlens_q is not None:
            rows = cu_seqlens_k.shape[0]
            first, last = ops.zeros((rows, 1), ms.int32), ops.ones((rows, 1), ms.int32) * keys
            edges = ops.concat((first, cu_seqlens_k, last), 1)  # of documents 0, 1, ...
            document = query.reshape(1, q_len, 1) >= ops.expand_dims(cu_seqlens_q, 1)
            document = ops.cast(ops.cast(document, ms.int32).sum(-1), ms.int32)
            start, end = self._pick(edges, document), ops.minimum(end, self._pick(edges, document + 1))
        if kv_start is not None:
            start = ops.maximum(start, kv_start.reshape(batch, 1))
        if kv_len is not None:
            end = ops.minimum(end, kv_len.reshape(batch, 1))
        end = ops.clamp(end, 0, keys)
        start = ops.minimum(start, end)
        end = ops.maximum(end, start)  # a range for every row, or one for all
        ranges = ops.stack((start, end), -1) + self.prefix
        return ranges, (self.no_bias if bias is None else bias), self.prefix_tensor

    def _pick(self, edges: Tensor, column: Tensor) -> Tensor:
        """edges int32 [B, n] at column int32 [B, S] -> [B, S]."""
        return ops.gather_elements(edges, 1, column)


class _Attention(nn.Cell):
    def __init__(self, bf16: bool):
        super().__init__(auto_prefix=False)
        self.core = _FlashAttention("_bf16" if bf16 and not bf16_refusal() else "")

    def construct(
        self, q: Tensor, k: Tensor, v: Tensor, mask: tuple[Tensor, Tensor, Tensor], keep: Tensor | None = None
    ) -> Tensor:
        ranges, bias, prefix = mask
        return self.core(q, k, v, ranges, bias, prefix)[0]


class _FlashAttention(nn.Cell):
    """q [B, Sq, H, D]; k, v [B, Sk, K, D] -> [B, Sq, H, D], and log sum exp of the scores [B, H, Sq]."""

    def __init__(self, suffix: str):
        super().__init__(auto_prefix=False)
        self.forward = kernel(f"attention_forward{suffix}", _forward_shapes, 2)
        self.backward = kernel(f"attention_backward{suffix}", lambda q, k, v, *rest: (q, k, v), 3)

    def construct(self, q, k, v, ranges, bias, prefix):
        return self.forward(q, k, v, ranges, bias, prefix)

    def bprop(self, q, k, v, ranges, bias, prefix, out, dout):
        dq, dk, dv = self.backward(q, k, v, ranges, bias, prefix, out[0], out[1], dout[0])
        return dq, dk, dv, ops.zeros_like(ranges), ops.zeros_like(bias), ops.zeros_like(prefix)


def _forward_shapes(q, k, v, ranges, bias, prefix):
    return q, [q[0], q[2], q[1]]


def CacheMask(head_dim: int) -> nn.Cell:
    """The Cell that makes the mask for `CachedAttention`; called as the reference's."""
    return reference.CacheMask(head_dim) if attention_refusal(head_dim, dropout=False) else _CacheColumns()


def CachedAttention(head_dim: int) -> nn.Cell:
    """Attention of new tokens over a key/value cache; called as the reference's."""
    return reference.CachedAttention(head_dim) if attention_refusal(head_dim, dropout=False) else _CachedAttention()


class _CacheColumns(nn.Cell):
    """The mask: the columns of the new tokens, each row's first real one, and the bias, as they are."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.no_bias = Tensor(np.zeros(1, np.float32))

    def construct(
        self, columns: Tensor, kv_start: Tensor, cache_length: int, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.cast(columns, ms.int32), kv_start, (self.no_bias if bias is None else bias)


class _CachedAttention(nn.Cell):
    """q fp32 [B, S, H, D]; k, v fp32 [B * Hkv, T, D]; mask from _CacheColumns -> fp32 [B, S, H, D]."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = kernel("attention_cached", lambda q, *rest: q)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, mask: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        columns, kv_start, bias = mask
        return self.forward(q, k, v, columns, kv_start, bias)
