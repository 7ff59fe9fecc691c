"""How long an update takes: products, the pipeline's idle time, what is sent, the optimizer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from llm_core.parallel.layout import Layout
from llm_core.plan.job import Job
from llm_core.plan.memory import FLOAT, micro_batches, repeats
from llm_core.plan.parameters import Held, Slices
from llm_core.plan.traffic import Traffic

BUCKET = 16 << 20  # no collective is larger
UPDATE_PASSES = 7  # weight, gradient and two moments are read, three of them written


class Seconds(NamedTuple):
    """Of one update on the slowest stage; what is sent waits for nothing and hides behind nothing."""

    products: float
    idle: float  # of the pipeline
    tensors: float
    stages: float
    gradients: float  # with ZeRO's gathers
    update: float

    @property
    def total(self) -> float:
        """Of the whole update."""
        return sum(self)


KINDS = ("products", "pipeline idle", "tp", "pp", "dp", "optimizer")


def flops(job: Job, layout: Layout, held: Slices, stage: int, layers: tuple[tuple[int, ...], ...]) -> float:
    """Floating-point operations of a rank of this stage for one token of its rows, forward and backward.

    2 a weight forward, 2 for the gradient of the input, 2 for that of the weight if it learns; causal attention sees
    half of the keys. Layers computed again add their forward pass.
    """
    spec, mine = job.spec, layers[stage]
    last = stage == layout.pp - 1
    inside = held.of_layers(mine)
    owned = held.of_stage(mine, layout, stage)
    attention = 2.0 * job.length * spec.q_size / layout.tp * len(mine)
    forward, learning = 2.0 * owned.products + attention, 2.0 * owned.learning_products
    if last and held.tied:
        forward += 2.0 * held.embedding.weights
        learning += 2.0 * held.embedding.learning
    return 2.0 * forward + attention + learning + _again(job, layout, stage, inside, attention, len(mine))


def _again(job: Job, layout: Layout, stage: int, inside: Held, attention: float, layers: int) -> float:
    """What is computed once more: by the pipeline, and by recompute_config, for as many layers as it names."""
    by_pipeline = repeats(replace(job, recompute=False), layout, stage == layout.pp - 1)
    named = 0 if job.device.is_cpu else job.recomputed(stage, layers) / layers
    return (2.0 * inside.products + attention) * (by_pipeline + named)


def model_flops(job: Job, layout: Layout, held: Slices, layers: tuple[tuple[int, ...], ...]) -> float:
    """Of all ranks together for one token, without what is computed again: what a utilization is measured by."""
    plain = layout.pp == 1 and not job.recompute
    total = 0.0
    for stage, mine in enumerate(layers):
        total += layout.tp * flops(job, layout, held, stage, layers)
        if not plain:
            inside = held.of_layers(mine)
            attention = 2.0 * job.length * job.spec.q_size / layout.tp * len(mine)
            total -= layout.tp * _again(job, layout, stage, inside, attention, len(mine))
    return total


def seconds(
    job: Job, layout: Layout, held: Slices, stage: int, layers: tuple[tuple[int, ...], ...], sent: Traffic
) -> Seconds:
    """Of one update, if every stage were as slow as this one."""
    device = job.device
    peak = device.narrow if job.narrow else device.wide
    if device.is_cpu:
        peak /= layout.world  # the ranks share the cores
    window = micro_batches(job, layout)
    products = flops(job, layout, held, stage, layers) * job.rows * job.length * window / (peak * device.efficiency)
    near = device.per_machine
    tp_link = device.link if layout.tp <= near else device.network
    dp_link = device.link if layout.tp * layout.dp <= near else device.network
    pp_link = device.link if layout.world <= near else device.network
    sums = 6 * len(layers[stage]) * window if layout.tp > 1 else 0
    tensors = sent.tensors / tp_link + sums * device.latency
    idle = (layout.pp - 1) / (window * layout.chunks)
    over_dp = sent.gradients + sent.gathers
    buckets = math.ceil(over_dp / BUCKET)
    owned = held.of_stage(layers[stage], layout, stage)
    updated = owned.share(owned.state, owned.state_cut, layout.dp, layout.zero >= 1) / 2
    return Seconds(
        products=products,
        idle=idle * (products + tensors),
        tensors=tensors,
        stages=sent.stages / pp_link,
        gradients=over_dp / dp_link + buckets * device.latency,
        update=FLOAT * UPDATE_PASSES * updated / device.bandwidth,
    )
