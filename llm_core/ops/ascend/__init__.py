"""MindSpore's fused Ascend operators behind the names and calls of llm_core/ops/reference.

Written from the documentation of these operators and tested without an Ascend device, see docs/kernels.md.
"""

from __future__ import annotations

from llm_core.ops.ascend.attention import Attention, AttentionMask, CachedAttention, CacheMask, attention_refusal
from llm_core.ops.ascend.elementwise import Gelu, LayerNorm, RmsNorm, Rope, SwiGlu
from llm_core.ops.ascend.linear import EmbeddingLookup, LinearProduct
from llm_core.ops.ascend.loss import LinearNll, TokenNll
from llm_core.ops.reference.dropout import Dropout

# `ops.Adam`, on which the reference builds, is itself a fused operator there. `AdamW` is none for a compiled step: it
# wants the learning rate as a Python number.
from llm_core.ops.reference.optimizer import AdamUpdate, SquaredNorm

__all__ = [
    "AdamUpdate",
    "Attention",
    "AttentionMask",
    "CacheMask",
    "CachedAttention",
    "Dropout",
    "EmbeddingLookup",
    "Gelu",
    "LayerNorm",
    "LinearNll",
    "LinearProduct",
    "RmsNorm",
    "Rope",
    "SquaredNorm",
    "SwiGlu",
    "TokenNll",
    "attention_refusal",
    "bf16_refusal",
]


def bf16_refusal() -> str:
    """Why products of bfloat16 numbers cannot be had: they can."""
    return ""
