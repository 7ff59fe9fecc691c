"""The verb `plan`: parameters, memory, traffic and time of a training run, from its run file alone.

Nothing is allocated and MindSpore is not imported, so 70B on a thousand ranks is planned as quickly as a small model on
one. Every figure is an estimate, and the text says so; docs/plan.md has the arithmetic and what it was measured
against.
"""

from __future__ import annotations

from llm_core.config import LoadedConfig
from llm_core.errors import UserError
from llm_core.models.spec import spec_from_config
from llm_core.parallel.layout import Layout, layout_from_config
from llm_core.peft.apply import describe_parameters
from llm_core.plan import text
from llm_core.plan.job import job_of, steps_of
from llm_core.plan.parameters import count_parts
from llm_core.plan.search import Estimate, Planner

__all__ = ["count_parts", "estimate", "plan"]


def plan(loaded: LoadedConfig, devices: int | None = None, device: str | None = None) -> str:
    """What `run-llm plan` prints.

    devices: look for layouts on so many of them, beside the run file's own. device: the name of one, see `devices`.
    UserError for a device that nobody knows, a number of devices that the model cannot be shared out to, and a batch
    that does not go with the layout.
    """
    model = loaded.config.model
    spec, pet = spec_from_config(model), model.config.pet_config
    lines = text.parameter_lines(count_parts(spec, pet), f"{model.arch.type}: {describe_parameters(spec, pet)}")
    if loaded.config.run_mode not in ("train", "finetune"):
        return "\n".join([*lines, "", "memory and time are estimated for run_mode train and finetune"]) + "\n"
    planner, layout = _planner(loaded, device)
    if devices is None:
        found, shown = [], planner.estimate(layout)
    else:
        _require_positive(devices)
        found = planner.layouts(devices, layout)
        shown = planner.estimate(layout) if layout.world == devices else _whole(planner, found[0])
        if layout.world != devices:
            lines += ["", f"the run file's own layout has {_ranks(layout.world)}; below is the best of {devices}"]
    lines += ["", *text.estimate_lines(shown, steps_of(loaded, shown.job, shown.layout))]
    if not shown.fits:
        lines += ["", *text.change_lines(shown, planner.changes(shown))]
    if devices is not None:
        lines += ["", *text.layout_lines(devices, found)]
    return "\n".join(lines) + "\n"


def estimate(loaded: LoadedConfig, device: str | None = None) -> Estimate:
    """The estimate of a run file's own layout, every pipeline stage of it."""
    planner, layout = _planner(loaded, device)
    return planner.estimate(layout)


def _planner(loaded: LoadedConfig, device: str | None) -> tuple[Planner, Layout]:
    layout = layout_from_config(loaded.config)
    return Planner(job_of(loaded, device, layout.dp, layout.micro_batches)), layout


def _whole(planner: Planner, found: Estimate) -> Estimate:
    """With every pipeline stage."""
    return planner.estimate(found.layout, found.job.rows)


def _require_positive(devices: int) -> None:
    if devices < 1:
        raise UserError(f"--devices {devices}: give a number of devices, 1 or more")


def _ranks(count: int) -> str:
    return "one rank" if count == 1 else f"{count} ranks"
