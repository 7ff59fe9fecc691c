"""Plain MindSpore implementations: the oracle of every other backend."""

from __future__ import annotations

from llm_core.ops.reference.attention import Attention, AttentionMask, CachedAttention, CacheMask
from llm_core.ops.reference.dropout import Dropout
from llm_core.ops.reference.elementwise import Gelu, LayerNorm, RmsNorm, Rope, SwiGlu
from llm_core.ops.reference.linear import EmbeddingLookup, LinearProduct
from llm_core.ops.reference.loss import LinearNll, TokenNll
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


def attention_refusal(head_dim: int, dropout: bool) -> str:
    """Why attention would be another backend's: this one takes all."""
    return ""


def bf16_refusal() -> str:
    """Why products of bfloat16 numbers cannot be had."""
    return "MindSpore has no others on a CPU"
