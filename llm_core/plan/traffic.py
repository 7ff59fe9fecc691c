"""What a rank sends to others for one update, in bytes by kind.

An all-reduce over n ranks sends 2 (n - 1) / n of its tensor, a gather or a scatter half of that, as rings do (and as
Patarasuk and Yuan show to be the least). On a CPU there is only the all-reduce: gathers and scatters cost as much.
"""

from __future__ import annotations

from typing import NamedTuple

from llm_core.parallel.cuts import embedding_is_cut, vocabulary_is_cut
from llm_core.parallel.layout import Layout
from llm_core.plan.job import Job
from llm_core.plan.memory import FLOAT, micro_batches, repeats
from llm_core.plan.parameters import Held, Slices


class Traffic(NamedTuple):
    """Bytes that one rank sends for one update."""

    gradients: float = 0.0  # over dp: an all-reduce, or a scatter where gradients are cut
    gathers: float = 0.0  # over dp: parameters that ZeRO has cut
    tensors: float = 0.0  # over tp: activations and their gradients
    stages: float = 0.0  # to the next stage, and back


KINDS = ("dp gradients", "ZeRO gathers", "tp activations", "pp sends")


def traffic_of_stage(
    job: Job, layout: Layout, held: Slices, stage: int, layers: tuple[tuple[int, ...], ...]
) -> Traffic:
    """Of a rank of this pipeline stage; `layers` are those of every stage."""
    first, last = stage == 0, stage == layout.pp - 1
    owned = held.of_stage(layers[stage], layout, stage)
    window = micro_batches(job, layout)
    stream = FLOAT * job.rows * job.length * job.spec.hidden_size * window
    shown = stream / (layout.tp if layout.sequence_parallel else 1)  # of it, what goes to another stage
    return Traffic(
        _gradients(job, layout, owned, window) + _tied(job, layout, held, first, last),
        _gathers(job, layout, owned, window, last),
        _tensors(job, layout, len(layers[stage]), first, last) * stream,
        _stages(layout, first, last) * shown,
    )


def _ring(ranks: int) -> float:
    """The share of a tensor that a rank sends in a gather or a scatter over so many."""
    return (ranks - 1) / ranks


def _scatter(job: Job, ranks: int) -> float:
    return _ring(ranks) * (2 if job.device.is_cpu else 1)


def _gradients(job: Job, layout: Layout, owned: Held, window: int) -> float:
    """Over dp, once an update; where the sums are cut (ZeRO 2 and 3), for every micro-batch."""
    if layout.dp == 1:
        return 0.0
    cut = owned.learning_cut if layout.zero else 0
    whole = 2 * _ring(layout.dp) * (owned.learning - cut)
    times = window if layout.zero >= 2 else 1
    return FLOAT * (whole + times * _scatter(job, layout.dp) * cut)


def _gathers(job: Job, layout: Layout, owned: Held, window: int, last: bool) -> float:
    """Over dp: ZeRO 1 and 2 gather what has been updated, ZeRO 3 all it needs, in every forward and backward pass."""
    share = _scatter(job, layout.dp) * FLOAT
    if layout.zero >= 3:
        return share * owned.weights_cut * (2 + repeats(job, layout, last)) * window
    return share * owned.learning_cut if layout.zero else 0.0


def _tensors(job: Job, layout: Layout, layers: int, first: bool, last: bool) -> float:
    """Over tp, in units of the residual stream: sums of what two products of a layer give, and of the gradients of what
    its norms give; the former once more where a forward pass is repeated. Besides one for a cut embedding, and one for
    a cut head. With sequence parallelism each is a scatter and a gather."""
    if layout.tp == 1:
        return 0.0
    norms = 1 if job.spec.residual == "parallel" else 2
    sums = (norms + 2 + 2 * repeats(job, layout, last)) * layers
    sums += first * embedding_is_cut(job.spec, layout)
    sums += last * vocabulary_is_cut(job.spec, layout)
    each = 2 * _scatter(job, layout.tp) if layout.sequence_parallel else 2 * _ring(layout.tp)
    return each * sums


def _stages(layout: Layout, first: bool, last: bool) -> float:
    """In units of the residual stream: for every piece of a stage what goes to the next stage, and back from it.

    Two stages exchange by an all-reduce of both messages, in which each sends as much as both together.
    """
    if layout.pp == 1:
        return 0.0
    return 2.0 * ((layout.chunks - last) + (layout.chunks - first))


def _tied(job: Job, layout: Layout, held: Slices, first: bool, last: bool) -> float:
    """A tied table lies on the first stage and on the last, and its gradients are summed."""
    if layout.pp == 1 or not held.tied or not (first or last):
        return 0.0
    return FLOAT * held.embedding.learning
