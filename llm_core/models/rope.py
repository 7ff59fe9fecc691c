"""Rotary position embedding: frequencies of every scaling method, and cos and sin of the positions.

Frequencies are made once on the host and rounded to fp32, as are the angles: that is what published checkpoints
were trained with.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from llm_core.models.spec import RopeSpec


def rope_frequencies(rope: RopeSpec, head_dim: int, length: int = 0) -> tuple[np.ndarray, float]:
    """Angle per position of each channel pair, fp32 [head_dim / 2], and the factor on cos and sin.

    `length` is the current sequence length; only dynamic_ntk depends on it (and only beyond original_length).
    linear is position interpolation (arXiv 2306.15595), yarn arXiv 2309.00071; ntk multiplies the base, as
    MindFormers does, dynamic_ntk lets it grow with the sequence, as HF's "dynamic"; llama3 is Llama 3.1's rule.
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
        wavelength_ratio = rope.original_length / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength_ratio) / (2 * math.log(rope.theta))

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
    """Short waves stay, waves longer than the trained length are slowed by the factor, the rest is blended."""
    turns = rope.original_length * plain.astype(np.float64) / (2 * math.pi)  # over the trained length
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return (plain / rope.factor * (1 - kept) + plain * kept).astype(np.float32)


class RotaryAngles(nn.Cell):
    """cos and sin of positions: int32 [N, S] -> two fp32 [N, S, 1, head_dim], for `ops.Rope`.

    Both halves of a head turn by the same angle, so a row is (c, c) and (-s, s). `length` int32 [] or [N] is the
    current sequence length, of all rows or of each, which only dynamic_ntk needs; it knows lengths up to `max_length`
    and refuses longer ones when the graph is compiled.
    """

    def __init__(self, rope: RopeSpec, head_dim: int, max_length: int):
        super().__init__(auto_prefix=False)
        self.dynamic = rope.method == "dynamic_ntk"
        self.shortest, self.max_length = rope.original_length, max_length
        lengths = range(self.shortest, max(max_length, self.shortest) + 1) if self.dynamic else (0,)
        rows, self.scale = zip(*(rope_frequencies(rope, head_dim, n) for n in lengths), strict=True)
        self.scale = self.scale[0]
        self.frequencies = Tensor(np.stack(rows))  # [lengths, head_dim / 2]

    def construct(self, positions: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = self.frequencies
        if self.dynamic:
            frequencies = ops.gather(frequencies, ops.maximum(length - self.shortest, 0).reshape(-1), 0)
        rows, width = positions.shape
        if self.dynamic and width > max(self.max_length, self.shortest):
            raise ValueError("the sequence is longer than max_length, up to which dynamic_ntk has frequencies")
        angles = ops.cast(positions, ms.float32).reshape(rows, width, 1) * ops.expand_dims(frequencies, 1)
        cos, sin = ops.cos(angles) * self.scale, ops.sin(angles) * self.scale
        shape = (rows, width, 1, 2 * frequencies.shape[1])
        return ops.concat((cos, cos), -1).reshape(shape), ops.concat((-sin, sin), -1).reshape(shape)
