"""Scaled dot-product attention by the FlashAttention kernels."""

from __future__ import annotations

from mindspore import Tensor, nn

from llm_core.ops import flash_attention as flash
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
    return flash.Ranges(prefix)


def Attention(head_dim: int, dropout: bool = False, bf16: bool = False) -> nn.Cell:
    """softmax(q k^T / sqrt(D) + mask) v; called as the reference's. bf16: products of bfloat16-rounded numbers."""
    if attention_refusal(head_dim, dropout):
        return reference.Attention(head_dim, dropout, bf16)
    return _Attention(bf16)


class _Attention(nn.Cell):
    def __init__(self, bf16: bool):
        super().__init__(auto_prefix=False)
        suffix = "_bf16" if bf16 and not bf16_refusal() else ""
        self.core = flash.FlashAttention(
            kernel(f"attention_forward{suffix}", flash.forward_shapes, 2),
            kernel(f"attention_backward{suffix}", flash.backward_shapes, 3),
        )

    def construct(
        self, q: Tensor, k: Tensor, v: Tensor, mask: tuple[Tensor, Tensor, Tensor], keep: Tensor | None = None
    ) -> Tensor:
        ranges, bias, prefix = mask
        return self.core(q, k, v, ranges, bias, prefix)[0]


def CacheMask(head_dim: int) -> nn.Cell:
    """The Cell that makes the mask for `CachedAttention`; called as the reference's."""
    return reference.CacheMask(head_dim) if attention_refusal(head_dim, dropout=False) else flash.CacheColumns()


def CachedAttention(head_dim: int) -> nn.Cell:
    """Attention of new tokens over a key/value cache; called as the reference's."""
    if attention_refusal(head_dim, dropout=False):
        return reference.CachedAttention(head_dim)
    return flash.CachedAttention(kernel("attention_cached", lambda q, *rest: q))
