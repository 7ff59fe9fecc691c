"""RMSNorm, rotary positions and SwiGLU in plain MindSpore operators."""

from __future__ import annotations

from mindspore import Tensor, nn, ops


class RmsNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x fp32 [N, D], weight fp32 [D] (arXiv 1910.07467)."""

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = eps

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        mean_square = ops.ReduceMean(keep_dims=True)(ops.square(x), -1)
        return x * ops.rsqrt(mean_square + self.eps) * weight


class Rope(nn.Cell):
    """Turn channel pairs (i, i + D/2) of every head by an angle per position (arXiv 2104.09864).

    x fp32 [..., D]; cos and sin broadcast against it, sin with the first half negated (see models/rope.py).
    """

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = ops.split(x, x.shape[-1] // 2, -1)
        return x * cos + ops.concat((high, low), -1) * sin


class SwiGlu(nn.Cell):
    """silu(gate) * up, elementwise (arXiv 2002.05202)."""

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * ops.sigmoid(gate) * up
