"""Plain MindSpore implementations: the oracle of every other backend."""

from __future__ import annotations

from llm_core.ops.reference.attention import Attention, AttentionMask, CachedAttention, CacheMask
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
]
