"""A stage of a pipeline at work: its pieces of the model as compiled Cells, and the schedule that it follows.

Of each micro-batch under way a piece keeps its input alone, and its backward pass computes the forward again. Cells
hold no collective between stages: what travels does so between graphs, by `comm.Exchange`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops

from llm_core.models.heads import training_loss
from llm_core.parallel.comm import Comm, Exchange, Sum
from llm_core.parallel.schedule import FORWARD, Compute, Meet, Message, gives, needs, schedule
from llm_core.runtime import Compiled

Batch = tuple[Tensor, Tensor, Tensor]  # tokens and labels int32 [B, S], dropout key int32 [2]


# ---- Cells


class FirstPiece(nn.Cell):
    """tokens int32 [B, S] and a dropout key -> hidden states fp32, of the piece that has the embedding."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.model = net.model

    def construct(self, tokens, key=None):
        return self.model(tokens, key)


class InnerPiece(nn.Cell):
    """Hidden states x, tokens and a dropout key -> hidden states, of a piece between the first and the last."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.model = net.model

    def construct(self, x, tokens, key=None):
        return self.model(tokens, key, x)


class LastPiece(nn.Cell):
    """Hidden states x, tokens, labels and a dropout key -> (sum of losses [], supervised tokens []), of the last piece.
    """

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.loss = net.model, training_loss(net)

    def construct(self, x, tokens, labels, key=None):
        return self.loss.of_hidden(self.model(tokens, key, x), labels, key)


class LastShare(nn.Cell):
    """The last piece's share of the window's loss, see `train.step.WindowLoss`: (scaled, unscaled), fp32 []."""

    def __init__(self, piece: LastPiece) -> None:
        super().__init__(auto_prefix=False)
        self.piece = piece

    def construct(self, x, tokens, labels, key, per_token, scale):
        loss_sum, _ = self.piece(x, tokens, labels, key)
        share = loss_sum * per_token
        return share * scale, share


class _Backward(nn.Cell):
    """What the backward passes share: the gradients of `weights`, by way of `collect`, are added to `sums`."""

    def __init__(self, piece: nn.Cell, weights: ParameterTuple, sums: ParameterTuple, collect: nn.Cell | None) -> None:
        super().__init__(auto_prefix=False)
        self.piece = piece  # a child: a cached graph finds its weights here, by name
        self.weights, self.sums, self.collect = weights, sums, collect
        self.learns = len(weights) > 0
        self.gradient = ops.GradOperation(get_all=True, get_by_list=self.learns, sens_param=True)

    def add(self, grads):
        if self.collect is not None:
            grads = self.collect(grads)
        for total, grad in zip(self.sums, grads):  # noqa: B905 (strict= does not compile)
            ops.assign_add(total, grad)
        return grads


class FirstBackward(_Backward):
    """tokens, key and the gradient of the hidden states that the piece gave; of a piece in which something learns."""

    def __init__(self, piece: nn.Cell, weights: ParameterTuple, sums: ParameterTuple, collect: nn.Cell | None) -> None:
        super().__init__(piece, weights, sums, collect)
        self.gradient = ops.GradOperation(get_by_list=True, sens_param=True)

    def construct(self, tokens, key, gradient):
        self.add(self.gradient(self.piece, self.weights)(tokens, key, gradient))
        return gradient[0, 0]


class InnerBackward(_Backward):
    """x, tokens, key and the gradient of what came out -> the gradient of x."""

    def construct(self, x, tokens, key, gradient):
        if self.learns:
            inputs, grads = self.gradient(self.piece, self.weights)(x, tokens, key, gradient)
            self.add(grads)
        else:
            inputs = self.gradient(self.piece)(x, tokens, key, gradient)
        return inputs[0]


class LastBackward(_Backward):
    """Arguments of `LastShare` -> (unscaled share of the loss [], gradient of x), forward and backward in one graph."""

    def __init__(
        self, piece: LastPiece, weights: ParameterTuple, sums: ParameterTuple, collect: nn.Cell | None
    ) -> None:
        super().__init__(LastShare(piece), weights, sums, collect)
        self.value_and_grad = ops.value_and_grad(self.piece, 0, weights if self.learns else None, has_aux=True)

    def construct(self, x, tokens, labels, key, per_token, scale):
        if self.learns:
            (_, share), (gradient, grads) = self.value_and_grad(x, tokens, labels, key, per_token, scale)
            self.add(grads)
        else:
            (_, share), gradient = self.value_and_grad(x, tokens, labels, key, per_token, scale)
        return share, gradient


# ---- between graphs


class Pipeline:
    """This rank's stage: the pieces that it has, one net a chunk in the model's order, and its exchanges.

    All ranks make one at the same time (the groups of two are made here), of a layout with pp > 1.
    """

    def __init__(self, nets: Sequence[nn.Cell], comm: Comm, graph_key: Mapping[str, Any] | None = None) -> None:
        self.nets, self.comm = list(nets), comm
        layout = self.layout = comm.layout
        self.stage, self.ranks = comm.place.stage, layout.stages(comm.rank)
        self._keys = [
            {"spec": net.spec, **net.graph_key, **(graph_key or {}), "piece": net.model.piece} for net in self.nets
        ]
        ring = layout.chunks > 1
        beside = {(self.stage + step) % layout.pp for step in (-1, 1) if ring or 0 <= self.stage + step < layout.pp}
        comm.gate()
        # In one order everywhere: making a group may wait for its members.
        for pair in sorted(tuple(sorted((self.ranks[peer], comm.rank))) for peer in beside):
            Sum(pair)
        self._beside = sorted(beside)
        self._exchanges: dict[tuple, Exchange] = {}

    def compiled(self, cell: nn.Cell, chunk: int) -> Compiled:
        """A Cell over the net of a chunk, whose graph depends on this place in the layout."""
        return Compiled(cell, layout=self.layout, rank=self.comm.rank, **self._keys[chunk])

    def hidden_shape(self, tokens: Tensor) -> tuple[int, int]:
        """Of the hidden states that travel for tokens [B, S]: with sequence parallelism this tp rank's rows."""
        rows = tokens.shape[0] * tokens.shape[1]
        split = self.layout.tp if self.layout.sequence_parallel else 1
        return rows // split, self.nets[0].spec.hidden_size

    def prepare_exchanges(self, shape: tuple[int, int]) -> None:
        """Compile those of hidden states of this shape, with each neighbour, both ways and one way."""
        for peer in self._beside:
            for own, theirs in ((shape, shape), (shape, _NOTHING), (_NOTHING, shape)):
                self._exchange(peer, own, theirs)

    def _exchange(self, peer: int, own: tuple[int, ...], theirs: tuple[int, ...]) -> Exchange:
        key = peer, own, theirs
        if key not in self._exchanges:
            cell = Exchange(self.ranks[peer], self.comm.rank, own, theirs)
            cell.compile(_zeros(own))
            self._exchanges[key] = cell
        return self._exchanges[key]

    def play(
        self, batches: Sequence[Sequence[Tensor]], compute: Callable[[Compute, Tensor | None], Tensor | None],
        backward: bool,
    ) -> None:  # fmt: skip
        """Follow the schedule over the batches (tokens first).

        compute: from what the action needs (hidden states or their gradient; None at the model's ends) to what it
        gives to another stage.
        """
        pp, chunks = self.layout.pp, self.layout.chunks
        come: dict[Message, Tensor] = {}
        given: dict[Message, Tensor] = {}
        for action in schedule(pp, len(batches), chunks, backward)[self.stage]:
            if isinstance(action, Meet):
                theirs = None if action.receives is None else self.hidden_shape(batches[action.receives.micro_batch][0])
                mine = _zeros(_NOTHING) if action.sends is None else given.pop(action.sends)
                came = self._exchange(action.peer, mine.shape, theirs or _NOTHING)(mine)
                if action.receives is not None:
                    come[action.receives] = came
                continue
            needed, message = (of(action, pp, self.stage, chunks) for of in (needs, gives))
            out = compute(action, None if needed is None else come.pop(needed))
            if message is not None:
                given[message] = out


class PipelineAccumulator(Pipeline):
    """A window of micro-batches through the pipeline: gradients are added to `sums`, each stage's to its own.

    Args:
        nets: this stage's pieces of the model, one a chunk; see `share_prefix`.
        weights, sums: what learns of them, and the fp32 accumulators of its gradients, as in `train.step`.
        comm: this rank among all.
        collect: gives a Cell for some of the weights, by their places in `weights`: from their gradients to what is
            added up. None: the gradients as they are.
        graph_key: what shapes the graphs beside the nets.
    """

    def __init__(
        self, nets: Sequence[nn.Cell], weights: ParameterTuple, sums: ParameterTuple, comm: Comm, *,
        collect: Callable[[list[int]], nn.Cell] | None = None, graph_key: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(nets, comm, graph_key)
        self._forward: list[Compiled | None] = []
        self._backward: list[Compiled | None] = []
        for chunk, net in enumerate(self.nets):
            own = {id(parameter) for parameter in net.get_parameters()}
            at = [i for i, weight in enumerate(weights) if id(weight) in own]
            parts = ParameterTuple(weights[i] for i in at), ParameterTuple(sums[i] for i in at)
            parts = *parts, None if collect is None or not at else collect(at)
            forward, backward = self._cells(net, *parts)
            for cells, cell in ((self._forward, forward), (self._backward, backward)):
                cells.append(None if cell is None else self.compiled(cell.set_train(), chunk))

    @staticmethod
    def _cells(net: nn.Cell, *parts: Any) -> tuple[nn.Cell | None, nn.Cell | None]:
        """Forward and backward of a piece; the last one's forward is in its backward."""
        if net.model.ends:
            return None, LastBackward(LastPiece(net), *parts)
        if not net.model.begins:
            return InnerPiece(net), InnerBackward(InnerPiece(net), *parts)
        weights = parts[0]
        return FirstPiece(net), FirstBackward(FirstPiece(net), *parts) if len(weights) else None

    def prepare(self, batch: Batch, per_token: Tensor, scale: Tensor) -> None:
        """Compile all for batches of this shape. Stages are not equally quick: a `comm.gate` has to follow."""
        tokens, labels, key = batch
        x = _zeros(self.hidden_shape(tokens))
        for net, forward, backward in zip(self.nets, self._forward, self._backward, strict=True):
            inputs = (tokens,) if net.model.begins else (x, tokens)
            if forward is not None:
                forward.prepare(*inputs, key)
            if backward is not None:
                backward.prepare(*inputs, *((labels, key, per_token, scale) if net.model.ends else (key, x)))
        self.prepare_exchanges(x.shape)

    def run(self, batches: Sequence[Batch], per_token: Tensor, scale: Tensor) -> float:
        """Add the scaled gradients of the window; returns its loss, on the last stage (elsewhere 0.0).

        batches: the window's micro-batches, the same on all stages. per_token, scale: see `train.step.TrainStep`.
        """
        kept: dict[tuple[int, int], Tensor | None] = {}
        shares: list[Tensor] = []

        def compute(work: Compute, came: Tensor | None) -> Tensor | None:
            tokens, labels, key = batches[work.micro_batch]
            place = work.micro_batch, work.chunk
            if work.kind == FORWARD:
                kept[place] = came
                forward = self._forward[work.chunk]
                return None if forward is None else forward(*_present(came), tokens, key)
            x, backward = kept.pop(place), self._backward[work.chunk]
            if self.nets[work.chunk].model.ends:
                share, gradient = backward(x, tokens, labels, key, per_token, scale)
                shares.append(share)
                return gradient
            return None if backward is None else backward(*_present(x), tokens, key, came)

        self.play(batches, compute, backward=True)
        return float(sum(float(share.asnumpy()) for share in shares))


class PipelineEvaluator(Pipeline):
    """Losses of batches, without dropout and without gradients. Arguments as `PipelineAccumulator`'s."""

    def __init__(self, nets: Sequence[nn.Cell], comm: Comm, graph_key: Mapping[str, Any] | None = None) -> None:
        super().__init__(nets, comm, graph_key)
        self._pieces = [self.compiled(self._cell(net), chunk) for chunk, net in enumerate(self.nets)]
        self._prepared: set[tuple[int, ...]] = set()

    @staticmethod
    def _cell(net: nn.Cell) -> nn.Cell:
        if net.model.ends:
            return LastPiece(net)
        return FirstPiece(net) if net.model.begins else InnerPiece(net)

    def evaluate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
        """(tokens, labels) int32 [B, S] of each batch, the same on all stages -> (sum of losses, supervised tokens) of
        each, on the last stage; elsewhere zeros. All ranks call it together."""
        for shape in sorted({tokens.shape for tokens, _ in batches} - self._prepared):
            self._prepare(shape)
        results = [(0.0, 0.0)] * len(batches)

        def compute(work: Compute, came: Tensor | None) -> Tensor | None:
            tokens, labels = batches[work.micro_batch]
            out = self._pieces[work.chunk](*self._inputs(work.chunk, came, tokens, labels))
            if not self.nets[work.chunk].model.ends:
                return out
            results[work.micro_batch] = float(out[0].asnumpy()), float(out[1].asnumpy())
            return None

        self.play(batches, compute, backward=False)
        return results

    def _inputs(self, chunk: int, x: Tensor | None, tokens: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        model = self.nets[chunk].model
        return (*(() if model.begins else (x,)), tokens, *((labels,) if model.ends else ()))

    def _prepare(self, shape: tuple[int, ...]) -> None:
        tokens = Tensor(np.zeros(shape, np.int32))
        x = _zeros(self.hidden_shape(tokens))
        for chunk, piece in enumerate(self._pieces):
            piece.prepare(*self._inputs(chunk, x, tokens, tokens))
        self.prepare_exchanges(x.shape)
        self.comm.gate()
        self._prepared.add(shape)


def share_prefix(nets: Sequence[nn.Cell]) -> None:
    """Let all pieces of a stage use the first one's trained prefix: its parameters are one set for all layers."""
    first = nets[0].model
    for net in nets[1:]:
        if first.prefix is not None:
            net.model.set_prefix(first.prefix, first.prefix_length)


_NOTHING = (1,)  # what a rank gives that has nothing to give: a number


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return Tensor(np.zeros(shape, np.float32))


def _present(x: Tensor | None) -> tuple[Tensor, ...]:
    return () if x is None else (x,)
