"""The CUDA kernels of llm_core/kernels as MindSpore's operators for a GPU: attention; all else is the reference's.

Tested with the kernels' emulator in place of a GPU: no MindSpore wheel is for a GPU that these kernels are for.
"""

from __future__ import annotations

from llm_core.ops.cuda.attention import Attention, AttentionMask, CachedAttention, CacheMask, attention_refusal
from llm_core.ops.reference import (
    AdamUpdate,
    Dropout,
    EmbeddingLookup,
    Gelu,
    LayerNorm,
    LinearNll,
    LinearProduct,
    RmsNorm,
    Rope,
    SquaredNorm,
    SwiGlu,
    TokenNll,
)

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
    """Why products of bfloat16 numbers, beside those of attention, cannot be had."""
    return "only attention has kernels for bfloat16"
