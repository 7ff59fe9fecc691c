"""How a layout cuts every parameter: the one place that says so, for the layers, the gradients, the checkpoints and the
planner. Pure, without MindSpore.

Tensor parallelism cuts a linear layer by its outputs (axis 0) or, where the layer before it was cut by its outputs, by
its inputs (axis 1), as in Megatron-LM (arXiv 1909.08053). ZeRO cuts axis 0 of what is left over the dp ranks: of
matrices alone, since vectors and adapters are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from llm_core.errors import UserError
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import HEAD_NAMES, DecoderSpec
from llm_core.parallel.layout import Layout, Place

EMBEDDING = "model.tok_embeddings.embedding_weight"
_BY_OUTPUTS = ("wq", "wk", "wv", "w1", "w3", "lm_head")
_BY_INPUTS = ("wo", "w2")
_OF_KV_HEADS = ("wk", "wv")
_LORA_A, _LORA_B, _DORA = "mindpet_delta_lora_a", "mindpet_delta_lora_b", "mindpet_delta_lora_magnitude"
_ADAPTER = "mindpet_delta_"
_BYTES = 4  # of an element: parameters, gradients and state are float32


@dataclass(frozen=True)
class Cut:
    """What the ranks hold of one parameter.

    shape: of the whole. axis, parts: tensor parallelism cuts that axis into so many even parts; fewer than tp where
    several ranks hold the same part (key/value heads); axis None = whole. stages: of the pipeline that hold it.
    partial: the copies on the ranks of a tp group have each a part of the gradient, which is their sum (as the copies
    on several stages always have); otherwise every copy has the whole gradient. zero: axis 0 of a part can be cut
    further, over dp.
    """

    shape: tuple[int, ...]
    axis: int | None
    parts: int
    stages: tuple[int, ...]
    partial: bool
    zero: bool

    @property
    def part_shape(self) -> tuple[int, ...]:
        """What a tp rank holds, before ZeRO."""
        if self.axis is None:
            return self.shape
        return (*self.shape[: self.axis], self.shape[self.axis] // self.parts, *self.shape[self.axis + 1 :])

    def held_shape(self, layout: Layout, stage: int) -> tuple[int, ...]:
        """What a rank holds where ZeRO of this stage (1 state, 2 gradients, 3 parameters) applies, or does not."""
        shape = self.part_shape
        return (shape[0] // layout.dp, *shape[1:]) if self.is_sharded(layout, stage) else shape

    def is_sharded(self, layout: Layout, stage: int) -> bool:
        """Whether the dp ranks hold different rows: of the state (stage 1), gradient (2), parameter (3)."""
        return self.zero and layout.zero >= stage

    def part(self, layout: Layout, shard: int) -> int:
        """Which of the `parts` the tp rank `shard` holds."""
        return shard * self.parts // layout.tp

    def index(self, layout: Layout, place: Place) -> tuple[slice, ...]:
        """Where the part of a rank (before ZeRO) lies in the whole array."""
        if self.axis is None:
            return (slice(None),) * len(self.shape)
        width = self.shape[self.axis] // self.parts
        begin = self.part(layout, place.shard) * width
        return (*(slice(None),) * self.axis, slice(begin, begin + width))

    def rows(self, layout: Layout, place: Place) -> slice:
        """The rows of a part that belong to this dp rank where ZeRO applies."""
        count = self.part_shape[0] // layout.dp
        return slice(place.replica * count, (place.replica + 1) * count)

    def take(self, whole: Any, layout: Layout, place: Place, stage: int) -> Any:
        """What the rank holds of an array of the whole shape: its part, and of that its rows where ZeRO says so."""
        part = whole[self.index(layout, place)]
        return part[self.rows(layout, place)] if self.is_sharded(layout, stage) else part

    def copies(self, layout: Layout, stage: int) -> int:
        """How many ranks hold the same element, of state (1), gradient (2) or parameter (3)."""
        replicas = 1 if self.is_sharded(layout, stage) else layout.dp
        return replicas * (layout.tp // self.parts) * len(self.stages)

    def sum_group(self, layout: Layout, rank: int) -> tuple[int, ...]:
        """The ranks, `rank` among them, whose gradients add up to that of the part that they all hold."""
        at = layout.place(rank)
        shards = [at.shard]
        if self.partial:
            shards = [s for s in range(layout.tp) if self.part(layout, s) == self.part(layout, at.shard)]
        places = (Place(stage, replica, s) for stage in self.stages for replica in range(layout.dp) for s in shards)
        return tuple(sorted(layout.rank(place) for place in places))


def cut_parameters(spec: DecoderSpec, layout: Layout, adapter: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Cut]:  # fmt: skip
    """The cut of every parameter of the model `spec`, and of its adapter's (name -> whole shape).

    UserError where the model cannot be cut like that: heads or widths that tp does not divide.
    """
    require_divisible(spec, layout)
    stage_of = {layer: stage for stage, layers in enumerate(layout.layers(spec.num_layers)) for layer in layers}
    return {
        name: _cut(name, shape, spec, layout, stage_of)
        for name, shape in {**parameter_shapes(spec), **(adapter or {})}.items()
    }


def held_parameters(cuts: Mapping[str, Cut], layout: Layout, rank: int) -> dict[str, Cut]:
    """Those that this rank holds something of: its pipeline stage's."""
    stage = layout.place(rank).stage
    return {name: cut for name, cut in cuts.items() if stage in cut.stages}


def require_divisible(spec: DecoderSpec, layout: Layout) -> None:
    """UserError unless tp divides the model's heads and widths."""
    tp, where = layout.tp, "parallel_config.model_parallel"
    if tp == 1:
        return
    if spec.qkv_concat:
        raise UserError(
            f"{where}: {tp} ranks cannot share joined projections (model_config.qkv_concat True): set qkv_concat False "
            "and load weights with separate projections"
        )
    for name, size in (("num_heads", spec.num_heads), ("the feed-forward width", spec.ffn_size)):
        if size % tp:
            raise UserError(f"{where}: {tp} does not divide {name}, {size}; take a divisor of it")
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        raise UserError(
            f"{where}: {tp} ranks cannot share {spec.num_kv_heads} key/value heads evenly; take a divisor or a multiple"
        )


def vocabulary_is_cut(spec: DecoderSpec, layout: Layout) -> bool:
    """Whether the head (and its logits) are cut over tp. A tied head is the embedding and follows it."""
    if spec.head != "causal" or layout.tp == 1 or spec.vocab_size % layout.tp:
        return False
    return not (spec.tied_head and layout.whole_embedding)


def embedding_is_cut(spec: DecoderSpec, layout: Layout) -> bool:
    """Whether the rows of the embedding are shared out over tp."""
    return layout.tp > 1 and not layout.whole_embedding and spec.vocab_size % layout.tp == 0


def _cut(name: str, shape: tuple[int, ...], spec: DecoderSpec, layout: Layout, stage_of: dict[int, int]) -> Cut:
    axis, parts, partial = _tensor_cut(name, spec, layout)
    stages = _stages(name, spec, layout, stage_of)
    cut = Cut(shape, axis, parts, stages, partial, zero=False)
    large = prod(cut.part_shape) * _BYTES >= layout.zero_threshold
    fits = len(shape) > 1 and cut.part_shape[0] % layout.dp == 0 and _ADAPTER not in name
    if spec.head != "causal" and name.startswith(f"{HEAD_NAMES[spec.head]}."):  # a classifier's, made whole
        fits = False
    if layout.zero > 1 and len(stages) > 1:  # two stages would sum it within their passes, each at another time
        fits = False
    zero = layout.zero > 0 and layout.dp > 1 and large and fits
    return replace(cut, zero=zero)


def _stages(name: str, spec: DecoderSpec, layout: Layout, stage_of: dict[int, int]) -> tuple[int, ...]:
    last = layout.pp - 1
    if name.startswith("model.layers."):
        return (stage_of[int(name.split(".")[2])],)
    if name == EMBEDDING:
        return tuple(dict.fromkeys((0, last))) if spec.tied_head else (0,)
    if name.startswith(_ADAPTER):  # a prefix: every stage makes its own layers' keys and values from it
        return tuple(range(layout.pp))
    return (last,)


def _tensor_cut(name: str, spec: DecoderSpec, layout: Layout) -> tuple[int | None, int, bool]:
    """(axis, parts, partial) of a parameter, partial over tp."""
    tp = layout.tp
    whole = (None, 1, False)
    if tp == 1:
        return whole
    if name == EMBEDDING:
        return (0, tp, False) if embedding_is_cut(spec, layout) else whole
    if name.startswith(_ADAPTER):
        return None, 1, True
    owner, _, kind = name.rpartition(".")
    leaf = owner.rpartition(".")[2]
    if leaf in HEAD_NAMES.values() and not (leaf == "lm_head" and vocabulary_is_cut(spec, layout)):
        return whole
    if leaf in _BY_OUTPUTS:
        if kind == _LORA_A:  # its input is whole, its output goes into this rank's outputs alone
            return None, 1, True
        parts = min(tp, spec.num_kv_heads) if leaf in _OF_KV_HEADS else tp
        return 0, parts, parts < tp
    if leaf in _BY_INPUTS:
        if kind in ("weight", _LORA_A):
            return 1, tp, False
        return None, 1, kind == _LORA_B or layout.sequence_parallel
    return None, 1, layout.sequence_parallel and "norm" in leaf
