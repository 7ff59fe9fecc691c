"""The C++ kernels of llm_core/kernels as MindSpore's operators: the names and calls of llm_core/ops/reference."""

from __future__ import annotations

from llm_core.ops.cpu.attention import Attention, AttentionMask, CachedAttention, CacheMask, attention_refusal
from llm_core.ops.cpu.custom import bf16_refusal
from llm_core.ops.cpu.decode import DecodeLayer
from llm_core.ops.cpu.dropout import Dropout
from llm_core.ops.cpu.elementwise import Gelu, LayerNorm, RmsNorm, Rope, SwiGlu
from llm_core.ops.cpu.linear import EmbeddingLookup, LinearProduct
from llm_core.ops.cpu.loss import LinearNll, TokenNll
from llm_core.ops.cpu.optimizer import AdamUpdate, SquaredNorm

__all__ = [
    "AdamUpdate",
    "Attention",
    "AttentionMask",
    "CacheMask",
    "CachedAttention",
    "DecodeLayer",
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
