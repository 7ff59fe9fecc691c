"""What is planned: the facts of a run file that memory, traffic and time follow from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_core.config import LoadedConfig
from llm_core.config.tree import find
from llm_core.data.manifest import SUFFIX, read_manifest
from llm_core.errors import UserError
from llm_core.models.spec import DecoderSpec, spec_from_config
from llm_core.parallel.layout import Layout
from llm_core.plan.devices import GIB, Device, device_named, device_of_target


@dataclass(frozen=True)
class Job:
    """A training step, whatever its layout.

    rows: of a micro-batch on one rank. length: tokens of a row. records: rows that one update takes, over all ranks and
    micro-batches. pet: the pet_config, or None. optimizer: its section, or None. narrow: products of 16-bit numbers.
    recompute: layers of each stage whose activations are computed again, True = all. selective: only what is large and
    cheap there. room: bytes that the run may use of a device.
    """

    title: str
    spec: DecoderSpec
    pet: Any
    optimizer: Any
    device: Device
    rows: int
    length: int
    records: int
    narrow: bool
    recompute: bool | tuple[int, ...]
    selective: bool
    room: float

    @property
    def tokens(self) -> int:
        """Tokens of one update."""
        return self.records * self.length

    def recomputed(self, stage: int, layers: int) -> int:
        """How many of the layers of a pipeline stage are computed again in the backward pass."""
        if isinstance(self.recompute, bool):
            return layers if self.recompute else 0
        return min(self.recompute[stage] if stage < len(self.recompute) else 0, layers)


def job_of(loaded: LoadedConfig, device: str | None, replicas: int, micro_batches: int) -> Job:
    """The job of a run file on the device of that name (None: as context.device_target says).

    replicas, micro_batches: of the run file's layout, with which its batch_size says how many records an update takes.
    """
    config, model = loaded.config, loaded.config.model
    target = _written(loaded, "context.device_target", config.context.device_target)
    chosen = device_named(device) if device else device_of_target(target)
    dtype = _written(loaded, "model.model_config.compute_dtype", model.config.compute_dtype)
    if chosen.is_cpu:  # where only some can multiply 16-bit numbers; the loaded run knows
        dtype = model.config.compute_dtype
    runner = config.runner_config
    asked = config.recompute_config
    return Job(
        title=config.trainer.model_name or model.arch.type,
        spec=spec_from_config(model),
        pet=model.config.pet_config,
        optimizer=config.optimizer,
        device=chosen,
        rows=runner.batch_size,
        length=model.config.seq_length,
        records=runner.batch_size * replicas * micro_batches * runner.gradient_accumulation_steps,
        narrow=dtype in ("float16", "bfloat16"),
        recompute=tuple(asked.recompute) if isinstance(asked.recompute, list) else asked.recompute,
        selective=bool(asked.select_recompute),
        room=_room(chosen, _written(loaded, "context.max_device_memory", None)),
    )


def _written(loaded: LoadedConfig, path: str, default: Any) -> Any:
    """A value as the file has it, before it was mapped to what this machine can do."""
    node = find(loaded.tree, path)
    return default if node is None or node.value is None else node.value


def _room(device: Device, limit: str | None) -> float:
    """What a run may use of a device's memory: its own limit on Ascend, elsewhere all but a sixteenth."""
    if limit and device.name.startswith("910"):
        return min(float(limit.removesuffix("GB")) * GIB, device.memory)
    return device.memory * 15 / 16


def records_of(loaded: LoadedConfig) -> int | None:
    """How many records an epoch reads, as the manifests beside them say; None where the data or these are not there."""
    dataset = loaded.config.train_dataset
    path = dataset.data_loader.dataset_dir if dataset is not None else ""
    if not path:
        return None
    place = Path(path)
    found = sorted(place.rglob(f"*{SUFFIX}")) if place.is_dir() else [_manifest_beside(place)]
    counts = [read_manifest(each).get("records") for each in found]
    if not counts or not all(isinstance(count, int) for count in counts):
        return None
    limit = dataset.data_loader.num_samples
    return min(sum(counts), limit) if limit else sum(counts)


def _manifest_beside(file: Path) -> Path:
    """The manifest of a data file, or of the shards that it is one of."""
    own = file.with_name(file.name + SUFFIX)
    return own if own.exists() else file.with_name(re.sub(r"\d+$", "", file.name) + SUFFIX)


def steps_of(loaded: LoadedConfig, job: Job, layout: Layout) -> int | None:
    """Updates of the whole run, counted as the loader and the run do: an epoch's last update may have fewer batches.

    None where nobody knows how many records there are. UserError: fewer than a batch.
    """
    records = records_of(loaded)
    if records is None:
        return None
    config = loaded.config
    batch = job.rows * layout.dp
    batches, rest = divmod(records, batch)
    if rest and not config.train_dataset.drop_remainder:
        batches += 1
    if batches == 0:
        raise UserError(
            f"{config.train_dataset.data_loader.dataset_dir}: {records} records do not fill one batch of {batch}; "
            "make batch_size or data_parallel smaller, or set drop_remainder False"
        )
    window = job.records // batch
    total = -(-batches // window) * config.runner_config.epochs
    return min(total, config.runner_config.stop_step or total)
