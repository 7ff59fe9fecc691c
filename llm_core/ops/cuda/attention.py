"""Scaled dot-product attention by the FlashAttention kernels of kernels/cuda."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from llm_core import kernels
from llm_core.ops import flash_attention as flash
from llm_core.ops.custom import operator
from llm_core.ops.reference import attention as reference

WIDEST_HEAD = 128


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
    return flash.Ranges(prefix)


def Attention(head_dim: int, dropout: bool = False, bf16: bool = False) -> nn.Cell:
    """softmax(q k^T / sqrt(D) + mask) v; called as the reference's. bf16: all its numbers are bfloat16, but sums."""
    if attention_refusal(head_dim, dropout):
        return reference.Attention(head_dim, dropout, bf16)
    return _Attention(ms.bfloat16 if bf16 else ms.float32)


class _Attention(nn.Cell):
    """dtype: that of the numbers the kernels read and write; what comes in and goes out is float32."""

    def __init__(self, dtype):
        super().__init__(auto_prefix=False)
        self.dtype = dtype
        library = kernels.cuda_library().path
        self.core = flash.FlashAttention(
            operator(library, "attention_forward", flash.forward_shapes, (dtype, ms.float32)),
            operator(library, "attention_backward", flash.backward_shapes, (dtype,) * 3),
        )

    def construct(
        self, q: Tensor, k: Tensor, v: Tensor, mask: tuple[Tensor, Tensor, Tensor], keep: Tensor | None = None
    ) -> Tensor:
        ranges, bias, prefix = mask
        q, k, v = ops.cast(q, self.dtype), ops.cast(k, self.dtype), ops.cast(v, self.dtype)
        return ops.cast(self.core(q, k, v, ranges, bias, prefix)[0], ms.float32)


def CacheMask(head_dim: int) -> nn.Cell:
    """The Cell that makes the mask for `CachedAttention`; called as the reference's."""
    return reference.CacheMask(head_dim) if attention_refusal(head_dim, dropout=False) else flash.CacheColumns()


def CachedAttention(head_dim: int) -> nn.Cell:
    """Attention of new tokens over a key/value cache; called as the reference's."""
    if attention_refusal(head_dim, dropout=False):
        return reference.CachedAttention(head_dim)
    library = kernels.cuda_library().path
    return flash.CachedAttention(operator(library, "attention_cached", lambda q, *rest: q, (ms.float32,)))
