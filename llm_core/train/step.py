"""One optimizer step as compiled Cells: gradients, overflow check, clip, update.

A window of one micro-batch is one graph (`TrainStep`). A window of several is two graphs, each compiled once
whatever the number of micro-batches: `AccumulateStep` adds a micro-batch's gradient to fp32 accumulators,
`ApplyStep` finishes the window from them. Every form divides by the supervised tokens of the WHOLE window,
which the host counts beforehand, so 16 micro-batches of 1 and 1 of 16 are the same sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.ops import dropout_key
from llm_core.runtime import Compiled


class WindowLoss(nn.Cell):
    """A micro-batch's share of the window's loss: what is differentiated, and what is reported.

    Args:
        token_loss: Cell(tokens, labels, dropout_key) -> (sum of token losses [], supervised tokens []).
    """

    def __init__(self, token_loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.token_loss = token_loss

    def construct(self, tokens, labels, key, per_token, scale):
        """tokens, labels int32 [B, S], key int32 [2], per_token and scale fp32 [] -> (scaled, unscaled), fp32 []."""
        loss_sum, _ = self.token_loss(tokens, labels, key)
        share = loss_sum * per_token
        return share * scale, share


class Finish(nn.Cell):
    """From the scaled gradients of a window to new weights.

    The update is left out when the global norm is not finite (overflow) or the loss is above `loss_limit`.
    Clip: coefficient min(1, max_norm / (norm + 1e-6)), as torch and MindFormers compute it.
    """

    def __init__(self, optimizer: nn.Cell, max_grad_norm: float | None) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.squared_norm = core_ops.SquaredNorm()
        self.clips = max_grad_norm is not None
        self.max_grad_norm = float(max_grad_norm or 0.0)

    def construct(self, grads, loss, scale, lr, step, loss_limit):
        """Scalars fp32 []: loss is unscaled; returns (global norm, update applied?)."""
        squares = ops.zeros((), ms.float32)
        for grad in grads:
            squares = squares + self.squared_norm(grad)
        return self.update(grads, squares, loss, scale, lr, step, loss_limit)

    def update(self, grads, squares, loss, scale, lr, step, loss_limit):
        """The same, from the sum of the gradients' squares as well, fp32 []."""
        norm = ops.sqrt(squares) / scale
        coefficient = 1.0 / scale
        if self.clips:
            coefficient = coefficient * ops.minimum(self.max_grad_norm / (norm + 1e-6), 1.0)
        applied = ops.logical_and(ops.isfinite(norm), loss <= loss_limit)
        if applied:
            self.optimizer(grads, lr, step, coefficient)
        return norm, applied


class TrainStep(nn.Cell):
    """A window of one micro-batch, in one graph.

    Args:
        token_loss: see `WindowLoss`.
        optimizer: Cell(grads, lr, step, coefficient) that updates the weights in place.
        max_grad_norm: clip threshold, None = no clip.
    """

    def __init__(self, token_loss: nn.Cell, optimizer: nn.Cell, max_grad_norm: float | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.window_loss = WindowLoss(token_loss)  # a child, see AccumulateStep (frozen weights are no optimizer's)
        self.value_and_grad = ops.value_and_grad(self.window_loss, None, optimizer.params, has_aux=True)
        self.finish = Finish(optimizer, max_grad_norm)

    def construct(self, tokens, labels, key, per_token, scale, lr, step, loss_limit):
        """One optimizer step.

        Args:
            tokens, labels: int32 [B, S], labels -100 where not supervised.
            key: int32 [2], `ops.dropout_key` of this step and micro-batch.
            per_token: fp32 [], 1 / supervised tokens of the window.
            scale: fp32 [], loss scale.
            lr, step: fp32 [], learning rate and 1-based count of applied updates.
            loss_limit: fp32 [], the update is skipped when the loss is above it (inf: never).

        Returns:
            (loss fp32 [], global norm fp32 [], applied bool []).
        """
        (_, loss), grads = self.value_and_grad(tokens, labels, key, per_token, scale)
        norm, applied = self.finish(grads, loss, scale, lr, step, loss_limit)
        return loss, norm, applied


class AccumulateStep(nn.Cell):
    """Add one micro-batch's scaled gradient to the accumulators; returns its share of the loss, fp32 []."""

    def __init__(self, token_loss: nn.Cell, weights: ParameterTuple, sums: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.window_loss = WindowLoss(token_loss)  # a child: a cached graph finds its weights here, by name
        self.value_and_grad = ops.value_and_grad(self.window_loss, None, weights, has_aux=True)
        self.sums = sums

    def construct(self, tokens, labels, key, per_token, scale):
        """Arguments as in `TrainStep.construct`."""
        (_, loss), grads = self.value_and_grad(tokens, labels, key, per_token, scale)
        for total, grad in zip(self.sums, grads):  # noqa: B905 (strict= does not compile)
            ops.assign_add(total, grad)
        return loss


class ApplyStep(nn.Cell):
    """Finish a window from the accumulators, and clear them."""

    def __init__(self, optimizer: nn.Cell, sums: ParameterTuple, max_grad_norm: float | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.finish = Finish(optimizer, max_grad_norm)
        self.sums = sums

    def construct(self, loss, scale, lr, step, loss_limit):
        """Scalars fp32 [] as in `TrainStep.construct`; returns (global norm, applied)."""
        norm, applied = self.finish(self.sums, loss, scale, lr, step, loss_limit)
        for total in self.sums:
            ops.assign(total, ops.zeros_like(total))
        return norm, applied


@dataclass(frozen=True)
class StepResult:
    """What one window did."""

    loss: float  # per supervised token
    norm: float  # global norm of the unscaled gradient, before the clip
    applied: bool  # False: overflow, or a loss above the limit; weights and optimizer state are as before
    tokens: int  # supervised tokens in the window


class Stepper:
    """Runs windows of 1 to N micro-batches through the compiled Cells.

    Args:
        token_loss, optimizer, max_grad_norm: see `TrainStep`.
        accumulation: micro-batches a full window holds; a shorter last window takes the same graphs.
        seed: of the dropout masks.
        graph_key: what shapes the graphs beside these arguments (spec, optimizer): names them in the compile cache.
    """

    def __init__(
        self, token_loss: nn.Cell, optimizer: nn.Cell, *, seed: int = 0, accumulation: int = 1,
        max_grad_norm: float | None = None, graph_key: Mapping[str, Any] | None = None,
    ) -> None:
        self.seed = seed
        self.accumulation = accumulation
        key = {**(graph_key or {}), "max_grad_norm": max_grad_norm}
        if accumulation == 1:
            self.whole = Compiled(TrainStep(token_loss, optimizer, max_grad_norm).set_train(), **key)
            return
        sums = ParameterTuple(
            Parameter(Tensor(np.zeros(weight.shape, np.float32)), name=f"grad_sum.{weight.name}")
            for weight in optimizer.params
        )
        self.accumulate = Compiled(AccumulateStep(token_loss, optimizer.params, sums).set_train(), **key)
        self.apply = Compiled(ApplyStep(optimizer, sums, max_grad_norm), **key)

    def refresh(self) -> None:
        """To be called when weights have been loaded; nothing depends on them here."""

    def run(
        self,
        window: Sequence[tuple[np.ndarray, np.ndarray]],
        *,
        lr: float,
        scale: float,
        update: int,
        step: int,
        loss_limit: float = np.inf,
    ) -> StepResult:
        """One optimizer step.

        Args:
            window: (tokens, labels) of each micro-batch, int32 [B, S], labels -100 where not supervised.
            lr: learning rate of this step.
            scale: loss scale.
            update: 1-based number of this update (Adam's bias correction).
            step: number of this step; with the seed it determines the dropout masks.
            loss_limit: skip the update when the loss is above it.
        """
        supervised = sum(int(np.count_nonzero(labels != -100)) for _, labels in window)
        per_token = scalar(1.0 / max(supervised, 1))
        numbers = scalar(lr), scalar(update), scalar(loss_limit)
        scale_tensor = scalar(scale)
        batches = [
            (Tensor(tokens), Tensor(labels), Tensor(dropout_key(self.seed, step, index)))
            for index, (tokens, labels) in enumerate(window)
        ]
        if self.accumulation == 1:
            (batch,) = batches
            loss, norm, applied = self.whole(*batch, per_token, scale_tensor, *numbers)
        else:
            loss = sum(float(self.accumulate(*batch, per_token, scale_tensor).asnumpy()) for batch in batches)
            norm, applied = self.apply(scalar(loss), scale_tensor, *numbers)
        return StepResult(float(loss), float(norm.asnumpy()), bool(applied.asnumpy()), supervised)


def scalar(value: float) -> Tensor:
    """fp32 []."""
    return Tensor(np.float32(value))
