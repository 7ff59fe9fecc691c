"""Rotary position embedding: frequencies of every scaling method, and the tables the model indexes.

All of it is numpy on the host, once per model: the graph only sees ready cos and sin. The angles are rounded
the way the published checkpoints were trained (frequencies and angles in fp32), their cos and sin are exact.
"""

from __future__ import annotations

import math

import numpy as np

from llm_core.models.spec import RopeSpec


def rope_frequencies(rope: RopeSpec, head_dim: int, length: int = 0) -> tuple[np.ndarray, float]:
    """Angle per position of each channel pair, fp32 [head_dim / 2], and the factor on cos and sin.

    `length` is the current sequence length; only dynamic_ntk depends on it (and only beyond original_length).
    linear is position interpolation (arXiv 2306.15595), yarn arXiv 2309.00071; ntk multiplies the base as
    MindFormers does, dynamic_ntk grows it with the sequence as HF's "dynamic"; llama3 is Llama 3.1's rule.
    """
    if rope.method == "ntk":
        return _frequencies(rope.theta * rope.factor, head_dim), 1.0
    if rope.method == "dynamic_ntk":
        growth = rope.factor * max(length, rope.original_length) / rope.original_length - (rope.factor - 1)
        return _frequencies(rope.theta * growth ** (head_dim / (head_dim - 2)), head_dim), 1.0
    plain = _frequencies(rope.theta, head_dim)
    if rope.method == "linear":
        return (plain / np.float32(rope.factor)).astype(np.float32), 1.0
    if rope.method == "yarn":
        return _yarn(rope, head_dim, plain)
    if rope.method == "llama3":
        return _llama3(rope, plain), 1.0
    return plain, 1.0


def _frequencies(theta: float, head_dim: int) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return (1.0 / theta**exponents).astype(np.float32)


def _yarn(rope: RopeSpec, head_dim: int, plain: np.ndarray) -> tuple[np.ndarray, float]:
    """Blend: fast channels keep their frequency, slow ones are interpolated, a linear ramp lies between."""

    def channel_of(rotations: float) -> float:
        """Channel pair that turns `rotations` times over the trained length."""
        return head_dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    def attention_scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    low = max(math.floor(channel_of(rope.beta_fast)), 0)
    high = min(math.ceil(channel_of(rope.beta_slow)), head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / width, 0, 1)
    frequencies = plain / rope.factor * interpolated + plain * (1 - interpolated)
    if rope.attention_factor is not None:
        scale = rope.attention_factor
    elif rope.mscale and rope.mscale_all_dim:
        scale = attention_scale(rope.mscale) / attention_scale(rope.mscale_all_dim)
    else:
        scale = attention_scale(1.0)
    return frequencies.astype(np.float32), scale


def _llama3(rope: RopeSpec, plain: np.ndarray) -> np.ndarray:
    """Short waves stay, waves longer than the trained length are divided by the factor, the rest is blended."""
    turns = rope.original_length * plain.astype(np.float64) / (2 * math.pi)  # over the trained length
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return (plain / rope.factor * (1 - kept) + plain * kept).astype(np.float32)


def rope_tables(rope: RopeSpec, head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, fp32 [length, head_dim], for positions 0..length-1 of a sequence of that length.

    The two halves of a row are equal up to the sign of sin: the rotation is
    `x * cos + swap(x) * sin`, where swap exchanges the halves of a head and sin carries the minus of the
    first half (rotate_half of HF).
    """
    frequencies, scale = rope_frequencies(rope, head_dim, length)
    return angles_to_tables(np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :], scale)


def angles_to_tables(angles: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and signed sin, fp32 [..., 2n], of fp32 angles [..., n], both times `scale`."""
    cos = (np.cos(angles.astype(np.float64)) * scale).astype(np.float32)
    sin = (np.sin(angles.astype(np.float64)) * scale).astype(np.float32)
    return np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)
