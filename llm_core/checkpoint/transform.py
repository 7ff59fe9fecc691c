"""Checkpoints of one layout written as another's: what tools/transform_ckpt.py does. A tensor's part at a time."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from llm_core.checkpoint.dtypes import Head
from llm_core.checkpoint.files import WRITABLE, file_size, write_tensors
from llm_core.checkpoint.manifest import Version, commit_with_manifest, verified_version
from llm_core.checkpoint.reshard import SHARDS, Share, extent, full, shards_entry
from llm_core.checkpoint.staged import StagedFile
from llm_core.checkpoint.strategy import Box, Strategy
from llm_core.checkpoint.weights import WeightFiles
from llm_core.errors import UserError


class Target(Protocol):
    """Who holds what after the transformation."""

    ranks: int

    def box(self, name: str, rank: int, whole: tuple[int, ...]) -> Box | None:
        """Where a rank's part of a tensor lies in the whole; None where it holds nothing of it."""


class LayoutTarget:
    """A layout of ours, by the shares of its ranks."""

    def __init__(self, shares: list[Share]):
        self.shares, self.ranks = shares, len(shares)

    def box(self, name: str, rank: int, whole: tuple[int, ...]) -> Box | None:
        return self.shares[rank].box(name, whole)


class OneFile:
    """One process: everything whole."""

    ranks = 1

    def box(self, name: str, rank: int, whole: tuple[int, ...]) -> Box | None:
        return full(whole)


def transform(
    source: WeightFiles, target: Target | Strategy, folder: str | Path, prefix: str = "checkpoint_",
    suffix: str = ".ckpt",
) -> list[Path]:  # fmt: skip
    """Write the tensors of `source` as folder/rank_{r}/{prefix}{r}{suffix}, a file with a manifest for every rank.

    Optimizer state and the run's state go along, so that a run of the target's layout can go on from the files.
    With a `LayoutTarget` MindSpore's strategy files are written too, into folder/strategy. UserError for a suffix that
    cannot be written, for the folder that the source lies in, and where the model is another one.
    """
    if suffix not in WRITABLE:
        raise UserError(f"{suffix}: checkpoints are written as {' or '.join(WRITABLE)}")
    _require_apart(source, Path(folder), target.ranks)
    source.verify()
    begun = _state_of(source)
    save = secrets.token_hex(8)
    paths = []
    for rank in range(target.ranks):
        boxes = _boxes(source.heads, lambda name, whole, rank=rank: target.box(name, rank, whole))
        version = begun
        if target.ranks > 1:
            places = {name: (source.heads[name].shape, box) for name, box in boxes.items()}
            shards = shards_entry(rank, target.ranks, f"{prefix}{{rank}}{suffix}", save, places)
            version = replace(begun, state={**begun.state, SHARDS: shards})
        paths.append(_write(Path(folder) / f"rank_{rank}" / f"{prefix}{rank}{suffix}", source, boxes, version))
        if isinstance(target, LayoutTarget):
            target.shares[rank].save_strategy(folder, {name: extent(box) for name, box in boxes.items()})
    return paths


def _require_apart(source: WeightFiles, folder: Path, ranks: int) -> None:
    """UserError for a folder whose files are the source's: replaced one by one, neither would be whole in between."""
    places = [folder / f"rank_{rank}" for rank in range(ranks)]
    places.append(folder / "checkpoint" / "rank_0")  # the run's own folder, with its strategy files
    taken = {place.resolve() for place in places}
    for file in source.files:
        if file.path.resolve().parent in taken:
            raise UserError(f"{folder}: holds the source itself, {file.path}: write into another folder")


def _boxes(
    heads: Mapping[str, Head], box: Callable[[str, tuple[int, ...]], Box | None]
) -> dict[str, Box]:
    """By name what a rank holds."""
    found = {name: box(name, head.shape) for name, head in heads.items()}
    return {name: box for name, box in found.items() if box is not None}


def _state_of(source: WeightFiles) -> Version:
    """The manifest's entry of the (first) file, without what it says of the ranks that saved it."""
    version = verified_version(source.files[0].path) or Version("", 0)
    state: dict[str, Any] = {key: value for key, value in version.state.items() if key != SHARDS}
    return replace(version, state=state)


def _write(path: Path, source: WeightFiles, boxes: Mapping[str, Box], version: Version) -> Path:
    heads = {name: Head(source.heads[name].dtype, extent(box)) for name, box in boxes.items()}
    metadata = {"format": "ms"}
    with StagedFile(path, file_size(path.suffix, heads, metadata)) as staged:
        write_tensors(staged, heads, lambda name: source.part(name, boxes[name]), metadata)
        commit_with_manifest(staged, replace(version, sha256=staged.sha256, size=staged.size))
    return path
