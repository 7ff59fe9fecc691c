"""MindSpore's strategy files: which part of every parameter each rank holds, as ms.transform_checkpoints reads it.

The ranks of a pipeline stage are numbered through a device matrix, last dimension fastest, and every axis of a
parameter is cut over some of its dimensions (none: whole). A rank's file names the parameters of its stage; a file
that MindSpore has merged names those of all stages, as `STAGE-NAME`. (Format: mindspore's node_strategy.proto and
parallel/_parallel_serialization.py; either protobuf under any name, or .json.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from llm_core.checkpoint.protobuf import DamagedMessageError, bytes_field, number_field, numbers, parse
from llm_core.checkpoint.staged import StagedFile
from llm_core.errors import UserError
from llm_core.parallel.cuts import Cut
from llm_core.parallel.layout import Layout

Box = tuple[slice, ...]  # where a part lies in the whole: a slice with both ends for every axis

_NONE = -1  # of a tensor map: an axis that is not cut
_ALL = -1  # of an optimizer's shard size: all ranks that hold the same


@dataclass(frozen=True)
class TensorLayout:
    """How the ranks of a pipeline stage share a tensor.

    matrix: sizes of the device matrix. axes: for every axis of the tensor the dimensions of the matrix that cut it,
    counted from the right, outermost first. shards: that many of the ranks that hold the same part have each some of
    its rows (MindSpore's parallel optimizer). stages: of the pipeline that hold the tensor.
    """

    matrix: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    shards: int = 1
    stages: tuple[int, ...] = (0,)

    def counts(self) -> tuple[int, ...]:
        """The number of parts that each axis is cut into."""
        counts = [prod(self._size(dim) for dim in axis) for axis in self.axes]
        return (counts[0] * self.shards, *counts[1:]) if counts else ()

    def box(self, rank: int, whole: tuple[int, ...]) -> Box | None:
        """Where the part of a rank (of the whole run) lies; None where its stage does not hold the tensor. The parts
        have to be even ones, see `counts`."""
        stage, local = divmod(rank, prod(self.matrix))
        if stage not in self.stages:
            return None
        at = self._coordinates(local)
        parts = [_mixed((at[dim], self._size(dim)) for dim in axis) for axis in self.axes]
        if self.shards > 1:
            used = {dim for axis in self.axes for dim in axis}
            free = (dim for dim in reversed(range(len(self.matrix))) if dim not in used)
            parts[0] = parts[0] * self.shards + _mixed((at[dim], self._size(dim)) for dim in free) % self.shards
        widths = [size // count for size, count in zip(whole, self.counts(), strict=True)]
        return tuple(slice(part * width, (part + 1) * width) for part, width in zip(parts, widths, strict=True))

    def is_like(self, other: TensorLayout) -> bool:
        """Whether the ranks of a stage hold the same parts by the other, however it says so."""
        mine, its = (replace(layout, stages=(0,)) for layout in (self, other))
        if mine == its:
            return True
        counts, ranks = mine.counts(), prod(mine.matrix)
        if counts != its.counts() or ranks != prod(its.matrix):
            return False
        return all(mine.box(rank, counts) == its.box(rank, counts) for rank in range(ranks))

    def _size(self, dim: int) -> int:
        return self.matrix[-1 - dim]

    def _coordinates(self, local: int) -> list[int]:
        """Of a rank within its stage, by dimension from the right."""
        at = []
        for size in reversed(self.matrix):
            local, coordinate = divmod(local, size)
            at.append(coordinate)
        return at


def _mixed(digits: Iterable[tuple[int, int]]) -> int:
    """The number with these (digit, base) pairs, the most significant first."""
    value = 0
    for digit, base in digits:
        value = value * base + digit
    return value


def layout_of(cut: Cut, layout: Layout, stage: int) -> TensorLayout:
    """How the ranks of `layout` share a tensor cut like that; stage: 1 optimizer state, 3 parameter (see `Cut.take`).

    The device matrix is dp x parts x copies, because several tp ranks may hold the same key/value heads. ZeRO's rows
    are a cut of axis 0 over dp: MindSpore's own parallel optimizer could not say so where tp ranks hold the same.
    """
    axes: list[tuple[int, ...]] = [()] * len(cut.shape)
    if cut.axis is not None and cut.parts > 1:
        axes[cut.axis] = (1,)
    if cut.is_sharded(layout, stage):
        axes[0] += (2,)
    return TensorLayout((layout.dp, cut.parts, layout.tp // cut.parts), tuple(axes), stages=cut.stages)


# ---- writing


def write_strategy(path: Path, layouts: Mapping[str, TensorLayout], stage: int) -> None:
    """Write the strategy file of a rank of pipeline stage `stage`: the names and layouts of what it holds."""
    items = number_field(1, stage)  # MindSpore takes a file's stage from its first operator: there has to be one
    content = number_field(1, 1) + bytes_field(2, bytes_field(1, b"stage") + bytes_field(2, items))
    for name, layout in layouts.items():
        content += bytes_field(3, bytes_field(1, name.encode()) + bytes_field(2, _layout_message(layout)))
    with StagedFile(path, len(content)) as staged:
        staged.write(content)
        staged.finish()
        staged.commit()


def _layout_message(layout: TensorLayout) -> bytes:
    maps = [axis or (_NONE,) for axis in layout.axes]
    if all(len(axis) == 1 for axis in maps):
        maps = [tuple(axis[0] for axis in maps)]
    else:  # a map for every axis; MindSpore leaves out an empty one, but two mark this form
        maps += [()] * (len(maps) == 1)
    message = bytes_field(1, _dims(layout.matrix))
    message += b"".join(bytes_field(2, _dims(axis)) for axis in maps)
    message += bytes_field(3, b"") + bytes_field(4, b"")  # of even parts there is nothing more to say
    return message + b"".join(number_field(number, 0) for number in (5, 6, 7))


def _dims(values: Iterable[int]) -> bytes:
    return b"".join(number_field(1, value) for value in values)


# ---- reading


@dataclass(frozen=True)
class Strategy:
    """The layouts of all tensors of a run, by name, and its number of ranks. path: of its file or folder."""

    layouts: Mapping[str, TensorLayout]
    ranks: int
    path: Path

    def box(self, name: str, rank: int, whole: tuple[int, ...]) -> Box | None:
        """Where a rank's part of a tensor lies, None where it holds nothing of it. A tensor that the strategy does not
        name (a counter) is whole on every rank. UserError where the strategy is of another tensor."""
        layout = self.layouts.get(name)
        if layout is None:
            return tuple(slice(0, size) for size in whole)
        counts = layout.counts()
        if len(counts) != len(whole) or any(size % count for size, count in zip(whole, counts, strict=True)):
            raise UserError(
                f"{self.path}: {name} {list(whole)} cannot be cut into {list(counts)} parts, as this strategy says: "
                "give that of a run of this model"
            )
        return layout.box(rank, whole)

    def whole(self, name: str, held: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole of which a rank holds a part of the shape `held`."""
        layout = self.layouts.get(name)
        if layout is None:
            return held
        return tuple(size * count for size, count in zip(held, layout.counts(), strict=True))


def read_strategy(path: str | Path) -> Strategy:
    """The strategy of a run: a file (of one stage, or merged), or the folder of all ranks' files.

    UserError for one that is missing or damaged, where a pipeline stage is missing, and where files contradict each
    other.
    """
    path = Path(path).expanduser()
    files = sorted((*path.glob("*.ckpt"), *path.glob("*.json"))) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no strategy file in this folder (.ckpt or .json)")
    layouts: dict[str, TensorLayout] = {}
    for file in files:
        for name, layout in _read_file(file):
            known = layouts.get(name, layout)
            if not layout.is_like(known):
                raise UserError(
                    f"{file}: {name} is shared out otherwise than in the files before it, {files[0].name} ...: files "
                    "of several runs? Give those of one"
                )
            layouts[name] = replace(known, stages=tuple(sorted({*known.stages, *layout.stages})))
    if not layouts:
        raise UserError(f"{path}: this strategy names no parameter")
    sizes = {prod(layout.matrix) for layout in layouts.values()}
    stages = {stage for layout in layouts.values() for stage in layout.stages}
    if len(sizes) > 1:
        raise UserError(f"{path}: its parameters are shared by {sorted(sizes)} ranks each: files of several runs?")
    missing = sorted(set(range(max(stages) + 1)) - stages)
    if missing:
        raise UserError(f"{path}: no parameter of pipeline stage {missing[0]}; give the folder of all ranks' files")
    return Strategy(layouts, sizes.pop() * len(stages), path)


def _read_file(file: Path) -> list[tuple[str, TensorLayout]]:
    """Names and layouts; a name may stand there for each of its stages."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: the strategy cannot be read: {error.strerror or error}") from error
    try:
        stage, items = (_json_items if file.suffix == ".json" else _protobuf_items)(content)
        found = []
        for name, item in items.items():
            own, dash, merged = name.partition("-")
            at = int(own) if dash else stage
            found.append((merged or name, _tensor_layout(item, at)))
        return found
    except (DamagedMessageError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{file}: damaged, or no strategy file of MindSpore ({error})") from error


def _json_items(content: bytes) -> tuple[int, dict[str, Any]]:
    tree = json.loads(content)
    stages = [item["stage"] for item in tree.get("parallel_strategy_item", {}).values()]
    return (stages or [0])[0], tree["parallel_layout_item"]


def _protobuf_items(content: bytes) -> tuple[int, dict[str, Any]]:
    tree = parse(content)
    stages = [parse(parse(item)[2][0])[1][0] for item in tree.get(2, [])]
    return (stages or [0])[0], dict(_protobuf_item(parse(item)) for item in tree[3])


def _protobuf_item(item: dict[int, list]) -> tuple[str, dict[str, Any]]:
    """Name and layout, the latter with the keys of the JSON form."""
    layout = parse(item[2][0])
    maps = [numbers(parse(axis).get(1, [])) for axis in layout[2]]
    return item[1][0].decode(), {
        "dev_matrix": numbers(parse(layout[1][0])[1]),
        "tensor_map": [axis for axis in maps if axis] if len(maps) > 1 else maps[0],
        "field": layout[5][0],
        "opt_weight_shard_step": layout[6][0],
        "opt_weight_shard_size": layout[7][0],
    }


def _tensor_layout(item: Mapping[str, Any], stage: int) -> TensorLayout:
    if item["field"]:
        raise ValueError("a table that is shared out by fields is not supported")
    matrix = tuple(map(int, item["dev_matrix"]))
    maps = [axis if isinstance(axis, list) else [axis] for axis in item["tensor_map"]]
    axes = tuple(tuple(dim for dim in axis if dim != _NONE) for axis in maps)
    layout = TensorLayout(matrix, axes, stages=(stage,))
    shards = item["opt_weight_shard_size"]
    if shards == _ALL:
        shards = prod(matrix) // prod(layout.counts())
    return replace(layout, shards=shards if item["opt_weight_shard_step"] and shards > 1 else 1)
