"""One operator a call: norm, rotary positions, activation, attention, token loss, dropout.

The model builds these operators once and calls them; which implementation stands behind a name is decided here
and nowhere else. At present there is one, `reference`: plain MindSpore operators that run on every device, and
the oracle that every faster implementation is tested against.
"""

from __future__ import annotations

from llm_core.ops.reference.attention import Attention, AttentionMask, CachedAttention, CacheMask
from llm_core.ops.reference.dropout import Dropout, DropoutMask, dropout_key
from llm_core.ops.reference.elementwise import Gelu, LayerNorm, RmsNorm, Rope, SwiGlu
from llm_core.ops.reference.loss import TokenNll

__all__ = [
    "Attention",
    "AttentionMask",
    "CacheMask",
    "CachedAttention",
    "Dropout",
    "DropoutMask",
    "Gelu",
    "LayerNorm",
    "RmsNorm",
    "Rope",
    "SwiGlu",
    "TokenNll",
    "backend",
    "dropout_key",
]


def backend() -> tuple[str, str]:
    """The implementation in use and the reason for it, for one line of a run's log."""
    return "reference", "plain MindSpore operators"
