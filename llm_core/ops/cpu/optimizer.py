"""What an optimizer does to every parameter: Adam's update, the squared norm."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from llm_core.ops.cpu.custom import kernel


class AdamUpdate(nn.Cell):
    """As the reference's: one step of the Adam family for one parameter, updated in place with its moments."""

    def __init__(
        self, betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool, bias_correction: bool
    ):
        super().__init__(auto_prefix=False)
        self.weight_decay, self.decoupled = weight_decay, decoupled
        self.decay_of_kernel = _scalar(weight_decay if decoupled else 0.0)
        self.betas, self.eps = (_scalar(betas[0]), _scalar(betas[1])), _scalar(eps)
        self.correction, self.zero, self.one = _scalar(bias_correction), _scalar(0), _scalar(1)
        self.kernel = kernel("adamw", lambda *shapes: [1], in_place=True)

    def settings(self, lr: Tensor, step: Tensor, coef: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """lr, step, coef fp32 [] -> the kernel's numbers [8] with and without weight decay, and coef."""
        kernel_coef = coef if self.decoupled else self.one
        decayed = (lr, *self.betas, self.eps, self.decay_of_kernel, kernel_coef, step, self.correction)
        plain = (lr, *self.betas, self.eps, self.zero, coef, step, self.correction)
        return ops.stack(decayed), ops.stack(plain), coef

    def construct(self, param: Parameter, m: Parameter, v: Parameter, grad: Tensor, settings, decays: bool):
        decayed, plain, coef = settings
        if not decays:
            return self.kernel(param, m, v, grad, plain)
        if not self.decoupled:
            grad = grad * coef + self.weight_decay * param
        return self.kernel(param, m, v, grad, decayed)


def _scalar(value: float) -> Tensor:
    return Tensor(np.float32(value))


class SquaredNorm(nn.Cell):
    """Sum of the squares of all elements: fp32 of any shape -> fp32 []."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.kernel = kernel("squared_norm", lambda x: [1])

    def construct(self, x: Tensor) -> Tensor:
        return self.kernel(x).reshape(())
