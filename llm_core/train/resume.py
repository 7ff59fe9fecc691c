"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_core.checkpoint.locate import weight_files
from llm_core.checkpoint.store import CheckpointStore
from llm_core.config import RunConfig
from llm_core.errors import UserError
from llm_core.peft.adapters import Adapter, differing, pet_from_dict
from llm_core.report.console import console

if TYPE_CHECKING:
    from llm_core.parallel.comm import Comm


def store_of(config: RunConfig, output_dir: str | Path | None = None, comm: Comm | None = None) -> CheckpointStore:
    """The checkpoints of this run, or those that a run of these settings has left in another output_dir.

    comm: of a run of several ranks, which save and look for the latest together; what a rank holds of the tensors has
    to be told before it saves or reads some: `store.share = Share(layout, rank, cuts)`.
    """
    ranks = () if comm is None else (comm.rank, comm.layout.world, comm.gate)
    checkpoints = config.callback("CheckpointMonitor")
    folder = output_dir or (checkpoints is not None and checkpoints.directory) or config.output_dir
    prefix = (checkpoints.prefix if checkpoints is not None else None) or config.trainer.model_name or "CKP"
    if checkpoints is None:  # no regular saves asked for; a stop signal still saves
        return CheckpointStore(folder, prefix, *ranks)
    return CheckpointStore(
        folder,
        prefix,
        *ranks,
        keep_max=checkpoints.keep_checkpoint_max,
        file_format=checkpoints.checkpoint_format,
        keep_best=checkpoints.keep_best,
        save_network_params=checkpoints.save_network_params,
        keep_per_minutes=checkpoints.keep_checkpoint_per_n_minutes,
    )


@dataclass
class ResumePoint:
    """A checkpoint to go on from. state: what `loop.Run.state` describes. store: what reads it."""

    path: Path
    state: dict[str, Any]
    store: CheckpointStore

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """By name; of a run of several ranks this one's share of them, whatever layout has saved them: read when first
        asked for, once `store.share` is known."""
        return self.store.read(self.path)[0]


def resume_point(config: RunConfig, own: CheckpointStore, comm: Comm | None = None) -> ResumePoint | None:
    """The checkpoint to go on from, if any; `own` is the run's own store, `comm` as for `store_of`.

    resume_training True takes the newest whole checkpoint of output_dir, else of load_checkpoint if that is a run's
    folder or file; so the same command goes on after every kill. A string names the file. Nothing there yet is no
    error: the run was killed before its first save, and begins (from load_checkpoint, if that is base weights). The
    run whose weights are an adapter's base is no run to go on from.
    """
    if not config.resume_training:
        return None
    given = Path(config.load_checkpoint) if config.load_checkpoint else None
    others = [store_of(config, _run_folder(given), comm)] if given is not None and given.is_dir() else []
    if isinstance(config.resume_training, str):
        path = _named_checkpoint(Path(config.resume_training), [own, *others])
    else:
        path = own.latest() or next(filter(None, (source.latest() for source in others)), None)
        if path is None and given is not None and given.is_file() and "cursor" in own.read_state(given):
            path = given
        if path is not None and path.parent != own.first_folder and _is_base_of(config, own.read_state(path)):
            path = None
        if path is None:
            console.warn(f"resume_training: {own.first_folder} holds no checkpoint yet; starting from the beginning")
            return None
    state = own.read_state(path)
    if "cursor" not in state:
        raise UserError(f"{path}: weights without a run's state; give it as --load_checkpoint and do not resume")
    console.info(f"resuming from {path}, step {state['cursor']['step']}")
    return ResumePoint(path, state, own)


def _is_base_of(config: RunConfig, state: dict[str, Any]) -> bool:
    """Whether this run trains an adapter, and the checkpoint is of a run that did not."""
    return "adapter" not in state and bool(config.model.config.pet_config or config.adapter_id)


def _named_checkpoint(name: Path, sources: Sequence[CheckpointStore]) -> Path:
    candidates = [name, *(source.first_folder / name.name for source in sources)]
    for path in candidates:
        if path.is_file():
            return path
    folders = ", ".join(str(source.first_folder) for source in sources)
    raise UserError(f"--resume_training {name}: no such file, nor one of that name in {folders}")


def _run_folder(folder: Path) -> Path:
    """The output_dir that a load_checkpoint folder belongs to: itself, or the one above checkpoint/rank_0."""
    if folder.name.startswith("rank_"):
        folder = folder.parent
    return folder.parent if folder.name == "checkpoint" else folder


def require_same_run(saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """UserError unless this run would have come to the checkpoint by itself."""
    if "batch_size" in saved:  # of a checkpoint from before there were several ranks
        saved = {"records_per_step": saved["batch_size"] * saved["gradient_accumulation_steps"], **saved}
    changes = [f"{name} was {saved[name]}, is {now}" for name, now in settings.items() if saved.get(name, now) != now]
    if changes:
        raise UserError(
            f"resume_training: this is another run than the one that was saved: {'; '.join(changes)}. Resume with the "
            "old values, or start a new run from these weights with --load_checkpoint. (records_per_step is batch_size "
            "x data_parallel x gradient_accumulation_steps, in a pipeline x micro_batch_num; with drop_remainder True "
            "the number of steps can depend on how it is made up)"
        )


def require_same_tensors(parameters: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """UserError unless the sets of names and all shapes are the same."""
    missing, unexpected = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    wrong = [name for name in parameters.keys() & tensors.keys() if parameters[name].shape != tensors[name].shape]
    if missing or unexpected or wrong:
        raise UserError(
            f"resume_training: the checkpoint is of another model or optimizer: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )


# ---- runs that train an adapter


def pet_of_run(config: RunConfig, resumed: ResumePoint | None, adapter: Adapter | None) -> Any:
    """The pet_config that a run trains with; None: it trains all weights.

    The run file's, else that of the checkpoint to go on from, or of the adapter to start from. Raises UserError when
    the checkpoint is of a run of the other kind, and when its base is not named.
    """
    wanted = config.model.config.pet_config
    if resumed is None:
        return wanted if adapter is None else adapter.pet
    saved = resumed.state.get("adapter")
    if saved is None:
        if wanted is not None:
            raise UserError(
                f"resume_training: {resumed.path} is of a run that trained all weights, and pet_config asks for an "
                "adapter: choose another --output_dir and give those weights as --load_checkpoint, or remove pet_config"
            )
        return None
    if saved["base"] and not config.load_checkpoint:
        raise UserError(
            f"resume_training: {resumed.path} holds an adapter alone; name its base: --load_checkpoint {saved['base']}"
        )
    return wanted or pet_from_dict(saved["pet_config"])


def require_base_elsewhere(config: RunConfig, store: CheckpointStore) -> None:
    """UserError where a new run's checkpoints would take the place of the base that its adapter needs."""
    if not config.load_checkpoint:
        return
    folders = [folder.resolve() for folder in store.folders]
    for file in weight_files(config.load_checkpoint):
        if file.resolve().parent in folders:
            raise UserError(
                f"output_dir: {config.output_dir}: {file}, the base that load_checkpoint names, lies where this run "
                "saves the adapter's checkpoints, which would replace it: give another --output_dir"
            )


def require_same_base(resumed: ResumePoint, adapter: dict[str, Any]) -> None:
    """UserError unless the adapter's checkpoint was trained on the base that has been loaded."""
    saved = resumed.state["adapter"]
    if differing(saved["base_fingerprint"], adapter["base_fingerprint"]):
        raise UserError(
            f"resume_training: {resumed.path}: this adapter was trained on {saved['base'] or 'a base never saved'}, "
            f"other weights than those of load_checkpoint, {adapter['base'] or 'which is not set'}"
        )
