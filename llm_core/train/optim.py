"""Optimizers as one Cell that updates every parameter in place inside the compiled train step.

`build_optimizer(cfg.optimizer, params)` gives a Cell whose call is

    optimizer(grads, lr, step, coef)
        grads: tuple of fp32 tensors, one a parameter, in the order of `params`
        lr:    fp32 [], this step's learning rate
        step:  fp32 [], 1-based number of this update
        coef:  fp32 [], multiplies every gradient (loss unscaling and clipping, folded into one factor)

The state is one fp32 Parameter a slot and parameter, named `<slot>.<parameter>`, for instance
"adam_m.model.norm_out.weight"; `Optimizer.states` lists it, for checkpoints. One-dimensional parameters and
*.bias get no weight decay. Where ZeRO has a rank update a copy of some rows, zero.<parameter>, the state of those rows
has the parameter's name all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.errors import UserError


class Optimizer(nn.Cell):
    """What all optimizers share: the parameters, the decay groups and the state slots."""

    def __init__(self, params: Sequence[Parameter], weight_decay: float):
        super().__init__(auto_prefix=False)
        self.params = ms.ParameterTuple(params)
        self.count = len(params)
        self.weight_decay = weight_decay
        self.decayed = tuple(weight_decay > 0 and takes_decay(p) for p in params)
        self.states: list[Parameter] = []

    def slot(self, name: str, shapes: Sequence[tuple] | None = None, fill: float = 0.0) -> ms.ParameterTuple:
        """A state of the given shapes (by default the parameters' own), filled with a constant."""
        shapes = shapes or [p.shape for p in self.params]
        made = [
            Parameter(
                Tensor(np.full(shape, fill, np.float32)), name=f"{name}.{p.name.removeprefix('zero.')}",
                requires_grad=False,
            )  # fmt: skip
            for p, shape in zip(self.params, shapes, strict=True)
        ]
        self.states.extend(made)
        return ms.ParameterTuple(made)


def takes_decay(param: Parameter) -> bool:
    """Whether weight decay applies: not to vectors (norms) and biases."""
    return len(param.shape) > 1 and not param.name.endswith("bias")


class Adam(Optimizer):
    """The Adam family; see `ops.AdamUpdate` for the arguments."""

    def __init__(
        self,
        params: Sequence[Parameter],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
        bias_correction: bool,
    ):
        super().__init__(params, weight_decay)
        self.m = self.slot("adam_m")
        self.v = self.slot("adam_v")
        self.update = core_ops.AdamUpdate(betas, eps, weight_decay, decoupled, bias_correction)

    def construct(self, grads, lr, step, coef):
        settings = self.update.settings(lr, step, coef)
        for i in range(self.count):
            self.update(self.params[i], self.m[i], self.v[i], grads[i], settings, self.decayed[i])
        return step


class Idle(Optimizer):
    """Of a rank that holds nothing which learns, while others do: it changes nothing."""

    def __init__(self):
        super().__init__((), 0.0)

    def construct(self, grads, lr, step, coef):
        return step


class SGD(Optimizer):
    """Gradient descent with momentum, Nesterov's form if asked, L2 decay (torch's rule, no dampening)."""

    def __init__(self, params: Sequence[Parameter], weight_decay: float, momentum: float, nesterov: bool):
        super().__init__(params, weight_decay)
        self.momentum, self.nesterov = momentum, nesterov
        self.velocity = self.slot("sgd_momentum") if momentum else ()

    def construct(self, grads, lr, step, coef):
        for i in range(self.count):
            param = self.params[i]
            grad = grads[i] * coef
            if self.decayed[i]:
                grad = grad + self.weight_decay * param
            if self.momentum:
                velocity = self.velocity[i] * self.momentum + grad
                ops.assign(self.velocity[i], velocity)
                grad = grad + self.momentum * velocity if self.nesterov else velocity
            ops.assign_sub(param, lr * grad)
        return step


class Adagrad(Optimizer):
    """Adagrad: the sum of squared gradients starts at `accum` (upstream's 0.1); L2 decay."""

    def __init__(self, params: Sequence[Parameter], weight_decay: float, accum: float, eps: float):
        super().__init__(params, weight_decay)
        self.eps = eps
        self.sums = self.slot("adagrad_sum", fill=accum)

    def construct(self, grads, lr, step, coef):
        for i in range(self.count):
            param = self.params[i]
            grad = grads[i] * coef
            if self.decayed[i]:
                grad = grad + self.weight_decay * param
            total = self.sums[i] + grad * grad
            ops.assign(self.sums[i], total)
            ops.assign_sub(param, lr * grad / (ops.sqrt(total) + self.eps))
        return step


class Adafactor(Optimizer):
    """Adafactor without momentum, torch's rule: a matrix keeps a row and a column of second moments instead
    of a whole one; steps are relative to the parameter's size and clipped; decay is decoupled."""

    FLOOR = float(np.finfo(np.float32).eps)  # under the second moments
    SMALLEST_SCALE = 1e-3  # a parameter of zeros still moves
    CLIP = 1.0  # largest root-mean-square of an update, before the rate
    DECAY = 0.8  # the second moments forget with 1 - step**-DECAY

    def __init__(self, params: Sequence[Parameter], weight_decay: float):
        super().__init__(params, weight_decay)
        self.factored = tuple(len(p.shape) > 1 for p in params)
        rows = [(*p.shape[:-1], 1) if len(p.shape) > 1 else p.shape for p in params]
        columns = [(*p.shape[:-2], 1, p.shape[-1]) if len(p.shape) > 1 else (1,) for p in params]
        # Means down the columns, and outer products, as matrix products: on a CPU 45 and 8 times faster.
        self.averages = tuple(
            Tensor(np.full((1, p.shape[-2]), 1 / p.shape[-2], np.float32)) if len(p.shape) > 1 else None
            for p in params
        )
        self.rows = self.slot("adafactor_row", rows)
        self.columns = self.slot("adafactor_column", columns)

    def construct(self, grads, lr, step, coef):
        fresh = ops.pow(step, -self.DECAY)
        rho = ops.minimum(lr, ops.rsqrt(step))
        for i in range(self.count):
            param = self.params[i]
            grad = grads[i] * coef
            rate = ops.maximum(_rms(param), self.SMALLEST_SCALE) * rho
            if self.decayed[i]:
                ops.assign(param, param * (1.0 - lr * self.weight_decay))
            moment = self.second_moment(i, grad * grad, fresh)
            update = grad / ops.sqrt(ops.maximum(moment, self.FLOOR * self.FLOOR))
            ops.assign_sub(param, update * (rate / ops.maximum(_rms(update) / self.CLIP, 1.0)))
        return step

    def second_moment(self, i, square, fresh):
        """Update the moments of parameter i with its squared gradient; their product has its shape."""
        if not self.factored[i]:
            total = self.rows[i] + fresh * (square - self.rows[i])
            ops.assign(self.rows[i], total)
            return total
        row = self.rows[i] + fresh * (square.mean(-1, True) - self.rows[i])
        column = self.columns[i] + fresh * (ops.matmul(self.averages[i], square) - self.columns[i])
        ops.assign(self.rows[i], row)
        ops.assign(self.columns[i], column)
        return ops.matmul(row / ops.maximum(row.mean(-2, True), self.FLOOR), column)


def _rms(x):
    # Row sums first: MindSpore's CPU reduction of a matrix to a scalar is six times slower than this.
    return ops.sqrt(ops.square(x).sum(-1).sum() / x.size)


ALIASES = {
    "adamw": "AdamW",
    "fp32_adamw": "FP32StateAdamWeightDecay",
    "fused_adamw": "FP32StateAdamWeightDecay",
    "adam": "Adam",
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "adafactor": "Adafactor",
    "AdaFactor": "Adafactor",
    "AdamWeightDecay": "FP32StateAdamWeightDecay",
    "FusedAdamWeightDecay": "FP32StateAdamWeightDecay",
}
NAMES = ("FP32StateAdamWeightDecay", "AdamW", "Adam", "SGD", "Adagrad", "Adafactor")


def build_optimizer(optimizer_cfg: Any, params: Sequence[Parameter]) -> Optimizer:
    """The optimizer of the `optimizer` section for these trainable parameters.

    `betas` wins over `beta1` and `beta2`; missing values are upstream's defaults. Raises UserError for an
    unknown type or values outside their range, and for an empty list of parameters.
    """
    if not params:
        raise UserError("optimizer: no parameter is trainable; see freeze_include and freeze_exclude")

    def given(name: str, default: Any) -> Any:
        value = getattr(optimizer_cfg, name, None)
        return default if value is None else value

    name = ALIASES.get(optimizer_cfg.type, optimizer_cfg.type)
    decay = given("weight_decay", 0.0)
    if name in ("FP32StateAdamWeightDecay", "AdamW", "Adam"):
        betas = tuple(given("betas", (given("beta1", 0.9), given("beta2", 0.999))))
        eps = given("eps", 1e-6 if name == "FP32StateAdamWeightDecay" else 1e-8)
        if not all(0 < beta < 1 for beta in betas) or eps <= 0:
            raise UserError(f"optimizer: betas must lie between 0 and 1 and eps above 0; got {betas}, {eps}")
        corrected = name != "FP32StateAdamWeightDecay"
        return Adam(params, betas, eps, decay, decoupled=name != "Adam", bias_correction=corrected)
    if name == "SGD":
        return SGD(params, decay, given("momentum", 0.0), given("nesterov", False))
    if name == "Adagrad":
        return Adagrad(params, decay, given("accum", 0.1), given("eps", 0.0))
    if name == "Adafactor":
        return Adafactor(params, decay)
    raise UserError(f"optimizer.type: {optimizer_cfg.type!r} is none of {', '.join(NAMES)}")
