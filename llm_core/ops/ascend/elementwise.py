"""Norms, rotary positions and activations. These operators take float32 as it is."""

from __future__ import annotations

from mindspore import Tensor, mint, nn, ops
from mindspore.ops.auto_generate import RmsNorm as FusedRmsNorm


class RmsNorm(nn.Cell):
    """As the reference's: x fp32 [N, D], weight fp32 [D] -> fp32 [N, D]."""

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        # Not the function ops.rms_norm, whose signature is about to change.
        self.norm = FusedRmsNorm(eps)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.norm(x, weight)[0]


class LayerNorm(nn.Cell):
    """As the reference's: x fp32 [N, D], weight and bias fp32 [D] -> fp32 [N, D]."""

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.norm = ops.LayerNorm(begin_norm_axis=1, begin_params_axis=1, epsilon=eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.norm(x, weight, bias)[0]


class Rope(nn.Cell):
    """As the reference's: q fp32 [B, S, H, D], k fp32 [B, S, Hkv, D], cos and sin fp32 [1|B, S, 1, D] -> q, k.

    The operator forms x cos + (-high, low) sin, where the reference has x cos + (high, low) sin with a sin whose first
    half is negated. The gradient is the same turn with the halves of sin exchanged, that is, by the opposite angle.
    """

    def construct(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        low, high = ops.split(sin, sin.shape[-1] // 2, -1)
        return self._turn(q, cos, low, high), self._turn(k, cos, low, high)

    def bprop(self, q, k, cos, sin, out, dout):
        low, high = ops.split(sin, sin.shape[-1] // 2, -1)
        dq, dk = self._turn(dout[0], cos, high, low), self._turn(dout[1], cos, high, low)
        return dq, dk, ops.zeros_like(cos), ops.zeros_like(sin)

    def _turn(self, x: Tensor, cos: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return ops.rotary_position_embedding(x, cos, ops.concat((-low, high), -1), 0)  # 0: pairs (i, i + D/2)


class SwiGlu(nn.Cell):
    """As the reference's: silu(gate) * up, two fp32 [N, F] -> fp32 [N, F]. The operator wants both in one tensor."""

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.swiglu(ops.concat((gate, up), -1), -1)


class Gelu(nn.Cell):
    """As the reference's: x * Phi(x), fp32, shape kept."""

    def construct(self, x: Tensor) -> Tensor:
        return mint.nn.functional.gelu(x, approximate="none")  # ops.gelu is composed of small operators
