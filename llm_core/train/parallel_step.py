"""One optimizer step on several ranks: the same numbers as one process gives, from each rank's share.

A window has the form of `step.Stepper`'s with several micro-batches: gradients are added up first, then exchanged once
(with ZeRO's second stage after every micro-batch, so that only this rank's rows are kept; with the third they come as
rows). Every rank then knows the loss and the norm of the whole window, and decides alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from llm_core.models.heads import training_loss
from llm_core.ops import dropout_key
from llm_core.parallel.comm import Comm, Gather, RowsOfSum, Sum
from llm_core.parallel.cuts import Cut
from llm_core.parallel.pipeline import PipelineAccumulator
from llm_core.runtime import Compiled
from llm_core.train.step import Finish, StepResult, WindowLoss, scalar

_LARGE = 1 << 20  # bytes of a gradient that travels alone; smaller ones share a collective
_ROWS = "zero."  # what the name of a copy of some rows begins with


def optimizer_targets(weights: Sequence[Parameter], cuts: Mapping[str, Cut], comm: Comm) -> list[Parameter]:
    """What the optimizer of this rank updates: of each weight itself, or with ZeRO's first two stages a copy of the
    rows that are this rank's, named zero.<weight>."""
    layout = comm.layout
    targets = []
    for weight in weights:
        cut = cuts[weight.name]
        if layout.zero < 3 and cut.is_sharded(layout, 1):
            weight = Parameter(_own_rows(weight, cut, comm), name=_ROWS + weight.name)
        targets.append(weight)
    return targets


def _own_rows(weight: Parameter, cut: Cut, comm: Comm) -> Tensor:
    return Tensor(weight.asnumpy()[cut.rows(comm.layout, comm.place)].copy())


class ParallelStepper:
    """As `step.Stepper`, of one rank among several.

    nets: the network, or this stage's pieces of it. weights: what learns of them; cuts: of each by name; optimizer: of
    `optimizer_targets(weights, ...)`. accumulation: micro-batches a window holds.
    """

    def __init__(
        self, nets: Sequence[nn.Cell], weights: Sequence[Parameter], cuts: Mapping[str, Cut], optimizer: nn.Cell,
        comm: Comm, *, seed: int = 0, accumulation: int = 1, max_grad_norm: float | None = None,
        graph_key: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.comm, self.layout = comm, comm.layout
        self.seed, self.accumulation = seed, accumulation
        own = [cuts[weight.name] for weight in weights]
        sums = ParameterTuple(
            Parameter(Tensor(np.zeros(cut.held_shape(self.layout, 2), np.float32)), name=f"grad_sum.{weight.name}")
            for weight, cut in zip(weights, own, strict=True)
        )
        weights = ParameterTuple(weights)
        key = {**(graph_key or {}), "max_grad_norm": max_grad_norm, "accumulation": "parallel"}
        self.pipeline, self.accumulate = None, None
        if self.layout.pp > 1:
            self.pipeline = PipelineAccumulator(
                nets, weights, sums, comm, graph_key=key,
                collect=lambda at: CollectGradients([own[i] for i in at], comm),
            )
        else:
            (net,) = nets
            step = ParallelAccumulate(training_loss(net), weights, sums, CollectGradients(own, comm))
            self.accumulate = Compiled(step.set_train(), **key)
        self.apply = Compiled(ParallelApply(weights, own, sums, optimizer, comm, max_grad_norm), **key)
        self._weights, self._cuts, self._targets = weights, own, optimizer.params
        self._prepared: set[tuple[int, ...]] = set()

    def refresh(self) -> None:
        """To be called when weights have been loaded: the optimizer's copies of rows follow."""
        for weight, cut, target in zip(self._weights, self._cuts, self._targets, strict=True):
            if target is not weight:
                target.set_data(_own_rows(weight, cut, self.comm))

    def run(
        self, window: Sequence[tuple[np.ndarray, np.ndarray]], *, lr: float, scale: float, update: int, step: int,
        loss_limit: float = np.inf,
    ) -> StepResult:  # fmt: skip
        """As `Stepper.run`; the window holds this dp rank's rows, the result is of all ranks."""
        own = sum(int(np.count_nonzero(labels != -100)) for _, labels in window)
        supervised = int(self.comm.sum([own], self.layout.replicas(self.comm.rank))[0])
        per_token, scale_tensor = scalar(1.0 / max(supervised, 1)), scalar(scale)
        numbers = scalar(lr), scalar(update), scalar(loss_limit)
        # Dropout: as one process draws whose micro-batches are those of all replicas in turn.
        keys = [
            dropout_key(self.seed, step, index * self.layout.dp + self.comm.place.replica)
            for index in range(len(window))
        ]
        batches = [
            (Tensor(tokens), Tensor(labels), Tensor(key))
            for (tokens, labels), key in zip(window, keys, strict=True)
        ]
        self._prepare(batches[0], per_token, scale_tensor, numbers)
        if self.pipeline is not None:
            loss = self.pipeline.run(batches, per_token, scale_tensor)
        else:
            loss = sum(float(self.accumulate(*batch, per_token, scale_tensor).asnumpy()) for batch in batches)
        if self.comm.place.shard:  # all shards have the same loss; one of them says it
            loss = 0.0
        total, norm, applied = self.apply(scalar(loss), scale_tensor, *numbers)
        return StepResult(float(total.asnumpy()), float(norm.asnumpy()), bool(applied.asnumpy()), supervised)

    def _prepare(self, batch: tuple, per_token: Tensor, scale: Tensor, numbers: tuple) -> None:
        """Compile everything, and wait for the others to have done so, before the first exchange."""
        if batch[0].shape in self._prepared:
            return
        if self.pipeline is not None:
            self.pipeline.prepare(batch, per_token, scale)
        else:
            self.accumulate.prepare(*batch, per_token, scale)
        self.apply.prepare(scale, scale, *numbers)
        self.comm.gate()
        self._prepared.add(batch[0].shape)


def _rows_of_sum(cut: Cut, comm: Comm) -> RowsOfSum:
    """From a gradient to this dp rank's rows of its sum over the ranks that share it."""
    return RowsOfSum(cut.sum_group(comm.layout, comm.rank), comm.layout.replicas(comm.rank), comm.rank)


class CollectGradients(nn.Cell):
    """A micro-batch's gradients, as backpropagation gives them -> as they are added up: with ZeRO's second stage this
    rank's rows of their sum over all ranks."""

    def __init__(self, cuts: Sequence[Cut], comm: Comm) -> None:
        super().__init__(auto_prefix=False)
        scattered = [comm.layout.zero == 2 and cut.is_sharded(comm.layout, 2) for cut in cuts]
        self.scattered = tuple(scattered)
        self.collectors = nn.CellList(
            [_rows_of_sum(cut, comm) if at else nn.Identity() for at, cut in zip(scattered, cuts, strict=True)],
            auto_prefix=False,
        )

    def construct(self, grads):
        done = ()
        for i in range(len(self.scattered)):
            done = done + (self.collectors[i](grads[i]) if self.scattered[i] else grads[i],)
        return done


class ParallelAccumulate(nn.Cell):
    """As `step.AccumulateStep`."""

    def __init__(
        self, token_loss: nn.Cell, weights: ParameterTuple, sums: ParameterTuple, collect: CollectGradients
    ) -> None:
        super().__init__(auto_prefix=False)
        self.window_loss = WindowLoss(token_loss)
        self.value_and_grad = ops.value_and_grad(self.window_loss, None, weights, has_aux=True)
        self.sums, self.collect = sums, collect

    def construct(self, tokens, labels, key, per_token, scale):
        """Arguments as in `TrainStep.construct`; returns this rank's share of the loss, fp32 []."""
        (_, loss), grads = self.value_and_grad(tokens, labels, key, per_token, scale)
        grads = self.collect(grads)
        for total, grad in zip(self.sums, grads):  # noqa: B905 (strict= does not compile)
            ops.assign_add(total, grad)
        return loss


class ParallelApply(nn.Cell):
    """Finish a window from the accumulators: exchange, clip, update, and clear them. See `step.ApplyStep`."""

    def __init__(
        self, weights: ParameterTuple, cuts: Sequence[Cut], sums: ParameterTuple, optimizer: nn.Cell, comm: Comm,
        max_grad_norm: float | None,
    ) -> None:  # fmt: skip
        super().__init__(auto_prefix=False)
        layout = comm.layout
        self.weights, self.sums, self.finish = weights, sums, Finish(optimizer, max_grad_norm)
        self.exchange = ExchangeGradients(cuts, comm)
        self.shares = tuple(1.0 / cut.copies(layout, 1) for cut in cuts)
        self.all_ranks = Sum(comm.world)
        self.count = len(cuts)
        self.copied = tuple(layout.zero < 3 and cut.is_sharded(layout, 1) for cut in cuts)
        self.gather = Gather(layout.replicas(comm.rank), comm.rank)

    def construct(self, loss, scale, lr, step, loss_limit):
        """Scalars fp32 [], loss this rank's share; returns (loss, global norm, applied?) of all ranks."""
        grads = self.exchange(self.sums)
        squares = ops.zeros((), ms.float32)
        for i in range(self.count):
            squares = squares + self.finish.squared_norm(grads[i]) * self.shares[i]
        totals = self.all_ranks(ops.stack((squares, loss)))
        loss = totals[1]
        norm, applied = self.finish.update(grads, totals[0], loss, scale, lr, step, loss_limit)
        for i in range(self.count):
            if self.copied[i]:
                ops.assign(self.weights[i], self.gather(self.finish.optimizer.params[i]))
            ops.assign(self.sums[i], ops.zeros_like(self.sums[i]))
        return loss, norm, applied


class ExchangeGradients(nn.Cell):
    """The accumulated gradients -> what the optimizer takes: their sums over the ranks that share a weight, or this
    rank's rows of them. Small ones travel together."""

    def __init__(self, cuts: Sequence[Cut], comm: Comm) -> None:
        super().__init__(auto_prefix=False)
        layout = comm.layout
        buckets: dict[tuple[int, ...], list[int]] = {}
        self.bucket_of, self.alone = [-1] * len(cuts), [-1] * len(cuts)
        cells: list[nn.Cell] = []
        for i, cut in enumerate(cuts):
            if cut.is_sharded(layout, 2):
                continue  # rows of the sum already
            group = cut.sum_group(layout, comm.rank)
            if cut.is_sharded(layout, 1):
                self.alone[i] = len(cells)
                cells.append(_rows_of_sum(cut, comm))
            elif 4 * int(np.prod(cut.part_shape)) >= _LARGE:
                self.alone[i] = len(cells)
                cells.append(Sum(group))
            elif len(group) > 1:
                buckets.setdefault(group, []).append(i)
        self.exchanges = nn.CellList(cells, auto_prefix=False)
        self.bucket_sums = nn.CellList([Sum(group) for group in buckets], auto_prefix=False)
        self.members = tuple(tuple(members) for members in buckets.values())
        self.offsets = [0] * len(cuts)
        for number, members in enumerate(self.members):
            offset = 0
            for i in members:
                self.bucket_of[i], self.offsets[i] = number, offset
                offset += int(np.prod(cuts[i].part_shape))
        self.sizes = tuple(int(np.prod(cut.part_shape)) for cut in cuts)
        self.bucket_of, self.alone, self.offsets = tuple(self.bucket_of), tuple(self.alone), tuple(self.offsets)

    def construct(self, sums):
        flats = ()
        for number in range(len(self.members)):
            pieces = ()
            for i in self.members[number]:
                pieces = pieces + (sums[i].reshape(-1),)
            flats = flats + (self.bucket_sums[number](ops.concat(pieces)),)
        done = ()
        for i in range(len(self.sizes)):
            grad = sums[i]
            if self.alone[i] >= 0:
                grad = self.exchanges[self.alone[i]](grad)
            elif self.bucket_of[i] >= 0:
                flat = flats[self.bucket_of[i]]
                grad = flat[self.offsets[i] : self.offsets[i] + self.sizes[i]].reshape(grad.shape)
            done = done + (grad,)
        return done
