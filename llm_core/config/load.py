"""From a run file to a checked `RunConfig`: layers, an HF folder, command line overrides, the schema, the device.

Every problem of the merged result is found before anything is said, and all are reported in one UserError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_core.config import catalog, compat, keys, validate
from llm_core.config import hf_folder as hf
from llm_core.config.model_section import FalconConfig, InternLMConfig, LlamaConfig
from llm_core.config.overrides import RANK, Override, apply_overrides
from llm_core.config.render import as_yaml
from llm_core.config.schema import RunConfig
from llm_core.config.tree import Node, Origin, Problems, find, leaves, lift, merge
from llm_core.config.yaml_source import read_yaml
from llm_core.errors import UserError

_HF_RANK = RANK - 1  # over every file, under the command line


class Origins(dict[str, str]):
    """Where each value was written, by dotted path; "default" for a key that nobody wrote."""

    def __missing__(self, path: str) -> str:
        return "default"


@dataclass(frozen=True)
class LoadedConfig:
    """A checked run.

    `config` holds the values as this machine runs them (see `notes` for what was mapped), `tree` the merged values as
    they were written. `origins` tells where each was written, `notes` has one line for every mapping and one for all
    keys without meaning here (`inert`: key -> reason); the command line prints them once, before the run begins.
    `register_path` is set by the command line only.
    """

    config: RunConfig
    path: Path
    tree: Node
    origins: Origins
    notes: list[str]
    inert: dict[str, str]
    device: str
    register_path: str | None = field(default=None)

    def as_yaml(self, *, origins: bool = False, defaults: bool = False) -> str:
        """The merged run file, as written (unmapped): it loads to the same run, here and on another machine.

        `origins` adds where each value came from as a comment, `defaults` the keys that nobody set.
        """
        return as_yaml(self.tree, origins=origins, defaults=defaults)

    def require_runnable(self, *, prompts: bool = True, started: bool = True) -> None:
        """Raise one UserError for all that keeps this run from starting, without looking at data or weights.

        `prompts` False is for an interactive chat, which asks for them; `started` False where this process is not one
        of the run's.
        """
        problems = Problems()
        validate.check_runnable(self.config, self.tree, str(self.path), problems, prompts, started)
        if problems:
            raise UserError(str(problems))


def load_config(
    path: str | Path,
    overrides: Sequence[tuple[Any, ...]] = (),
    hf_folder: Path | None = None,
    *,
    flags: Sequence[str] = (),
    register_path: str | None = None,
) -> LoadedConfig:
    """Load a run file (a path, or the name of a packaged run) and check it whole.

    overrides: (key, value) or (key, value, flag as typed); text values are read as the key's type wants them.
    hf_folder: a Hugging Face folder whose config.json is laid over the files; by default `load_checkpoint`
        if that is one.
    flags: the command line's flags, to suggest one for a misspelt flag.

    Raises UserError with every problem, a line each: `file:line: key: what is wrong; did you mean ...?`
    """
    problems = Problems()
    file = catalog.resolve(str(path))
    given = [Override(*each) for each in overrides]
    tree = compat.settle_names(_read_layers(file, problems), problems)
    changed, notes = apply_overrides(tree, given, flags, problems), []
    folder = hf_folder or _hf_checkpoint(changed)
    if folder is not None:
        tree, notes = _lay_hf_folder(tree, changed, folder)
        changed = apply_overrides(tree, given, flags, problems)
    changed = compat.settle_names(changed, problems)
    _refuse_gguf(changed, problems)
    pruned, inert = keys.prune(RunConfig, changed, problems)
    config = validate.validate(pruned, problems)
    if config is None or problems:
        raise UserError(str(problems))
    device = compat.present_device() if config.context.device_target != "CPU" else "CPU"
    notes += compat.check_speed_up_file(config, pruned, device, problems)
    if problems:
        raise UserError(str(problems))
    config, mapped = compat.map_to_device(config, pruned, device)
    notes += mapped
    if inert:
        notes.append(f"no meaning here: {', '.join(inert)} (`run-llm show-cfg` says why)")
    origins = Origins((where, node.origin.where) for where, node in leaves(pruned))
    return LoadedConfig(config, file, pruned, origins, notes, inert, device, register_path)


# ---- layers ----


def _read_layers(file: Path, problems: Problems) -> Node:
    """The file laid over those of its `base_config`, in their order, and so on down."""
    counter = iter(range(1, RANK))

    def read(path: Path, chain: tuple[Path, ...], asked_by: str) -> Node:
        real = path.resolve()
        if real in chain:
            names = " -> ".join(os.path.relpath(each) for each in [*chain, real])
            raise UserError(f"{asked_by}: base_config: the files stand on each other: {names}")
        if asked_by and not path.is_file():
            raise UserError(f"{asked_by}: base_config: {path}: no such file")
        own = read_yaml(path, 0, problems)
        base = own.value.pop("base_config", None)
        merged: Node | None = None
        for name, where in _layer_names(base, problems):
            layer = read(Path(os.path.normpath(path.parent / name)), (*chain, real), where)
            merged = layer if merged is None else merge(merged, layer)
        _set_rank(own, next(counter))  # after its layers: a later layer has a higher rank
        return own if merged is None else merge(merged, own)

    return read(file, (), "")


def _layer_names(base: Node | None, problems: Problems) -> Iterable[tuple[str, str]]:
    if base is None or base.value is None:
        return
    for node in base.value if isinstance(base.value, list) else [base]:
        if isinstance(node.value, str):
            yield node.value, node.origin.where
        else:
            problems.add(node.origin.where, "base_config", "must be a file name, or a list of them")


def _set_rank(node: Node, rank: int) -> None:
    node.origin = Origin(node.origin.where, rank)
    children = (
        node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
    )
    for child in children:
        _set_rank(child, rank)


# ---- an HF folder as the checkpoint ----


def _hf_checkpoint(tree: Node) -> Path | None:
    node = find(tree, "load_checkpoint")
    if node is None or not isinstance(node.value, str) or not node.value:
        return None
    return Path(node.value) if hf.is_hf_folder(node.value) else None


def _refuse_gguf(tree: Node, problems: Problems) -> None:
    """A .gguf file says how its model computes, and only a folder made of it sets that: RoPE, eps, heads, scaling."""
    node = find(tree, "load_checkpoint")
    if node is not None and isinstance(node.value, str) and node.value.endswith(".gguf"):
        problems.add(
            node.origin.where, "load_checkpoint",
            f"{node.value}: a run would not compute what this file's own metadata say; convert it once, python "
            f"tools/convert_weight.py --model llama --input_path {node.value} --output_path FOLDER, and give FOLDER",
        )  # fmt: skip


def _lay_hf_folder(tree: Node, changed: Node, folder: Path) -> tuple[Node, list[str]]:
    """The tree with the folder's architecture and tokenizer laid over it; one note lists what that changed.

    `changed` is the tree with the command line's overrides: what they set stays, and is not listed.
    """
    source = folder / "config.json"
    asked = find(changed, "model.model_config.seq_length")
    seq_length = asked.value if asked is not None and asked.origin.rank == RANK else None
    config = hf.hf_config_to_model_config(hf.read_hf_config(folder), str(source), seq_length)
    layer: dict[str, Any] = {"model": {"arch": {"type": _arch(config, changed)}, "model_config": config}}
    tokenizer = hf.tokenizer_file(folder)
    if tokenizer is not None:
        layer["processor"] = {"tokenizer": {"vocab_file": str(tokenizer), **hf.tokenizer_policy(folder)}}
    laid = lift(layer, Origin(str(source), _HF_RANK))
    # A mapping of RoPE parameters replaces another one whole; merging would keep its foreign parameters.
    without = _without(tree, "model.model_config.scaling_factor")
    lines = []
    for path, node in leaves(laid):
        before, typed = find(tree, path), find(changed, path)
        if typed is not None and typed.origin.rank == RANK:
            continue
        value = before.value if before is not None else _default(path, config["type"])
        if value != node.value:
            lines.append(
                f"{path.removeprefix('model.model_config.')} {'unset' if value is None else value} -> {node.value}"
            )
    return merge(without, laid), [f"{source} sets {', '.join(lines)}"] if lines else []


def _arch(config: dict[str, Any], changed: Node) -> str:
    """The network of the folder's family, with the head that the run asks for."""
    asked = find(changed, "model.arch.type")
    head = str(asked.value).partition("For")[2] if asked is not None else ""
    return f"{config['type'].removesuffix('Config')}For{head or 'CausalLM'}"


def _default(path: str, kind: str) -> Any:
    """The default of a model_config key of this type; None elsewhere."""
    sections = {"LlamaConfig": LlamaConfig, "InternLMConfig": InternLMConfig, "FalconConfig": FalconConfig}
    info = keys.fields_of(sections[kind]).get(path.removeprefix("model.model_config."))
    return info.default if info is not None and not info.is_required() else None


def _without(tree: Node, path: str) -> Node:
    head, _, rest = path.partition(".")
    child = tree.get(head)
    if child is None:
        return tree
    entries = dict(tree.value)
    if rest:
        entries[head] = _without(child, rest)
    else:
        del entries[head]
    return Node(entries, tree.origin)
