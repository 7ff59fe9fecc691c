"""bfloat16 in NumPy, which has no such type."""

from __future__ import annotations

import numpy as np


def rounded(x: np.ndarray) -> np.ndarray:
    """fp32 numbers to the nearest bfloat16, ties to even; as their bits, uint16."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    """The fp32 numbers that bfloat16 bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of every number, as fp32."""
    return widened(rounded(x.astype(np.float32)))
