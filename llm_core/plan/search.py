"""Layouts that a job could have: one of them estimated as a whole, all of a number of devices, and what would help one
that does not fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from llm_core.config.model_section import LoraConfig
from llm_core.errors import UserError
from llm_core.parallel.layout import Layout
from llm_core.plan.job import Job
from llm_core.plan.memory import Memory, largest, memory_of_stage, micro_batches
from llm_core.plan.parameters import Inventory, Slices, inventory, slices
from llm_core.plan.speed import Seconds, model_flops, seconds
from llm_core.plan.traffic import Traffic, traffic_of_stage


class Estimate(NamedTuple):
    """A job under a layout. memory, traffic: of the looked-at pipeline stages; time: of the slowest of them."""

    job: Job
    layout: Layout
    held: Slices
    layers: tuple[tuple[int, ...], ...]
    memory: dict[int, Memory]
    traffic: dict[int, Traffic]
    time: Seconds

    @property
    def fullest(self) -> Memory:
        """Memory of the rank that has most."""
        return largest(self.memory.values())

    @property
    def room(self) -> float:
        """Bytes that a rank may use; on a CPU the ranks share the machine's."""
        return self.job.room / (self.layout.world if self.job.device.is_cpu else 1)

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.fullest.total <= self.room

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.job.tokens / self.time.total

    @property
    def utilization(self) -> float:
        """Operations of the model itself, as a share of what all devices could do in that time."""
        device = self.job.device
        peak = device.narrow if self.job.narrow else device.wide
        devices = 1 if device.is_cpu else self.layout.world
        needed = model_flops(self.job, self.layout, self.held, self.layers)
        return needed * self.tokens_per_second / (peak * devices)


class Planner:
    """Estimates of one model; what layouts have in common is worked out once."""

    def __init__(self, job: Job, like: Planner | None = None) -> None:
        self.job = job
        self._slices: dict[tuple, Slices | UserError] = {}
        if like is not None and like.job.pet == job.pet:  # the same parameters
            self.stock, self._slices = like.stock, like._slices

    @cached_property
    def stock(self) -> Inventory:
        """The model's parameters."""
        return inventory(self.job)

    def estimate(self, layout: Layout, rows: int | None = None, every_stage: bool = True) -> Estimate:
        """The job under this layout, in micro-batches of so many rows (None: as the job says).

        every_stage False looks at the first and the last alone, one of which is the fullest and slowest. UserError
        where the model, the batch and the layout do not go together.
        """
        job = self.job if rows is None else replace(self.job, rows=rows)
        _require_batch(job, layout)
        if problem := _refused(job, layout):
            raise UserError(problem)
        held = self.slices(layout)
        layers = layout.layers(job.spec.num_layers)
        stages = range(layout.pp) if every_stage or not isinstance(job.recompute, bool) else {0, layout.pp - 1}
        memory = {stage: memory_of_stage(job, layout, held, stage, layers) for stage in stages}
        traffic = {stage: traffic_of_stage(job, layout, held, stage, layers) for stage in stages}
        times = (seconds(job, layout, held, stage, layers, traffic[stage]) for stage in stages)
        return Estimate(job, layout, held, layers, memory, traffic, max(times, key=lambda time: time.total))

    def slices(self, layout: Layout) -> Slices:
        """What ranks hold; depends on tp and dp alone."""
        key = layout.tp, layout.dp, layout.sequence_parallel, layout.whole_embedding, layout.zero_threshold
        if key not in self._slices:
            try:
                self._slices[key] = slices(self.stock, layout, self.job.optimizer)
            except UserError as error:
                self._slices[key] = error
        found = self._slices[key]
        if isinstance(found, UserError):
            raise found
        return found

    def layouts(self, devices: int, like: Layout) -> list[Estimate]:
        """For each way to factor so many devices the fastest estimate that fits, fastest first.

        ZeRO and the rows of a micro-batch are free, the records of an update are the job's; all else is as in `like`.
        Where nothing fits, the one that needs least memory. UserError where no factoring goes with the model.
        """
        every = list(self._every(devices, like))
        if not every:
            raise UserError(self._unreachable(devices))
        fitting = [each for each in every if each.fits]
        if not fitting:
            return [min(every, key=lambda each: each.fullest.total)]
        best: dict[tuple[int, int, int], Estimate] = {}
        for each in fitting:
            key = each.layout.dp, each.layout.tp, each.layout.pp
            if key not in best or self._rank(each) < self._rank(best[key]):
                best[key] = each
        return sorted(best.values(), key=self._rank)

    def _rank(self, estimate: Estimate) -> tuple[float, int, float]:
        """What makes one estimate better than another: time, then less ZeRO, then the run file's micro-batches."""
        rows = abs(math.log2(estimate.job.rows / self.job.rows))
        return round(estimate.time.total, 6), estimate.layout.zero, rows

    def _every(self, devices: int, like: Layout) -> Iterator[Estimate]:
        for tp, pp in itertools.product(_divisors(devices), repeat=2):
            dp, left = divmod(devices, tp * pp)
            if left or self.job.records % dp or pp > self.job.spec.num_layers:
                continue
            base = replace(
                like, dp=dp, tp=tp, pp=pp, zero=0, chunks=1, offset=(),
                sequence_parallel=like.sequence_parallel and tp > 1, whole_embedding=like.whole_embedding and pp == 1,
            )  # fmt: skip
            if _refused(self.job, base, rows=False):
                continue
            for rows in _powers(self.job.records // dp, max(self.job.rows, 16)):
                for zero in range(4 if dp > 1 else 1):
                    try:
                        yield self.estimate(replace(base, zero=zero), rows, every_stage=False)
                    except UserError:
                        break

    def _unreachable(self, devices: int) -> str:
        spec = self.job.spec
        most = self.job.records * spec.num_heads  # a pipeline needs a micro-batch a stage
        fewer = range(min(devices - 1, most), 0, -1)
        near = next(n for n in fewer if any(True for _ in self._every(n, Layout())))
        return (
            f"--devices {devices}: no layout of so many ranks goes with this model: data_parallel must divide the "
            f"{self.job.records} records of an update, model_parallel the {spec.num_heads} heads and the feed-forward "
            f"width {spec.ffn_size}, and pipeline_stage be at most {spec.num_layers} layers and the micro-batches of a "
            f"rank; {near} devices can be used"
        )

    def changes(self, now: Estimate, count: int = 3) -> list[tuple[str, Estimate]]:
        """The changes with which a layout that does not fit does: single ones, and pairs of which neither is enough;
        one of each kind. Those that need no more devices come first, LoRA and something else last among them, then
        those that cost less time of all devices."""
        single = list(_changes(now))
        tried = [((change,), self._changed(now, (change,))) for change in single]
        enough = {changes[0] for changes, estimate in tried if estimate is not None and estimate.fits}
        pairs = itertools.combinations([change for change in single if change not in enough], 2)
        tried += [(pair, self._changed(now, pair)) for pair in pairs]

        def cost(pair: tuple[tuple[_Change, ...], Estimate]) -> tuple[bool, bool, float, int]:
            changes, estimate = pair
            world = estimate.layout.world
            trains_less = len(changes) > 1 and any(change.kind == "lora" for change in changes)
            return world > now.layout.world, trains_less, estimate.time.total * world, len(changes)

        found: dict[frozenset[str], tuple[str, Estimate]] = {}
        fitting = [(changes, estimate) for changes, estimate in tried if estimate is not None and estimate.fits]
        for changes, estimate in sorted(fitting, key=cost):
            kind = frozenset(change.kind for change in changes)
            found.setdefault(kind, (" and ".join(change.text for change in changes), estimate))
        return list(found.values())[:count]

    def _changed(self, now: Estimate, changes: tuple[_Change, ...]) -> Estimate | None:
        """With these changes; None where they do not go with each other or the model."""
        job, layout = now.job, now.layout
        try:
            for change in changes:
                job, layout = change.apply(job, layout)
            return Planner(job, self).estimate(layout, every_stage=False)
        except UserError:
            return None


class _Change(NamedTuple):
    """What could be done; of several of one kind the best is shown."""

    kind: str
    text: str
    apply: Callable[[Job, Layout], tuple[Job, Layout]]


def _changes(now: Estimate) -> Iterator[_Change]:
    """What could be done to a layout that does not fit."""
    job, layout = now.job, now.layout
    if not job.recompute and not job.device.is_cpu:
        text = "recompute_config.recompute True"
        yield _Change("recompute", text, lambda job, layout: (replace(job, recompute=True), layout))
    for zero in range(layout.zero + 1, 4) if layout.dp > 1 else ():
        text = f"parallel.zero_stage {zero}"
        yield _Change("zero", text, lambda job, layout, zero=zero: (job, replace(layout, zero=zero)))
    for rows in _powers(job.rows, job.rows // 2):
        text = f"batch_size {rows} with {job.rows // rows} times the micro-batches"
        yield _Change("rows", text, lambda job, layout, rows=rows: (replace(job, rows=rows), layout))
    for factor in (2, 4, 8):
        yield _Change("tp", f"model_parallel {layout.tp * factor}", _wider("tp", factor))
        yield _Change("pp", f"pipeline_stage {layout.pp * factor}", _wider("pp", factor))
    if layout.world == 1:
        text = "data_parallel 2 with zero_stage 3"
        yield _Change("dp", text, lambda job, layout: (job, replace(layout, dp=2, zero=3)))
    if job.pet is None:
        pet = LoraConfig(pet_type="lora")
        text = "LoRA (pet_config.pet_type lora)"
        yield _Change("lora", text, lambda job, layout: (replace(job, pet=pet), layout))


def _wider(key: str, factor: int) -> Callable[[Job, Layout], tuple[Job, Layout]]:
    """More ranks along tp or pp: taken from dp where that has them, otherwise more devices."""

    def apply(job: Job, layout: Layout) -> tuple[Job, Layout]:
        dp, left = divmod(layout.dp, factor)
        dp = layout.dp if left else dp
        zero = layout.zero if dp > 1 else 0
        wide = getattr(layout, key) * factor
        layout = replace(layout, **{key: wide}, dp=dp, zero=zero, chunks=1, offset=())
        return job, replace(layout, whole_embedding=layout.whole_embedding and layout.pp == 1)

    return apply


def _require_batch(job: Job, layout: Layout) -> None:
    """UserError unless the records of an update are whole micro-batches on every rank, enough for the pipeline."""
    window = micro_batches(job, layout)
    if job.records % layout.dp:
        raise UserError(
            f"parallel_config.data_parallel: {layout.dp} ranks cannot share the {job.records} records of an update "
            "evenly; take a divisor of it"
        )
    if window * job.rows * layout.dp != job.records:
        raise UserError(
            f"runner_config.batch_size: {job.records // layout.dp} records of an update on a rank are no whole number "
            f"of batches of {job.rows}; take a divisor of it"
        )
    if window < layout.pp:
        raise UserError(
            f"parallel_config.micro_batch_num: {window} micro-batches an update do not fill {layout.pp} pipeline "
            f"stages; take at least {layout.pp}"
        )


def _refused(job: Job, layout: Layout, rows: bool = True) -> str:
    """Why a run would not train so (as config/validate.py says it); empty: it would. rows False: whatever its rows."""
    optimizer = "" if job.optimizer is None else job.optimizer.type
    if optimizer.lower().startswith("adafactor") and (layout.tp > 1 or layout.zero):
        return f"optimizer.type: {optimizer} needs whole matrices, which no rank has under model_parallel or ZeRO"
    if getattr(job.pet, "use_dora", False) and (layout.tp > 1 or layout.zero > 2):
        return "pet_config.use_dora: needs whole weights, which no rank has under model_parallel or zero_stage 3"
    if rows and layout.sequence_parallel and job.rows * job.length % layout.tp:
        return (
            f"parallel_config.use_seq_parallel: batch_size x seq_length = {job.rows * job.length} is not a multiple of "
            f"model_parallel {layout.tp}"
        )
    return ""


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _powers(number: int, limit: int) -> list[int]:
    """Powers of two up to the limit that divide the number, and the number itself if it is not above it."""
    found = [2**i for i in range(number.bit_length()) if number % 2**i == 0 and 2**i <= limit]
    return found if number > limit or number in found else [*found, number]
