"""How many values a model has, part by part, and how many of them a rank of a layout holds.

All of it follows from the sizes in the run file: no weight is allocated, MindSpore and NumPy are not imported, so a 70B
model is planned as quickly as a small one. Layers that are alike are counted once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import HEAD_NAMES, DecoderSpec
from llm_core.parallel.cuts import EMBEDDING, Cut, cut_parameters
from llm_core.parallel.layout import Layout
from llm_core.peft.apply import adapter_shapes, is_adapter_name, is_trainable
from llm_core.plan.job import Job

PARTS = ("embedding", "attention", "feed-forward", "norms", "head", "adapter")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


def count_parts(spec: DecoderSpec, pet: Any) -> dict[str, tuple[int, int]]:
    """Part of the model -> (its parameters, how many of these learn). `pet`: the pet_config, or None."""
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, shape in (parameter_shapes(spec) | adapter_shapes(spec, pet)).items():
        size = prod(shape)
        every, learning = counts[_part(name)]
        counts[_part(name)] = every + size, learning + size * is_trainable(name, spec, pet)
    return counts


def _part(name: str) -> str:
    """The part that a parameter belongs to, by its name."""
    if is_adapter_name(name):
        return "adapter"
    if ".attention." in name:
        return "attention"
    if ".feed_forward." in name:
        return "feed-forward"
    if name.startswith("model.tok_embeddings."):
        return "embedding"
    return "head" if name.rpartition(".")[0] in HEAD_NAMES.values() else "norms"


class Held(NamedTuple):
    """Values on one rank: each count, and beside it how much of that ZeRO may cut over dp.

    products: of matrices that tokens are multiplied with; of these `learning_products` have a gradient. largest: values
    of the largest tensor that may be cut. tensors: how many there are, adapters, cut_tensors, learning_tensors,
    learning_cut_tensors: how many of these are an adapter's, may be cut, learn, or both.
    """

    weights: int = 0
    weights_cut: int = 0
    learning: int = 0
    learning_cut: int = 0
    state: int = 0
    state_cut: int = 0
    products: int = 0
    learning_products: int = 0
    largest: int = 0
    tensors: int = 0
    adapters: int = 0
    cut_tensors: int = 0
    learning_tensors: int = 0
    learning_cut_tensors: int = 0

    def plus(self, other: Held, times: int = 1) -> Held:
        """With so many of the other beside it."""
        sums = [mine + times * theirs for mine, theirs in zip(self, other, strict=True)]
        return Held(*sums)._replace(largest=max(self.largest, other.largest if times else 0))

    def uncut(self) -> Held:
        """The same, of which ZeRO cuts nothing."""
        return self._replace(
            weights_cut=0, learning_cut=0, state_cut=0, largest=0, cut_tensors=0, learning_cut_tensors=0
        )

    def share(self, whole: int, cut: int, dp: int, applies: bool) -> int:
        """Of a count with its cut part, what one of dp ranks has."""
        return whole - cut + cut // dp if applies else whole


class Inventory(NamedTuple):
    """A model's parameters, with layers that are alike counted together.

    kinds: a layer's parameters (names as in layer 0, without what comes before; shape; does it learn), and which layers
    have them. rest: those outside of the layers, by whole name.
    """

    spec: DecoderSpec
    kinds: tuple[tuple[tuple[tuple[str, tuple[int, ...], bool], ...], tuple[int, ...]], ...]
    rest: dict[str, tuple[tuple[int, ...], bool]]


def inventory(job: Job) -> Inventory:
    """Of a job's model and adapter."""
    spec = job.spec
    layers: list[list[tuple[str, tuple[int, ...], bool]]] = [[] for _ in range(spec.num_layers)]
    rest = {}
    for name, shape in (parameter_shapes(spec) | adapter_shapes(spec, job.pet)).items():
        learns = is_trainable(name, spec, job.pet)
        if match := _LAYER.match(name):
            layers[int(match[1])].append((match[2], shape, learns))
        else:
            rest[name] = shape, learns
    kinds: dict[tuple, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(tuple(layer), []).append(index)
    return Inventory(spec, tuple((kind, tuple(indices)) for kind, indices in kinds.items()), rest)


class Slices(NamedTuple):
    """What a rank holds of each kind of layer, and of what lies outside of them, for one tp and dp."""

    kinds: tuple[tuple[Held, frozenset[int]], ...]
    embedding: Held
    ending: Held  # last norm and head, without a tied head's table
    everywhere: Held  # a prefix, which every stage needs
    tied: bool

    def of_layers(self, layers: Iterable[int]) -> Held:
        """Of these layers of the model together."""
        held = Held()
        for kind, indices in self.kinds:
            held = held.plus(kind, len(indices.intersection(layers)))
        return held

    def of_stage(self, layers: Iterable[int], layout: Layout, stage: int) -> Held:
        """Of this pipeline stage, which has these layers."""
        first, last = stage == 0, stage == layout.pp - 1
        held = self.of_layers(layers).plus(self.everywhere)
        if first or (last and self.tied):
            on_both = self.tied and layout.pp > 1 and layout.zero > 1  # see `cuts`: then it stays whole
            held = held.plus(self.embedding.uncut() if on_both else self.embedding)
        return held.plus(self.ending) if last else held


def slices(stock: Inventory, layout: Layout, optimizer: Any) -> Slices:
    """How tp cuts the model, and what of that ZeRO may cut. `layout.pp` and `layout.zero` do not matter here (to a tied
    table they do, see `Slices.of_stage`).

    UserError where tp does not divide the model.
    """
    one = replace(layout, pp=1, chunks=1, offset=(), zero=3)
    small = replace(stock.spec, num_layers=1)
    kinds = []
    for kind, indices in stock.kinds:
        learns = {f"model.layers.0.{name}": learns for name, _, learns in kind}
        adapter = {f"model.layers.0.{name}": shape for name, shape, _ in kind if is_adapter_name(name)}
        cuts = cut_parameters(small, one, adapter)
        held = _held([(name, cuts[name], learning) for name, learning in learns.items()], one, optimizer)
        kinds.append((held, frozenset(indices)))
    adapter = {name: shape for name, (shape, _) in stock.rest.items() if is_adapter_name(name)}
    cuts = cut_parameters(small, one, adapter)
    outside = {name: (cuts[name], learns) for name, (_, learns) in stock.rest.items()}

    def gather(wanted: Any) -> Held:
        return _held([(name, *each) for name, each in outside.items() if wanted(name)], one, optimizer)

    def prefix(name: str) -> bool:
        return is_adapter_name(name) and not name.startswith(tuple(HEAD_NAMES.values()))

    return Slices(
        tuple(kinds),
        embedding=gather(lambda name: name == EMBEDDING),
        ending=gather(lambda name: name != EMBEDDING and not prefix(name)),
        everywhere=gather(prefix)._replace(products=0, learning_products=0),  # once a micro-batch, not a token
        tied=stock.spec.tied_head,
    )


def _held(found: Iterable[tuple[str, Cut, bool]], layout: Layout, optimizer: Any) -> Held:
    held = Held()
    for name, cut, learns in found:
        size, shape = prod(cut.part_shape), cut.part_shape
        cuts = cut.is_sharded(layout, 3)
        state = learns * state_size(optimizer, shape)
        product = size if len(shape) == 2 and name != EMBEDDING else 0
        held = held.plus(Held(
            size, cuts * size, learns * size, learns * cuts * size, state, cuts * state, product, learns * product,
            cuts * size, 1, is_adapter_name(name) * 1, cuts * 1, learns * 1, learns * cuts * 1,
        ))  # fmt: skip
    return held


def state_size(optimizer: Any, shape: tuple[int, ...]) -> int:
    """Values of the optimizer's state for a parameter of this shape; see train/optim.py."""
    kind = "" if optimizer is None else optimizer.type.lower()
    size = prod(shape)
    if kind == "adafactor":
        return size if len(shape) < 2 else prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]
    if kind == "sgd":
        return size if optimizer.momentum else 0
    return size if kind == "adagrad" else 2 * size
