"""Scaled dot-product attention by `ops.flash_attention_score` and `ops.fused_infer_attention_score`.

Both take float16 or bfloat16 only: queries, keys and values are rounded to bfloat16 on the way in, and the result is
cast back to float32. Queries are scaled before, in float32, and the operators get the scale 1: MindSpore's documents
disagree on whether `real_shift` is added before or after the scaling, and so it makes no difference.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from llm_core.ops.reference import attention as reference

WIDEST_HEAD, HEAD_UNIT = 512, 16  # head sizes that the operators take: multiples of 16
LARGEST_GROUP = 64  # query heads a key head, in fused_infer_attention_score

ALL_MASK, CAUSAL = 1, 3  # values of `sparse_mode`: the mask as given; bottom-right causal
CAUSAL_SIZE = 2048  # the mask that goes with CAUSAL has this many rows and columns, whatever the lengths

Mask = tuple[Tensor, "Tensor | None"]
"""Hidden keys: bool [2048, 2048] or [B, 1, Sq, Sk]; what joins the scaled scores: bf16 [1|B, H, Sq, Sk] or None."""


def attention_refusal(head_dim: int, dropout: bool) -> str:
    """Why the fused operators do not take such attention, "" if they do; its Cells are then the reference's."""
    if dropout:
        return "attention_dropout_rate is above 0"
    if head_dim % HEAD_UNIT or head_dim > WIDEST_HEAD:
        return f"head_dim {head_dim} is not a multiple of {HEAD_UNIT} up to {WIDEST_HEAD}"
    return ""


def AttentionMask(heads: int, head_dim: int, prefix: int = 0, dropout: bool = False) -> nn.Cell:
    """The Cell that makes the mask for `Attention`; called as the reference's."""
    if attention_refusal(head_dim, dropout):
        return reference.AttentionMask(heads, head_dim, prefix, dropout)
    return _HiddenKeys(head_dim, prefix)


def Attention(head_dim: int, dropout: bool = False, bf16: bool = False) -> nn.Cell:
    """softmax(q k^T / sqrt(D) + mask) v; called as the reference's. Computes in bfloat16 whatever `bf16` says."""
    if attention_refusal(head_dim, dropout):
        return reference.Attention(head_dim, dropout, bf16)
    return _Attention(head_dim)


class _HiddenKeys(nn.Cell):
    """The mask: a causal one of fixed size where nothing else is asked for, or else one with every query and key.

    Packed documents are no exception: the TND layout would skip what they do not see, but its document says that no
    document may be empty, and `cu_seqlens` of a fixed width ends in empty ones. Nor is the causal mode combined with a
    bias: in that mode `real_shift` may have a compressed form.
    """

    def __init__(self, head_dim: int, prefix: int):
        super().__init__(auto_prefix=False)
        self.scale = head_dim**-0.5
        self.added = reference.AttentionMask(1, head_dim, prefix)
        self.causal = Tensor(np.triu(np.ones((CAUSAL_SIZE, CAUSAL_SIZE), bool), 1))

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
    ) -> Mask:
        # A prefix alone changes nothing: bottom-right causality shows all of it to every query.
        if kv_start is None and kv_len is None and cu_seqlens_q is None and bias is None:
            return self.causal, None
        added = self.added(batch, q_len, k_len, kv_start, kv_len, cu_seqlens_q, cu_seqlens_k)
        return _hidden(added.reshape(batch, 1, q_len, k_len)), _shift(bias, self.scale, q_len)


def _hidden(added: Tensor) -> Tensor:
    """0 or `HIDDEN` [B, 1, Sq, Sk] -> bool; nothing is hidden from a query that saw no key, whose result is then some
    average, because the operators do not promise a finite one for a row that is hidden altogether."""
    hidden = added < 0
    return ops.logical_and(hidden, ops.logical_not(hidden.all(-1, keep_dims=True)))


def _shift(bias: Tensor | None, scale: float, q_len: int) -> Tensor | None:
    """fp32 [1|B, H, Sk], to be scaled -> bf16 [1|B, H, Sq, Sk]."""
    if bias is None:
        return None
    rows, heads, k_len = bias.shape
    return ops.broadcast_to(ops.expand_dims(ops.cast(bias * scale, ms.bfloat16), 2), (rows, heads, q_len, k_len))


class _Attention(nn.Cell):
    """q fp32 [B, Sq, H, D]; k, v fp32 [B, Sk, Hkv, D]; mask from _HiddenKeys -> fp32 [B, Sq, H, D]."""

    def __init__(self, head_dim: int):
        super().__init__(auto_prefix=False)
        self.scale = head_dim**-0.5

    def construct(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, keep: Tensor | None = None) -> Tensor:
        hidden, shift = mask
        out = ops.flash_attention_score(
            ops.cast(q * self.scale, ms.bfloat16),
            ops.cast(k, ms.bfloat16),
            ops.cast(v, ms.bfloat16),
            q.shape[2],
            real_shift=shift,
            attn_mask=hidden,
            scalar_value=1.0,
            input_layout="BSND",
            sparse_mode=CAUSAL if hidden.ndim == 2 else ALL_MASK,
        )
        return ops.cast(out, ms.float32)


def CacheMask(head_dim: int) -> nn.Cell:
    """The Cell that makes the mask for `CachedAttention`; called as the reference's."""
    return reference.CacheMask(head_dim) if attention_refusal(head_dim, dropout=False) else _HiddenColumns(head_dim)


def CachedAttention(head_dim: int) -> nn.Cell:
    """Attention of new tokens over a key/value cache; called as the reference's."""
    if attention_refusal(head_dim, dropout=False):
        return reference.CachedAttention(head_dim)
    return _CachedAttention(head_dim)


class _HiddenColumns(nn.Cell):
    """The mask: bool [B, 1, S, T], and the bias as bf16 [B, H, S, T] or None."""

    def __init__(self, head_dim: int):
        super().__init__(auto_prefix=False)
        self.scale = head_dim**-0.5
        self.added = reference.CacheMask(head_dim)

    def construct(self, columns: Tensor, kv_start: Tensor, cache_length: int, bias: Tensor | None = None) -> Mask:
        hidden = _hidden(self.added(columns, kv_start, cache_length))
        return hidden, _shift(bias, self.scale, columns.shape[0])


class _CachedAttention(nn.Cell):
    """q fp32 [B, S, H, D]; k, v fp32 [B * Hkv, T, D]; mask from _HiddenColumns -> fp32 [B, S, H, D]."""

    def __init__(self, head_dim: int):
        super().__init__(auto_prefix=False)
        self.scale = head_dim**-0.5

    def construct(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        batch, _, heads, dim = q.shape
        kv_heads, length = k.shape[0] // batch, k.shape[1]
        hidden, shift = mask
        q = ops.transpose(ops.cast(q * self.scale, ms.bfloat16), (0, 2, 1, 3))
        k = ops.cast(k, ms.bfloat16).reshape(batch, kv_heads, length, dim)
        v = ops.cast(v, ms.bfloat16).reshape(batch, kv_heads, length, dim)
        if heads <= LARGEST_GROUP * kv_heads:
            out, _ = ops.fused_infer_attention_score(
                q,
                k,
                v,
                pse_shift=shift,
                atten_mask=hidden,
                num_heads=heads,
                num_key_value_heads=kv_heads,
                scale=1.0,
                input_layout="BNSD",
                sparse_mode=ALL_MASK,
                inner_precise=0,
            )
        else:
            out = ops.flash_attention_score(
                q,
                k,
                v,
                heads,
                real_shift=shift,
                attn_mask=hidden,
                scalar_value=1.0,
                input_layout="BNSD",
                sparse_mode=ALL_MASK,
            )
        return ops.cast(ops.transpose(out, (0, 2, 1, 3)), ms.float32)
