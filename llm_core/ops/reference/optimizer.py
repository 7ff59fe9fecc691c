"""What an optimizer does to every parameter, in plain MindSpore operators: Adam's update, the squared norm.

On a CPU `ops.Adam` is the one fused kernel of MindSpore worth having (15.7M parameters, 2 cores: Adam alone 14 ms,
with the gradient's coefficient 18, with decoupled decay as well 27; `ops.AdamWeightDecay` 110, plain operators 150),
so Adam, AdamW and FP32StateAdamWeightDecay are three ways of feeding it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops


class AdamUpdate(nn.Cell):
    """One step of the Adam family for one parameter, which is updated in place together with its moments.

    Called as update(param, m, v, grad, settings, decays): grad fp32 of param's shape, `settings` what
    `settings(lr, step, coef)` made of this step's numbers (once for all parameters), decays: whether weight decay
    applies to this parameter.

    decoupled: weights shrink by lr * weight_decay before the update (AdamW); otherwise decay joins the gradient (L2).
    bias_correction: off is FP32StateAdamWeightDecay's rule. eps: added outside the bias-corrected square root, as
    torch does.
    """

    def __init__(
        self, betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool, bias_correction: bool
    ):
        super().__init__(auto_prefix=False)
        self.weight_decay, self.decoupled, self.bias_correction = weight_decay, decoupled, bias_correction
        self.beta1, self.beta2 = betas
        self.log_beta1, self.log_beta2 = math.log(self.beta1), math.log(self.beta2)
        # The kernel forms 1 - beta in fp32: for 0.999 that is 5e-5 off. m and v come out too large by these
        # constant factors, which the learning rate and eps can undo.
        self.m_gain = _fp32_complement(self.beta1) / (1 - self.beta1)
        self.v_gain = math.sqrt(_fp32_complement(self.beta2) / (1 - self.beta2))
        self.eps = eps
        self.kernel = ops.Adam()

    def settings(self, lr: Tensor, step: Tensor, coef: Tensor) -> Any:
        """lr, step (1-based), coef (multiplies the gradient): fp32 [] -> what `construct` wants of them."""
        rate = lr * (self.v_gain / self.m_gain)
        eps = self.eps * self.v_gain
        if self.bias_correction:
            root = ops.sqrt(-ops.expm1(step * self.log_beta2))
            rate = rate * root / -ops.expm1(step * self.log_beta1)
            eps = eps * root
        return rate, eps, 1.0 - lr * self.weight_decay, coef

    def construct(self, param: Parameter, m: Parameter, v: Parameter, grad: Tensor, settings: Any, decays: bool):
        rate, eps, keep, coef = settings
        grad = grad * coef
        if decays:
            if self.decoupled:
                ops.assign(param, param * keep)
            else:
                grad = grad + self.weight_decay * param
        self.kernel(param, m, v, 0.0, 0.0, rate, self.beta1, self.beta2, eps, grad)
        return rate


def _fp32_complement(beta: float) -> float:
    return float(np.float32(1) - np.float32(beta))


class SquaredNorm(nn.Cell):
    """Sum of the squares of all elements: fp32 of any shape -> fp32 []."""

    def construct(self, x: Tensor) -> Tensor:
        # Row sums first: MindSpore's CPU reduction to a scalar is six times slower than this, and the one-pass
        # L2Loss kernel loses three digits.
        return ops.square(x).sum(-1).sum()
