"""The Cells around the FlashAttention kernels, whose operators are called alike on a CPU and on a GPU.

Who sees whom is decided once a forward pass, by `Ranges`: every query sees one range of keys, and the prefix.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


class Ranges(nn.Cell):
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


class FlashAttention(nn.Cell):
    """q [B, Sq, H, D]; k, v [B, Sk, K, D] -> [B, Sq, H, D], and log sum exp of the scores [B, H, Sq].

    Its operators take and give the shapes of `forward_shapes` and `backward_shapes`.
    """

    def __init__(self, forward: ops.Custom, backward: ops.Custom):
        super().__init__(auto_prefix=False)
        self.forward, self.backward = forward, backward

    def construct(self, q, k, v, ranges, bias, prefix):
        return self.forward(q, k, v, ranges, bias, prefix)

    def bprop(self, q, k, v, ranges, bias, prefix, out, dout):
        dq, dk, dv = self.backward(q, k, v, ranges, bias, prefix, out[0], out[1], dout[0])
        return dq, dk, dv, ops.zeros_like(ranges), ops.zeros_like(bias), ops.zeros_like(prefix)


def forward_shapes(q, k, v, ranges, bias, prefix):
    """Of the output and of the scores' log sum exp."""
    return q, [q[0], q[2], q[1]]


def backward_shapes(q, k, v, *rest):
    """Of the gradients to q, k and v."""
    return q, k, v


class CacheColumns(nn.Cell):
    """The mask: the columns of the new tokens, each row's first real one, and the bias, as they are."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.no_bias = Tensor(np.zeros(1, np.float32))

    def construct(
        self, columns: Tensor, kv_start: Tensor, cache_length: int, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.cast(columns, ms.int32), kv_start, (self.no_bias if bias is None else bias)


class CachedAttention(nn.Cell):
    """q fp32 [B, S, H, D]; k, v fp32 [B * Hkv, T, D]; mask from CacheColumns -> fp32 [B, S, H, D]."""

    def __init__(self, forward: ops.Custom):
        super().__init__(auto_prefix=False)
        self.forward = forward

    def construct(self, q: Tensor, k: Tensor, v: Tensor, mask: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        columns, kv_start, bias = mask
        return self.forward(q, k, v, columns, kv_start, bias)
