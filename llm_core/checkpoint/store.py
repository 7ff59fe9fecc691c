"""The checkpoints of one run: saved so that the process may be killed at any moment, listed, pruned, read back.

MindFormers' layout::

    {output_dir}/checkpoint/rank_{r}/{prefix}_rank_{r}-{epoch}_{step}.safetensors   weights and optimizer state
                                     ... .safetensors.manifest.json                 hash, size, run state
                                     {prefix}_rank_{r}-best.json                    the best by a metric
                                     meta.json                                      the last one
    {output_dir}/checkpoint_network/rank_{r}/                                       weights alone, on request
    {output_dir}/checkpoint_trainable/rank_{r}/                                     trainable weights, on request
    {output_dir}/strategy/ckpt_strategy_rank_{r}.ckpt                               of several ranks: who holds what

Several ranks save together: the files of one save share a number, and none is pruned or pointed to before all are on
the disk. A checkpoint of several ranks is named by its rank 0's file, and whole if every rank's is.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Callable, Collection, Container, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from llm_core.checkpoint.dtypes import head_of
from llm_core.checkpoint.files import TensorFile, file_size, open_tensor_file, write_tensors
from llm_core.checkpoint.manifest import (
    MANIFEST_SUFFIX,
    Version,
    commit_with_manifest,
    manifest_path,
    read_manifest,
    verified_version,
)
from llm_core.checkpoint.reshard import SHARDS, Share, open_ranks, paths_of_save, read_part
from llm_core.checkpoint.staged import StagedFile, environment_faults, remove_stale, write_json
from llm_core.checkpoint.state_names import without_state
from llm_core.errors import EnvironmentFault, UserError

_ROOM_FOR_JSON = 1 << 16
_SEEN_SECONDS = 60.0  # within which NFS shows what another machine has written


@dataclass(frozen=True)
class _Agreed:
    """What all ranks have in common in one save. keep: names of the checkpoints that stay then, None = all."""

    serial: int
    time: float
    save: str
    is_best: bool
    keep: list[str] | None


Meet = Callable[[str], list[str]]  # waits for all ranks; gives what each has brought, by rank


class CheckpointStore:
    """Saves and reads the checkpoints of `output_dir` for one rank.

    ranks, meet: of a run of several, which save and look for the latest together; before the first save or `read`
    `share` has to be set to what this rank holds. They all have to see the same folder.

    Only the run that holds `lock_output_dir(output_dir)` may save. The `keep_max` newest checkpoints are kept (0: all),
    and with `keep_per_minutes=n` the first of every n minutes besides. The best (`keep_best`: the name of the metric
    given to `save`, lower is better) and the last are never deleted, nor what no store has saved (MindFormers' own).
    """

    def __init__(
        self,
        output_dir: str | Path,
        prefix: str,
        rank: int = 0,
        ranks: int = 1,
        meet: Meet | None = None,
        *,
        keep_max: int = 5,
        file_format: str = "safetensors",
        keep_best: str | None = None,
        save_network_params: bool = False,
        keep_per_minutes: float = 0,
    ):
        if file_format not in ("safetensors", "ckpt"):
            raise UserError(f"checkpoint_format: {file_format!r} is not known; use safetensors or ckpt")
        self.share: Share | None = None
        self.folder = Path(output_dir) / "checkpoint" / f"rank_{rank}"
        self._output_dir, self._rank, self._ranks, self._meet = Path(output_dir), rank, ranks, meet
        self._network_folder = Path(output_dir) / "checkpoint_network" / f"rank_{rank}"
        self._trainable_folder = Path(output_dir) / "checkpoint_trainable" / f"rank_{rank}"
        self._prefix = prefix
        self._stem = f"{prefix}_rank_{rank}"
        self._suffix = f".{file_format}"
        self._keep_max = keep_max
        self._keep_best = keep_best
        self._keep_per_minutes = keep_per_minutes
        self._save_network_params = save_network_params
        self._cleaned = False
        self._said_layout = False
        self._verified: dict[Path, tuple[tuple[int, int], Version]] = {}
        self._whole: set[Path] = set()  # checkpoints of several ranks whose files have all been verified

    @property
    def folders(self) -> tuple[Path, Path, Path]:
        """Every folder that saving may write into, and delete from."""
        return self.folder, self._network_folder, self._trainable_folder

    # ---- saving

    def begin(self) -> int:
        """Let a new run have a best of its own; returns how many checkpoints of an earlier run lie in its way."""
        with environment_faults(self._best_pointer):
            self._best_pointer.unlink(missing_ok=True)
        return len(self._files())

    def save(
        self,
        epoch: int,
        step: int,
        tensors: Mapping[str, np.ndarray],
        state: dict | None = None,
        metric: float | None = None,
        trainable: Container[str] | None = None,
    ) -> Path:
        """Save one checkpoint and return its path (rank 0's); when this returns, it is on the disk, of every rank.

        tensors: weights under the model's names and optimizer state as `slot.parameter` (adam_m.model...), of a rank
        its share of them.
        state: anything JSON holds (loss scale, data cursor, counters); `read` gives it back.
        trainable: names of the weights to be written alone into checkpoint_trainable/ as well.
        Raises EnvironmentFault (disk full, no permission), on all ranks; the earlier checkpoints are then as they were,
        and nothing new stays. Also, at the first save, where rank 0 does not see the other ranks' files; these stay.
        """
        if not self._cleaned:
            self.clean()
        name = f"{self._stem}-{epoch}_{step}{self._suffix}"
        if metric is not None and not math.isfinite(metric):
            metric = None
        path = self.folder / name
        agreed = self._agree(path, metric)
        version = Version("", 0, epoch, step, agreed.serial, agreed.time, metric, state or {})
        weights = without_state(tensors)
        is_first = self._ranks > 1 and not self._said_layout
        new: list[Path] = []

        def write_one(file: Path, some: Mapping[str, np.ndarray]) -> None:
            is_new = not file.exists()
            self._write(file, some, version, agreed.save)
            if is_new:
                new.append(file)

        def write() -> None:
            if self._save_network_params:
                write_one(self._network_folder / name, {key: tensors[key] for key in weights})
            if trainable is not None:
                write_one(self._trainable_folder / name, {key: tensors[key] for key in weights if key in trainable})
            write_one(path, tensors)
            if is_first:
                self.share.save_strategy(self._output_dir, {key: array.shape for key, array in tensors.items()})

        def take_back() -> None:
            for file in new:
                with suppress(OSError):
                    _remove(file)

        self._on_all_ranks(write, take_back)
        if is_first:
            self._on_all_ranks(lambda: self._require_in_sight(path))
            self._said_layout = True
        write_json(self.folder / "meta.json", {"last_epoch": epoch, "last_step": step, "last_ckpt_file": name})
        if agreed.is_best:
            write_json(self._best_pointer, {"file": name, "metric": self._keep_best, "value": metric})
        self._prune(agreed.keep)
        if self._meet is None:
            return path
        first = self.first_folder / self._of_rank(self._shared_name(path), 0)
        self._whole.add(first)
        return first

    def _agree(self, path: Path, metric: float | None) -> _Agreed:
        """What holds for a save into `path` on all ranks: rank 0's view."""
        others = {known: version for known, version in self._versions().items() if known != path}
        serial, now = 1 + max((version.serial for version in self._versions().values()), default=0), time.time()
        is_best = self._keep_best is not None and metric is not None and self._is_best(metric)
        newest_first = [(path, now)]
        newest_first += [(known, v.saved_at) for known, v in sorted(others.items(), key=lambda item: -item[1].serial)]
        keep = self._to_keep(newest_first, None if is_best else self.best())
        agreed = _Agreed(serial, now, secrets.token_hex(8), is_best, keep)
        return agreed if self._meet is None else _Agreed(**json.loads(self._meet(json.dumps(asdict(agreed)))[0]))

    def _on_all_ranks(self, work: Callable[[], None], take_back: Callable[[], None] = lambda: None) -> None:
        """Returns when every rank has done its work. Where one could not, all take theirs back and raise
        EnvironmentFault; not where one has died, which may have been behind its work."""
        fault = None
        try:
            work()
        except EnvironmentFault as error:
            fault = error
        problem = "" if fault is None else str(fault)
        problems = [problem] if self._meet is None else self._meet(problem)
        if any(problems):
            take_back()
        if fault is not None:
            raise fault
        for rank, problem in enumerate(problems):
            if problem:
                raise EnvironmentFault(f"rank {rank} could not save: {problem}")

    def _require_in_sight(self, path: Path) -> None:
        """EnvironmentFault on rank 0 if it does not see what the others have saved beside `path`."""
        end = time.monotonic() + _SEEN_SECONDS
        while self._rank == 0:
            try:
                paths_of_save(path)
                return
            except UserError as error:
                if time.monotonic() > end:
                    raise EnvironmentFault(
                        f"{error}. output_dir has to be a folder that all ranks see: put it on a disk that the "
                        "machines share"
                    ) from error
            time.sleep(0.1)

    def _write(self, path: Path, tensors: Mapping[str, np.ndarray], version: Version, save: str) -> None:
        heads = {key: head_of(array) for key, array in tensors.items()}
        if self._ranks > 1:
            shards = self.share.shards(self._shared_name(path), save, heads)
            version = replace(version, state={**version.state, SHARDS: shards})
        metadata = {"format": "ms"}
        needed = file_size(self._suffix, heads, metadata) + _ROOM_FOR_JSON
        with StagedFile(path, needed) as staged:
            write_tensors(staged, heads, tensors.__getitem__, metadata)
            commit_with_manifest(staged, replace(version, sha256=staged.sha256, size=staged.size))

    def _shared_name(self, path: Path) -> str:
        """The name that all ranks' files of a save have in common, with {rank} for the number."""
        return f"{self._prefix}_rank_{{rank}}{path.name.removeprefix(self._stem)}"

    def _of_rank(self, shared_name: str, rank: int) -> str:
        return f"{self._prefix}_rank_{rank}{shared_name.removeprefix(self._prefix + '_rank_{rank}')}"

    @property
    def first_folder(self) -> Path:
        """Rank 0's, which lists the checkpoints of all ranks; without others this one's own."""
        return self.folder if self._meet is None else self.folder.with_name("rank_0")

    @property
    def _best_pointer(self) -> Path:
        return self.folder / f"{self._stem}-best.json"

    def _is_best(self, metric: float) -> bool:
        best = _read_json(self._best_pointer)
        value = best.get("value")
        if self.best() is None or best.get("metric") != self._keep_best or not isinstance(value, int | float):
            return True
        return metric < value

    def clean(self) -> None:
        """Remove what a killed run left: temporary files, and manifests whose file is gone or never came."""
        for folder in self.folders:
            if folder.is_dir():
                remove_stale(folder)
                for manifest in folder.glob(f"*{MANIFEST_SUFFIX}"):
                    if not manifest.with_name(manifest.name.removesuffix(MANIFEST_SUFFIX)).exists():
                        manifest.unlink(missing_ok=True)
        self._cleaned = True

    def _to_keep(self, newest_first: list[tuple[Path, float]], best: Path | None) -> list[str] | None:
        """Of checkpoints with the times of their saves, the names (with {rank}) of those that stay; None: all."""
        if self._keep_max <= 0:
            return None
        keep = {best, *(path for path, _ in newest_first[: self._keep_max])} - {None}
        if self._keep_per_minutes > 0:
            window = 60 * self._keep_per_minutes
            keep.update({saved_at // window: path for path, saved_at in newest_first}.values())
        return [self._shared_name(path) for path in keep]

    def _prune(self, keep: Collection[str] | None) -> None:
        """Delete this rank's other checkpoints, and rank 0 those of ranks that there are no more. Files that no run of
        ours has saved stay."""
        if keep is None:
            return
        gone = [self._rank]
        if self._rank == 0:
            others = (path.name.removeprefix("rank_") for path in self.folder.parent.glob("rank_*"))
            gone += [int(number) for number in others if number.isdigit() and int(number) >= self._ranks]
        for rank in gone:
            kept = {self._of_rank(name, rank) for name in keep}
            for path in self._files(rank):
                if path.name not in kept:
                    for folder in self.folders:
                        _remove(folder.with_name(f"rank_{rank}") / path.name)
            if rank != self._rank:
                for folder in self.folders:
                    _remove_emptied(folder.with_name(f"rank_{rank}"))

    # ---- finding and reading

    def best(self) -> Path | None:
        """The checkpoint with the lowest metric, None before there is one."""
        name = _read_json(self._best_pointer).get("file")
        path = self.folder / str(name)
        return path if name and path.exists() else None

    def _files(self, rank: int | None = None) -> list[Path]:
        """Of this rank, or of another."""
        rank = self._rank if rank is None else rank
        folder = self.folder.with_name(f"rank_{rank}")
        pattern = re.compile(re.escape(f"{self._prefix}_rank_{rank}") + r"-\d+_\d+\.(safetensors|ckpt)")
        return [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.is_dir() else []

    def _versions(self) -> dict[Path, Version]:
        """This run's checkpoints with the newest entry of their manifests."""
        found = {path: read_manifest(path) for path in self._files()}
        return {path: versions[0] for path, versions in found.items() if versions}

    def latest(self) -> Path | None:
        """The last whole checkpoint (its hashes are verified), None when there is none at all.

        Of several ranks, each verifies some of the files. A damaged one is passed over, with one line, for the one
        saved before it. UserError when all are damaged.
        """
        problems = []
        for path in self._newest_first():
            problem = self._problem(path)
            if problem:
                problems.append(problem)
                continue
            if problems and self._rank == 0:
                _warn(f"{problems[0]}; going on from the one before it, {path.name}")
            return path
        if problems:
            raise UserError(f"{self.first_folder}: no whole checkpoint: {problems[0]}")
        return None

    def _problem(self, path: Path) -> str:
        """What is wrong with a checkpoint on some rank; empty: it is whole."""
        problem, files = "", []
        try:
            files = paths_of_save(path)
            for file in files[self._rank :: self._ranks]:
                self._verify(file)
        except UserError as error:
            problem = str(error)
        problems = [problem] if self._meet is None else self._meet(problem)
        found = next(filter(None, problems), "")
        if not found and len(files) > 1:
            self._whole.add(path)
        return found

    def _newest_first(self) -> list[Path]:
        """meta.json's file, then the others from the newest save back; of several ranks as rank 0 sees them."""
        serials = {path: version.serial for path, version in self._versions().items()}
        ordered = sorted(self._files(), key=lambda path: (-serials.get(path, 0), path.name))
        last = self.folder / str(_read_json(self.folder / "meta.json").get("last_ckpt_file"))
        ordered = sorted(ordered, key=lambda path: path != last)
        if self._meet is None:
            return ordered
        names = self._meet(json.dumps([path.name for path in ordered]))[0]
        return [self.first_folder / name for name in json.loads(names)]

    def read(self, path: str | Path) -> tuple[dict[str, np.ndarray], dict, int, int]:
        """(tensors, state, epoch, step) of the checkpoint `path`; of a run of several ranks this one's share of them.

        path: of several ranks' checkpoint the file of any of them; the layout that saved it may be another.
        Tensors have the element type of the save, bfloat16 ones as float32. A checkpoint without a manifest
        (MindFormers' own) has an empty state, and epoch and step by its name. UserError when it is damaged.
        """
        path = Path(path)
        if path not in self._whole:
            for file in paths_of_save(path):
                self._verify(file)
        version = self._version(path)
        file = open_ranks(path)
        try:
            if version is None:
                file.verify()
            tensors = self._own(file)
        finally:
            file.close()
        if version is None:
            match = re.fullmatch(r".*-(\d+)_(\d+)", path.stem)
            version = Version("", 0, *(map(int, match.groups()) if match else (0, 0)))
        return tensors, version.state, version.epoch, version.step

    def _own(self, file: TensorFile) -> dict[str, np.ndarray]:
        """All tensors of a file (or of all ranks' files), of a run of several ranks this one's share of them."""
        if self.share is None:
            return {name: file.read(name) for name in file.heads}
        boxes = {name: self.share.box(name, head.shape) for name, head in file.heads.items()}
        return {name: read_part(file, name, box) for name, box in boxes.items() if box is not None}

    def read_state(self, path: str | Path) -> dict:
        """The state alone of the checkpoint `path`; empty for a file that no run has saved. UserError as for `read`."""
        version = self._version(Path(path))
        return {} if version is None else version.state

    def _version(self, path: Path) -> Version | None:
        """The manifest's entry that `path` matches; None without a manifest."""
        if path in self._whole:
            return read_manifest(path)[0]
        return self._verify(path)

    def _verify(self, path: Path) -> Version | None:
        """The manifest's entry that `path` matches, its hash computed once per content; None without a manifest."""
        stamp = _stamp(path) if path.exists() else None
        if stamp and path in self._verified and self._verified[path][0] == stamp:
            return self._verified[path][1]
        version = verified_version(path)
        if version is None:
            open_tensor_file(path).close()
        else:
            self._verified[path] = (_stamp(path), version)
        return version


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _remove(file: Path) -> None:
    """Delete a file that a store has saved; without a manifest it is somebody else's."""
    if manifest_path(file).exists():
        file.unlink(missing_ok=True)
        manifest_path(file).unlink(missing_ok=True)


def _remove_emptied(folder: Path) -> None:
    """Remove a folder that holds no checkpoint any more, with the pointers to those that it held."""
    remove_stale(folder)
    for pointer in folder.glob("*.json"):
        content = _read_json(pointer)
        name = content.get("last_ckpt_file") or content.get("file")
        if name and not (folder / str(name)).exists():
            pointer.unlink()
    with suppress(OSError):  # somebody else's files
        folder.rmdir()


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _warn(line: str) -> None:
    from llm_core.report.console import console

    console.warn(line)
