"""Checkpoints that several ranks have saved together: read as whole tensors, or as any other layout's parts of them.

A rank's file holds its parts; its manifest says where they lie, in the state's `shards`:

    {"rank": 1, "ranks": 4, "file": "llama_rank_{rank}-1_200.safetensors", "save": what all files of a save share,
     "layout": {"dp": 2, "tp": 2, ...}, "places": {name: {"whole": shape of the whole, "begin": first of each axis}}}

A tensor without a place is whole. Nothing but a tensor (or part) at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.checkpoint.dtypes import Head
from llm_core.checkpoint.files import TensorFile, open_tensor_file
from llm_core.checkpoint.manifest import Version, read_manifest, verified_version
from llm_core.checkpoint.staged import environment_faults
from llm_core.checkpoint.strategy import Box, Strategy, layout_of, write_strategy
from llm_core.errors import UserError
from llm_core.parallel.cuts import Cut
from llm_core.parallel.layout import Layout

SHARDS = "shards"  # of a manifest's state
_RANK = "{rank}"  # of a file's name
_STATE, _PARAMETER = 1, 3  # stages of ZeRO, see `Cut.take`


def extent(box: Box) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(axis.stop - axis.start for axis in box)


def full(shape: Sequence[int]) -> Box:
    """The box of the whole."""
    return tuple(slice(0, size) for size in shape)


@dataclass(frozen=True)
class Share:
    """What one rank holds of a model's parameters (`cuts`, by name) and of their optimizer state."""

    layout: Layout
    rank: int
    cuts: Mapping[str, Cut]

    def box(self, name: str, whole: Sequence[int] | None = None) -> Box | None:
        """Where what this rank holds of the tensor `name` lies in the whole; None where it holds nothing of it.

        whole: shape of the whole, as it was found; default the parameter's. State of a parameter that is not cut may
        have any (Adafactor's). A tensor that is neither a parameter nor its state is whole on every rank. UserError
        where the model's has another shape.
        """
        cut, stage = self._cut(name)
        if cut is None:
            return full(whole or ())
        found = cut.shape if whole is None else tuple(whole)
        if self.layout.place(self.rank).stage not in cut.stages:
            return None
        box = self._part(cut, stage)
        if stage == _STATE and box == full(cut.shape):
            return full(found)
        if found != cut.shape:
            raise UserError(f"{name} is {list(found)} in the file and {list(cut.shape)} in this model")
        return box

    def _part(self, cut: Cut, stage: int) -> Box:
        place = self.layout.place(self.rank)
        box = list(full(cut.shape))
        for axis, part in enumerate(cut.index(self.layout, place)):
            box[axis] = slice(*part.indices(cut.shape[axis])[:2])
        if cut.is_sharded(self.layout, stage):
            rows, first = cut.rows(self.layout, place), box[0].start
            box[0] = slice(first + rows.start, first + rows.stop)
        return tuple(box)

    def whole(self, name: str) -> tuple[int, ...] | None:
        """The whole shape of a parameter or its state; None for another name."""
        cut = self._cut(name)[0]
        return None if cut is None else cut.shape

    def shards(self, file: str, save: str, tensors: Mapping[str, Head]) -> dict[str, Any]:
        """The manifest's entry for this rank's file of these parts, see `shards_entry`. ValueError where one has not
        the shape that this rank holds."""
        places = {}
        for name, head in tensors.items():
            cut, stage = self._cut(name)
            if cut is None:
                continue
            box = self.box(name)
            if stage == _STATE and box == full(cut.shape):
                continue
            if box is None or head.shape != extent(box):
                due = box and extent(box)
                raise ValueError(f"{name} {head.shape} on rank {self.rank}: due is {due} of {cut.shape}")
            places[name] = (cut.shape, box)
        return shards_entry(self.rank, self.layout.world, file, save, places) | {"layout": asdict(self.layout)}

    def save_strategy(self, output_dir: str | Path, shapes: Mapping[str, Sequence[int]]) -> Path:
        """Write this rank's strategy file, MindFormers' output_dir/strategy/ckpt_strategy_rank_N.ckpt. shapes: of the
        tensors that it saves, by name. Rank 0 removes the files of ranks that there are no more."""
        layouts = {}
        for name, shape in shapes.items():
            cut, stage = self._cut(name)
            if cut is not None:
                layout = layout_of(cut, self.layout, stage)
                layouts[name] = layout if any(layout.axes) else replace(layout, axes=((),) * len(shape))
        folder = Path(output_dir) / "strategy"
        if self.rank == 0:
            _remove_strategies(folder, self.layout.world)
        path = folder / f"ckpt_strategy_rank_{self.rank}.ckpt"
        write_strategy(path, layouts, self.layout.place(self.rank).stage)
        return path

    def _cut(self, name: str) -> tuple[Cut | None, int]:
        if name in self.cuts:
            return self.cuts[name], _PARAMETER
        return self.cuts.get(name.partition(".")[2]), _STATE


def _remove_strategies(folder: Path, ranks: int) -> None:
    """Of an earlier run of more ranks, which would be taken for this one's."""
    for path in folder.glob("ckpt_strategy_rank_*.ckpt"):
        number = path.stem.rpartition("_")[2]
        if number.isdecimal() and int(number) >= ranks:
            with environment_faults(path):
                path.unlink(missing_ok=True)


def shards_entry(
    rank: int, ranks: int, file: str, save: str, places: Mapping[str, tuple[Sequence[int], Box]]
) -> dict[str, Any]:
    """What a manifest says of the file of one rank of several.

    file: its name, with {rank} for the rank's number. save: what the files of one save have in common, and no others.
    places: of each tensor the shape of the whole, and where this rank's part lies in it.
    """
    parts = {
        name: {"whole": list(whole), "begin": [axis.start for axis in box]}
        for name, (whole, box) in places.items()
        if box != full(whole)
    }
    return {"rank": rank, "ranks": ranks, "file": file, "save": save, "places": parts}


class RankFiles:
    """The files of all ranks as one weight file of whole tensors; a value is read when it is asked for.

    path: rank 0's file. heads: of the whole tensors. UserError where the parts of a tensor are not all of it.
    """

    def __init__(self, files: Sequence[TensorFile], box: Callable[[int, str, Head], tuple[tuple[int, ...], Box]]):
        """box: rank, name and head of a part -> shape of the whole and the part's place in it."""
        self.path, self.metadata = files[0].path, files[0].metadata
        self.heads: dict[str, Head] = {}
        self._files = files
        self._pieces: dict[str, dict[tuple, tuple[Box, TensorFile]]] = {}
        for rank, file in enumerate(files):
            for name, head in file.heads.items():
                whole, part = box(rank, name, head)
                known = self.heads.setdefault(name, Head(head.dtype, whole))
                if known.shape != whole or extent(part) != head.shape:
                    raise UserError(f"{file.path}: {name} {list(head.shape)} does not fit the other ranks' files")
                key = tuple((axis.start, axis.stop) for axis in part)
                self._pieces.setdefault(name, {}).setdefault(key, (part, file))
        for name, pieces in self._pieces.items():
            found = sum(prod(extent(part)) for part, _ in pieces.values())
            if found != self.heads[name].size:
                raise UserError(
                    f"{self.path}: {found} of the {self.heads[name].size} elements of {name} are in the files of "
                    f"{len(files)} ranks; a rank's file is missing or of another run"
                )

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, as a new array (bfloat16 as float32)."""
        return self.read_part(name, full(self.heads[name].shape))

    def read_part(self, name: str, box: Box) -> np.ndarray:
        """A part of the tensor, from the files that hold something of it."""
        part = None
        for piece, file in self._pieces[name].values():
            if piece == box:
                return file.read(name)
            shared = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(piece, box, strict=True)]
            if any(axis.start >= axis.stop for axis in shared):
                continue
            array = file.read(name)
            part = np.empty(extent(box), array.dtype) if part is None else part
            part[_within(shared, box)] = array[_within(shared, piece)]
        return np.empty(extent(box), np.float32) if part is None else part

    def verify(self) -> None:
        """Check the file of every rank against its manifest, or its own crc where it has none."""
        for file in self._files:
            if verified_version(file.path) is None:
                file.verify()

    def close(self) -> None:
        for file in self._files:
            file.close()


def _within(box: Sequence[slice], outer: Box) -> Box:
    """A box in the coordinates of the part that holds it."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, outer, strict=True))


def read_part(file: TensorFile, name: str, box: Box) -> np.ndarray:
    """A part of a tensor of a file, or of all ranks' files, as a new array."""
    if isinstance(file, RankFiles):
        return file.read_part(name, box)
    array = file.read(name)
    return array if extent(box) == array.shape else array[box].copy()


def paths_of_save(path: Path) -> list[Path]:
    """The files of all ranks of the checkpoint that `path` belongs to, rank 0's first; of one process `path` alone.

    UserError that names the rank whose file is missing or of another save.
    """
    shards = shards_of(path)
    if shards is None:
        return [path]
    nameless = path.parent.name in ("", "..")  # named from within its folder, or one below it
    folder = (path.parent.resolve() if nameless else path.parent).parent
    paths = [folder / f"rank_{rank}" / shards["file"].replace(_RANK, str(rank)) for rank in range(shards["ranks"])]
    for rank, file in enumerate(paths):
        of = f"{file}: the file of rank {rank} of the {shards['ranks']} that saved this checkpoint"
        if not file.is_file():
            raise UserError(f"{of} is missing; all of them are needed, in folders beside each other")
        own = shards_of(file)
        if own is None or (own["save"], own["rank"]) != (shards["save"], rank):
            raise UserError(f"{of} is of another save; use another checkpoint")
    return paths


def open_ranks(path: Path) -> TensorFile:
    """A weight file; where it is one rank's of a checkpoint of several, the files of all ranks as one.

    UserError that names the rank whose file is missing, damaged or of another save.
    """
    paths = paths_of_save(path)
    said = [shards_of(file) for file in paths]
    if said[0] is None:
        return open_tensor_file(path)

    def place(rank: int, name: str, head: Head) -> tuple[tuple[int, ...], Box]:
        at = said[rank]["places"].get(name)
        if at is None:
            return head.shape, full(head.shape)
        ends = zip(at["begin"], head.shape, strict=True)
        return tuple(at["whole"]), tuple(slice(first, first + size) for first, size in ends)

    return _open(paths, place)


def open_by_strategy(paths: Sequence[Path], strategy: Strategy) -> RankFiles:
    """The files of all ranks, rank 0's first, of a run that left `strategy`."""
    if len(paths) != strategy.ranks:
        raise UserError(f"{paths[0]}: files of {len(paths)} ranks, and the strategy is of {strategy.ranks}")

    def place(rank: int, name: str, head: Head) -> tuple[tuple[int, ...], Box]:
        try:
            whole = strategy.whole(name, head.shape)
        except ValueError:
            raise UserError(f"{paths[rank]}: {name} {list(head.shape)} is not what the strategy describes") from None
        box = strategy.box(name, rank, whole)
        if box is None:
            raise UserError(f"{paths[rank]}: {name}: by the strategy no parameter of rank {rank}'s pipeline stage")
        return whole, box

    return _open(paths, place)


def _open(paths: Sequence[Path], place: Callable[[int, str, Head], tuple[tuple[int, ...], Box]]) -> RankFiles:
    files: list[TensorFile] = []
    try:
        for path in paths:
            files.append(open_tensor_file(path))
        return RankFiles(files, place)
    except BaseException:
        for file in files:
            file.close()
        raise


def shards_of(path: Path) -> dict[str, Any] | None:
    """What the manifest of a file says of the ranks that saved it together; None where one process did."""
    versions = read_manifest(path)
    if not versions or SHARDS not in versions[0].state:
        return None
    return _only(path, versions).state[SHARDS]


def _only(path: Path, versions: list[Version]) -> Version:
    """The version that the file is; they have to be told apart by content only where a save was cut short."""
    return versions[0] if len(versions) == 1 else verified_version(path) or versions[0]
