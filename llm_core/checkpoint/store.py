"""The checkpoints of one run: saved so that the process may be killed at any moment, listed, pruned, read back.

MindFormers' layout::

    {output_dir}/checkpoint/rank_{r}/{prefix}_rank_{r}-{epoch}_{step}.safetensors   weights and optimizer state
                                     ... .safetensors.manifest.json                 hash, size, run state
                                     {prefix}_rank_{r}-best.json                    the best by a metric
                                     meta.json                                      the last one
    {output_dir}/checkpoint_network/rank_{r}/                                       weights alone, on request
    {output_dir}/checkpoint_trainable/rank_{r}/                                     trainable weights, on request
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llm_core.checkpoint.dtypes import head_of
from llm_core.checkpoint.files import file_size, open_tensor_file, write_tensors
from llm_core.checkpoint.manifest import (
    MANIFEST_SUFFIX,
    Version,
    commit_with_manifest,
    manifest_path,
    read_manifest,
    verified_version,
)
from llm_core.checkpoint.staged import StagedFile, environment_faults, remove_stale, write_json
from llm_core.checkpoint.state_names import without_state
from llm_core.errors import UserError

_ROOM_FOR_JSON = 1 << 16


class CheckpointStore:
    """Saves and reads the checkpoints of `output_dir` for one rank.

    Only the run that holds `lock_output_dir(output_dir)` may save. The `keep_max` newest checkpoints are kept (0: all),
    and with `keep_per_minutes=n` the first of every n minutes besides. The best (`keep_best`: the name of the metric
    given to `save`, lower is better) and the last are never deleted.
    """

    def __init__(
        self,
        output_dir: str | Path,
        prefix: str,
        rank: int = 0,
        *,
        keep_max: int = 5,
        file_format: str = "safetensors",
        keep_best: str | None = None,
        save_network_params: bool = False,
        keep_per_minutes: float = 0,
    ):
        if file_format not in ("safetensors", "ckpt"):
            raise UserError(f"checkpoint_format: {file_format!r} is not known; use safetensors or ckpt")
        self.folder = Path(output_dir) / "checkpoint" / f"rank_{rank}"
        self._network_folder = Path(output_dir) / "checkpoint_network" / f"rank_{rank}"
        self._trainable_folder = Path(output_dir) / "checkpoint_trainable" / f"rank_{rank}"
        self._stem = f"{prefix}_rank_{rank}"
        self._suffix = f".{file_format}"
        self._keep_max = keep_max
        self._keep_best = keep_best
        self._keep_per_minutes = keep_per_minutes
        self._save_network_params = save_network_params
        self._cleaned = False
        self._verified: dict[Path, tuple[tuple[int, int], Version]] = {}

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
        """Save one checkpoint and return its path; when this returns, it is on the disk.

        tensors: weights under the model's names and optimizer state as `slot.parameter` (adam_m.model...).
        state: anything JSON holds (loss scale, data cursor, counters); `read` gives it back.
        trainable: names of the weights to be written alone into checkpoint_trainable/ as well.
        Raises EnvironmentFault (disk full, no permission); the earlier checkpoints are then as they were.
        """
        if not self._cleaned:
            self.clean()
        name = f"{self._stem}-{epoch}_{step}{self._suffix}"
        serial = 1 + max((version.serial for version in self._versions().values()), default=0)
        if metric is not None and not math.isfinite(metric):
            metric = None
        version = Version("", 0, epoch, step, serial, time.time(), metric, state or {})
        weights = without_state(tensors)
        if self._save_network_params:
            self._write(self._network_folder / name, {key: tensors[key] for key in weights}, version)
        if trainable is not None:
            some = {key: tensors[key] for key in weights if key in trainable}
            self._write(self._trainable_folder / name, some, version)
        path = self.folder / name
        self._write(path, tensors, version)
        write_json(self.folder / "meta.json", {"last_epoch": epoch, "last_step": step, "last_ckpt_file": name})
        if self._keep_best is not None and metric is not None and self._is_best(metric):
            write_json(self._best_pointer, {"file": name, "metric": self._keep_best, "value": metric})
        self._prune(path)
        return path

    def _write(self, path: Path, tensors: Mapping[str, np.ndarray], version: Version) -> None:
        heads = {key: head_of(array) for key, array in tensors.items()}
        metadata = {"format": "ms"}
        needed = file_size(self._suffix, heads, metadata) + _ROOM_FOR_JSON
        with StagedFile(path, needed) as staged:
            write_tensors(staged, heads, tensors.__getitem__, metadata)
            commit_with_manifest(staged, replace(version, sha256=staged.sha256, size=staged.size))

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

    def _prune(self, last: Path) -> None:
        if self._keep_max <= 0:
            return
        newest_first = sorted(self._versions().items(), key=lambda item: -item[1].serial)
        keep = {last, self.best(), *(path for path, _ in newest_first[: self._keep_max])}
        if self._keep_per_minutes > 0:
            window = 60 * self._keep_per_minutes
            keep.update({version.saved_at // window: path for path, version in newest_first}.values())
        for path, _ in newest_first:
            if path not in keep:
                for folder in self.folders:
                    (folder / path.name).unlink(missing_ok=True)
                    manifest_path(folder / path.name).unlink(missing_ok=True)

    # ---- finding and reading

    def best(self) -> Path | None:
        """The checkpoint with the lowest metric, None before there is one."""
        name = _read_json(self._best_pointer).get("file")
        path = self.folder / str(name)
        return path if name and path.exists() else None

    def _files(self) -> list[Path]:
        pattern = re.compile(re.escape(self._stem) + r"-\d+_\d+\.(safetensors|ckpt)")
        return [path for path in self.folder.iterdir() if pattern.fullmatch(path.name)] if self.folder.is_dir() else []

    def _versions(self) -> dict[Path, Version]:
        """This run's checkpoints with the newest entry of their manifests."""
        found = {path: read_manifest(path) for path in self._files()}
        return {path: versions[0] for path, versions in found.items() if versions}

    def latest(self) -> Path | None:
        """The last whole checkpoint (its hash is verified), None when there is none at all.

        A damaged one is passed over, with one line, for the one saved before it. UserError when all are damaged.
        """
        problems = []
        for path in self._newest_first():
            try:
                self._verify(path)
            except UserError as error:
                problems.append(str(error))
                continue
            if problems:
                _warn(f"{problems[0]}; going on from the one before it, {path.name}")
            return path
        if problems:
            raise UserError(f"{self.folder}: no whole checkpoint: {problems[0]}")
        return None

    def _newest_first(self) -> list[Path]:
        """meta.json's file, then the others from the newest save back."""
        serials = {path: version.serial for path, version in self._versions().items()}
        ordered = sorted(self._files(), key=lambda path: (-serials.get(path, 0), path.name))
        last = self.folder / str(_read_json(self.folder / "meta.json").get("last_ckpt_file"))
        return sorted(ordered, key=lambda path: path != last)

    def read(self, path: str | Path) -> tuple[dict[str, np.ndarray], dict, int, int]:
        """(tensors, state, epoch, step) of the checkpoint `path`.

        Tensors have the element type of the save, bfloat16 ones as float32. A checkpoint without a manifest
        (MindFormers' own) has an empty state, and epoch and step by its name. UserError when it is damaged.
        """
        path = Path(path)
        version = self._verify(path)
        file = open_tensor_file(path)
        try:
            if version is None:
                file.verify()
            tensors = {name: file.read(name) for name in file.heads}
        finally:
            file.close()
        if version is None:
            match = re.fullmatch(r".*-(\d+)_(\d+)", path.stem)
            version = Version("", 0, *(map(int, match.groups()) if match else (0, 0)))
        return tensors, version.state, version.epoch, version.step

    def read_state(self, path: str | Path) -> dict:
        """The state alone of the checkpoint `path`; empty for a file that no run has saved. UserError as for `read`."""
        version = self._verify(Path(path))
        return {} if version is None else version.state

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


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _warn(line: str) -> None:
    from llm_core.report.console import console

    console.warn(line)
