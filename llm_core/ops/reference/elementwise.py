"""Norms, rotary positions and activations in plain MindSpore operators.

Two facts of the CPU shape the formulas: a product with a broadcast operand costs about four plain products, so
an outer product is formed by MatMul first; and sums over an axis are fast only for two-dimensional tensors.
"""

from __future__ import annotations

import math

from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import SigmoidGrad


class RmsNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x fp32 [N, D], weight fp32 [D] -> fp32 [N, D].

    Source: arXiv 1910.07467. The gradient is written out: with r = 1 / sqrt(mean(x^2) + eps) and t = dy * x,
    dx = dy * (r weight) - x * r^3 (t weight) / D, dweight = r^T t.
    """

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = eps
        self.mean = ops.ReduceMean(keep_dims=True)
        self.product = ops.MatMul()
        self.product_ta = ops.MatMul(transpose_a=True)

    def _inverse_rms(self, x: Tensor) -> Tensor:
        return ops.rsqrt(self.mean(ops.square(x), -1) + self.eps)  # [N, 1]

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * self.product(self._inverse_rms(x), weight.reshape(1, -1))

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        size = x.shape[-1]
        r = self._inverse_rms(x)
        t = dout * x
        pull = r * r * r * self.product(t, weight.reshape(-1, 1)) / size  # [N, 1]
        dx = dout * self.product(r, weight.reshape(1, -1)) - x * self.product(pull, ops.ones((1, size), x.dtype))
        return dx, self.product_ta(r, t).reshape(-1)


class LayerNorm(nn.Cell):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis: x fp32 [N, D], weight, bias fp32 [D].

    Source: arXiv 1607.06450; var divides by D. The gradient is written out: with c = x - mean(x),
    r = 1 / sqrt(mean(c^2) + eps) and t = dy * weight, dx = r t - r mean(t) - c * r^3 mean(t c),
    dweight = r^T (dy * c), dbias = sum of the rows of dy.
    """

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = eps
        self.mean = ops.ReduceMean(keep_dims=True)
        self.product = ops.MatMul()
        self.product_ta = ops.MatMul(transpose_a=True)
        self.add_bias = ops.BiasAdd()

    def _centred(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x - mean(x) [N, D], 1 / standard deviation [N, 1], and a row of ones [1, D]."""
        ones = ops.ones((1, x.shape[-1]), x.dtype)
        centred = x - self.product(self.mean(x, -1), ones)
        return centred, ops.rsqrt(self.mean(ops.square(centred), -1) + self.eps), ones

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred, r, _ = self._centred(x)
        return self.add_bias(centred * self.product(r, weight.reshape(1, -1)), bias)

    def bprop(self, x, weight, bias, out, dout):
        size = x.shape[-1]
        column = weight.reshape(-1, 1)
        centred, r, ones = self._centred(x)
        pull = dout * centred
        shift = r * self.product(dout, column) / size  # [N, 1]
        slope = r * r * r * self.product(pull, column) / size  # [N, 1]
        dx = dout * self.product(r, weight.reshape(1, -1)) - centred * self.product(slope, ones)
        dx = dx - self.product(shift, ones)
        return dx, self.product_ta(r, pull).reshape(-1), self.product_ta(ops.ones_like(r), dout).reshape(-1)


class Rope(nn.Cell):
    """Turn channel pairs (i, i + D/2) of every head by an angle per position (arXiv 2104.09864).

    q fp32 [B, S, H, D], k fp32 [B, S, Hkv, D]; cos and sin fp32 [1|B, S, 1, D], sin with the first half negated
    (see models/rope.py) -> q and k turned. cos and sin get no gradient.
    """

    def construct(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = ops.split(x, x.shape[-1] // 2, -1)
        return x * cos + ops.concat((high, low), -1) * sin


class SwiGlu(nn.Cell):
    """silu(gate) * up, elementwise (arXiv 2002.05202): two fp32 tensors of one shape -> the same shape."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.core = _SigmoidGate()

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.core(gate, up)[0]


class _SigmoidGate(nn.Cell):
    """gate * s * up with s = sigmoid(gate), and s, which only the gradient uses: d silu = s + gate * s (1 - s)."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.sigmoid = ops.Sigmoid()
        self.sigmoid_grad = SigmoidGrad()

    def construct(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        s = self.sigmoid(gate)
        return gate * s * up, s

    def bprop(self, gate, up, out, dout):
        s = out[1]
        d_gate = dout[0] * up * (s + self.sigmoid_grad(s, gate))
        return d_gate, dout[0] * (gate * s)


class Gelu(nn.Cell):
    """x * Phi(x), elementwise, with the error function (arXiv 1606.08415, not its tanh form): fp32, shape kept."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.core = _NormalGate()

    def construct(self, x: Tensor) -> Tensor:
        return self.core(x)[0]


class _NormalGate(nn.Cell):
    """x * p with p = Phi(x), and p, which only the gradient uses: d gelu = p + x * exp(-x^2 / 2) / sqrt(2 pi)."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.erf = ops.Erf()
        self.inverse_root_2, self.density_at_0 = 0.5**0.5, (2 * math.pi) ** -0.5

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.erf(x * self.inverse_root_2) * 0.5 + 0.5
        return x * p, p

    def bprop(self, x, out, dout):
        return (dout[0] * (out[1] + x * ops.exp(ops.square(x) * -0.5) * self.density_at_0),)
