"""What the adapter tools need to know of a model: from a run file, a Hugging Face folder, or the run's own record."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_core.config import hf_folder
from llm_core.errors import UserError
from llm_core.models.spec import DecoderSpec, spec_from_config

if TYPE_CHECKING:
    from llm_core.config import RunConfig

_CHECKPOINTS = ("checkpoint", "checkpoint_network", "checkpoint_trainable")  # in a run's output_dir


@dataclass(frozen=True)
class RunFacts:
    """A model's spec, and what a run file says besides (None and "" where there is only a config.json)."""

    source: Path
    spec: DecoderSpec
    config: RunConfig | None = None
    pet: Any = None
    load_checkpoint: str = ""
    adapter_id: str = ""


def run_facts(config: str | None, places: Iterable[str | None]) -> RunFacts:
    """The facts that `config` holds: a run file, a Hugging Face folder or its config.json.

    config None: the first of `places` (paths of checkpoints and adapters) that is a Hugging Face folder or belongs to a
    run of ours, whose folder keeps its configuration (of several runs there, the last one's). Raises UserError when
    there is none, and for a bad one.
    """
    if config is not None:
        return _read(Path(config))
    places = [place for place in places if place]
    for place in places:
        found = _record_of(Path(place).expanduser())
        if found is not None:
            return _read(found)
    raise UserError(
        f"--config: {' and '.join(places) or 'the adapter'} do not say what model this is; name its run file, or the "
        "Hugging Face folder of the base, with --config"
    )


def _record_of(place: Path) -> Path | None:
    """The Hugging Face folder that `place` is or lies in, or the configuration that the run keeps whose it is."""
    if not place.exists():  # the name of an adapter beside its base
        return None
    for folder in (place, place.parent) if place.is_file() else (place,):
        if hf_folder.is_hf_folder(folder):
            return folder
    path = place.absolute()
    for folder in (path, *(part.parent for part in (path, *path.parents) if part.name in _CHECKPOINTS)):
        records = {_number(record): record for record in (folder / "run").glob("config*.yaml")}
        records.pop(0, None)
        if records:
            return records[max(records)]
    return None


def _number(record: Path) -> int:
    """Which run's into its folder it is: config.yaml the first's, config-2.yaml the second's; 0 = none's."""
    match = re.fullmatch(r"config(?:-(\d+))?", record.stem)
    return 0 if match is None else int(match[1] or 1)


def _read(path: Path) -> RunFacts:
    if path.name == "config.json":
        path = path.parent
    if path.is_dir():
        source = str(path / "config.json")
        values = hf_folder.hf_config_to_model_config(hf_folder.read_hf_config(path), source, seq_length=1)
        return RunFacts(path, spec_from_config(_model_section(values)))
    from llm_core.config import load_config

    run = load_config(path, _own_length(path)).config
    pet = run.model.config.pet_config
    return RunFacts(path, spec_from_config(run.model), run, pet, run.load_checkpoint or "", run.adapter_id or "")


def _own_length(path: Path) -> list[tuple[str, int]]:
    """The run file's seq_length as the override that kept its run within the base's window; a record has it always."""
    from llm_core.config import catalog
    from llm_core.config.tree import Problems, find
    from llm_core.config.yaml_source import read_yaml

    key = "model.model_config.seq_length"
    node = find(read_yaml(catalog.resolve(str(path)), 0, Problems()), key)
    return [(key, node.value)] if node is not None and type(node.value) is int else []


def _model_section(values: dict[str, Any]) -> Any:
    """As the `model` section of a run file with these model_config keys."""
    from pydantic import TypeAdapter

    from llm_core.config.model_section import ModelSection

    arch = values["type"].removesuffix("Config") + "ForCausalLM"
    return TypeAdapter(ModelSection).validate_python({"arch": {"type": arch}, "model_config": values})
