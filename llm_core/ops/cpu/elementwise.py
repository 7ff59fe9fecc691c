"""Norms, rotary positions and activations. Each inner Cell also returns what only its gradient uses."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops

from llm_core.ops.cpu.custom import kernel


class RmsNorm(nn.Cell):
    """As the reference's: x fp32 [N, D], weight fp32 [D] -> fp32 [N, D]."""

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.core = _RmsNorm(eps)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.core(x, weight)[0]


class _RmsNorm(nn.Cell):
    """The norm, and 1 / sqrt(mean(x^2) + eps) of each row."""

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = Tensor(np.array([eps], np.float32))
        self.forward = kernel("rms_norm_forward", lambda x, w, eps: (x, x[:1]), 2)
        self.backward = kernel("rms_norm_backward", lambda x, w, rstd, dy: (x, w), 2)

    def construct(self, x, weight):
        return self.forward(x, weight, self.eps)

    def bprop(self, x, weight, out, dout):
        return self.backward(x, weight, out[1], dout[0])


class LayerNorm(nn.Cell):
    """As the reference's: x fp32 [N, D], weight and bias fp32 [D] -> fp32 [N, D]."""

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.core = _LayerNorm(eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.core(x, weight, bias)[0]


class _LayerNorm(nn.Cell):
    """The norm, and mean and 1 / standard deviation of each row."""

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = Tensor(np.array([eps], np.float32))
        self.forward = kernel("layer_norm_forward", lambda x, w, b, eps: (x, x[:1], x[:1]), 3)
        self.backward = kernel("layer_norm_backward", lambda x, w, mean, rstd, dy: (x, w, w), 3)

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias, self.eps)

    def bprop(self, x, weight, bias, out, dout):
        return self.backward(x, weight, out[1], out[2], dout[0])


class Rope(nn.Cell):
    """As the reference's: q fp32 [B, S, H, D], k fp32 [B, S, Hkv, D], cos and sin fp32 [1|B, S, 1, D] -> q, k."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = kernel("rope_forward", lambda q, k, cos, sin: (q, k), 2)
        self.backward = kernel("rope_backward", lambda q, k, cos, sin: (q, k), 2)

    def construct(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(q, k, cos, sin)

    def bprop(self, q, k, cos, sin, out, dout):
        dq, dk = self.backward(dout[0], dout[1], cos, sin)
        return dq, dk, ops.zeros_like(cos), ops.zeros_like(sin)


class SwiGlu(nn.Cell):
    """As the reference's: silu(gate) * up, two fp32 [N, F] -> fp32 [N, F]."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = kernel("swiglu_forward", lambda gate, up: gate)
        self.backward = kernel("swiglu_backward", lambda gate, up, dy: (gate, gate), 2)

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.forward(gate, up)

    def bprop(self, gate, up, out, dout):
        return self.backward(gate, up, dout)


class Gelu(nn.Cell):
    """As the reference's: x * Phi(x), fp32 [N, F] -> fp32 [N, F]."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = kernel("gelu_forward", lambda x: x)
        self.backward = kernel("gelu_backward", lambda x, dy: x)

    def construct(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def bprop(self, x, out, dout):
        return (self.backward(x, dout),)
