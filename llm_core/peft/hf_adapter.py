"""LoRA folders of Hugging Face's PEFT (adapter_config.json, adapter_model.safetensors), read and written without it.

Both sides mean the same by A [rank, in], B [out, rank], scaling and DoRA's magnitude, so values pass unchanged wherever
both have the same linear layers. Where one side has query, key and value (or gate and up) in one layer and the other
has not, see `peft.fused`; what the settings mean, `peft.hf_adapter_config`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.checkpoint.dtypes import head_of
from llm_core.checkpoint.files import WRITABLE, TensorFile, file_size, open_tensor_file, write_tensors
from llm_core.checkpoint.hf import from_hf, parts_of_fused, to_hf
from llm_core.checkpoint.hf_fused import QkvLayout
from llm_core.checkpoint.manifest import Version, commit_with_manifest
from llm_core.checkpoint.qkv import joined_of, parts_of
from llm_core.checkpoint.staged import NewFolder, StagedFile, write_json
from llm_core.config.model_section import LoraConfig
from llm_core.errors import UserError
from llm_core.models.spec import HEAD_NAMES, DecoderSpec
from llm_core.peft.adapters import adapter_state
from llm_core.peft.fused import Update, join, parts_table, split
from llm_core.peft.hf_adapter_config import CONFIG_FILE, read_adapter_config, refuse_foreign, scaling_of, written_config
from llm_core.peft.lora import LORA_A, LORA_B, MAGNITUDE, linears, scaling

_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)")
_PARTS = "run_llm.parts"  # metadata of the weight file: which columns of a fused layer's update belong to which part


def is_hf_adapter(path: str | Path) -> bool:
    """Whether `path` is a folder that PEFT has saved an adapter into."""
    return (Path(path) / CONFIG_FILE).is_file()


# ---- reading


def read_adapter(folder: str | Path, spec: DecoderSpec) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """A PEFT folder's LoRA for the model of `spec`: its pet_config, and float32 arrays under our names.

    Ranks and scalings that differ (rank_pattern, alpha_pattern) become one: smaller factors get rows of zeros, which
    stay zero in training, and B takes up the ratio of the scalings. A classifier's `score` comes along.
    Raises UserError, naming file and key or tensor, for what is not computed here and for another model's adapter.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    refuse_foreign(config, folder, spec)
    file = _open_weights(folder)
    try:
        updates, whole = _read_tensors(file, config, spec)
        _check_shapes(updates, spec, file.path, config)
    finally:
        file.close()
    updates = _as_the_model_has_them(updates, spec)
    pet, updates = _unified(updates, config, spec)
    tensors = dict(whole)
    for linear in linears(spec):
        if linear in updates:
            tensors |= _named(linear, updates[linear])
    return pet, tensors


def _open_weights(folder: Path) -> TensorFile:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return open_tensor_file(folder / name)
    raise UserError(f"{folder}: has {CONFIG_FILE}, but neither {' nor '.join(_WEIGHT_FILES)}")


def _read_tensors(
    file: TensorFile, config: Mapping[str, Any], spec: DecoderSpec
) -> tuple[dict[str, Update], dict[str, np.ndarray]]:
    """Updates by our (split) linear layers, and the tensors that are trained whole."""
    found: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    score = f"{_PREFIX}{HEAD_NAMES[spec.head]}.weight" if spec.head == "sequence" else None
    for name in file.heads:
        match = _TENSOR.fullmatch(name)
        if name == score:
            whole[name.removeprefix(_PREFIX)] = _fp32(file, name)
        elif match is None:
            raise UserError(
                f"{file.path}: {name} is no factor of a LoRA on a linear layer. Weights that were saved whole "
                "(modules_to_save, save_embedding_layers) and adapters of embeddings are not supported"
            )
        else:
            found.setdefault(match[1], {})[match[2].removesuffix(".weight")] = _fp32(file, name)
    if not found:
        raise UserError(f"{file.path}: there is no LoRA in it")
    table = _stored_parts(file)
    updates: dict[str, Update] = {}
    for module, factors in found.items():
        update = _update(module, factors, config, file.path)
        updates |= _by_our_names(module, update, table.get(module), spec, file.path)
    return updates, whole


def _fp32(file: TensorFile, name: str) -> np.ndarray:
    return np.ascontiguousarray(file.read(name), np.float32)


def _stored_parts(file: TensorFile) -> dict[str, dict[str, list[int]]]:
    """What `write_adapter` noted of fused layers; {} in files of PEFT."""
    try:
        return json.loads(file.metadata.get(_PARTS, "{}"))
    except ValueError:
        return {}


def _update(module: str, factors: Mapping[str, np.ndarray], config: Mapping[str, Any], path: Path) -> Update:
    """One module's factors, checked against each other and against the configuration."""
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    if set(factors) != wanted:
        raise UserError(
            f"{path}: {module} has {', '.join(sorted(factors))}; {', '.join(sorted(wanted))} are needed "
            f"(use_dora: {bool(config.get('use_dora'))})"
        )
    a, b = factors["lora_A"], factors["lora_B"]
    rank, scale = scaling_of(config, module)
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
        raise UserError(
            f"{path}: {module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, but {CONFIG_FILE} says rank "
            f"{rank}"
        )
    magnitude = factors.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.shape != (len(b),):
        raise UserError(f"{path}: {module}: lora_magnitude_vector is {list(magnitude.shape)}, lora_B {list(b.shape)}")
    return Update(a, b, scale, magnitude)


def _by_our_names(
    module: str, update: Update, table: dict[str, list[int]] | None, spec: DecoderSpec, path: Path
) -> dict[str, Update]:
    """The module's update under the names of our linear layers, split where the module is query, key and value."""
    weight = f"{module}.weight"
    parts = [name.removesuffix(".weight") for name in parts_of_fused(weight)]
    if not parts:
        return {(from_hf(weight) or weight).removesuffix(".weight"): update}
    layout = QkvLayout(spec.num_kv_heads, spec.head_dim)
    if layout.rows(len(update.b)) is None:
        raise UserError(f"{path}: {module}: lora_B {list(update.b.shape)} does not fit this model's heads")
    rows = [layout.part(np.arange(len(update.b)), index) for index in range(3)]
    return split(update, dict(zip(parts, rows, strict=True)), table)


def _check_shapes(updates: Mapping[str, Update], spec: DecoderSpec, path: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that was made for another model."""
    base = config.get("base_model_name_or_path")
    made_for = f" (it was made for {base})" if base else ""
    model = _split_linears(spec)
    for name, update in updates.items():
        if name not in model:
            raise UserError(f"{path}: {name}: this model has no such linear layer{made_for}")
        theirs = (len(update.b), update.a.shape[1])
        if theirs != model[name]:
            raise UserError(f"{path}: {name} is {list(theirs)} there and {list(model[name])} in this model{made_for}")


def _split_linears(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """`linears` of the model with its projections apart, as Hugging Face has them."""
    return linears(replace(spec, qkv_concat=False))


def _as_the_model_has_them(updates: dict[str, Update], spec: DecoderSpec) -> dict[str, Update]:
    """Split projections joined for a model with qkv_concat."""
    if not spec.qkv_concat:
        return updates
    sizes = _split_linears(spec)
    joined: dict[str, Update] = {}
    for name, update in updates.items():
        whole = (joined_of(f"{name}.weight") or f"{name}.weight").removesuffix(".weight")
        if whole == name:
            joined[name] = update
        elif whole not in joined:
            parts = [part.removesuffix(".weight") for part in parts_of(f"{whole}.weight")]
            joined[whole] = join({part: (updates.get(part), sizes[part]) for part in parts}, whole)
    return joined


def _unified(
    updates: dict[str, Update], config: Mapping[str, Any], spec: DecoderSpec
) -> tuple[LoraConfig, dict[str, Update]]:
    """One rank and one scaling for all, and the pet_config that says so."""
    rank = max(update.rank for update in updates.values())
    scale = Counter(update.scaling for update in updates.values()).most_common(1)[0][0]
    rslora = bool(config.get("use_rslora"))
    alpha = config.get("lora_alpha", 8)
    divisor = math.sqrt(rank) if rslora else rank
    if not math.isclose(scale, alpha / divisor, rel_tol=1e-9):
        alpha = scale * divisor
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in linears(spec) if name in updates))
    left_out = [name for name in linears(spec) if name.rpartition(".")[2] in leaves and name not in updates]
    pet = LoraConfig(
        pet_type="lora",
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=config.get("lora_dropout") or 0.0,
        target_modules="|".join(leaves),
        exclude_layers="|".join(re.escape(name) + "$" for name in left_out) or None,
        use_rslora=rslora,
        use_dora=bool(config.get("use_dora")),
    )
    return pet, {name: update.widened(rank).rescaled(scale) for name, update in updates.items()}


def _named(linear: str, update: Update) -> dict[str, np.ndarray]:
    tensors = {f"{linear}.{LORA_A}": update.a, f"{linear}.{LORA_B}": update.b}
    if update.magnitude is not None:
        tensors[f"{linear}.{MAGNITUDE}"] = update.magnitude
    return tensors


# ---- writing


def write_adapter(
    folder: str | Path, pet: LoraConfig, tensors: Mapping[str, np.ndarray], spec: DecoderSpec, base_name: str
) -> Path:
    """Write our adapter as a folder that `peft.PeftModel.from_pretrained` loads, and return it.

    folder: new or empty; it appears when it is whole. tensors: under our names, of the model of `spec`. base_name: what
    the folder names as its base model. Raises UserError for an adapter that PEFT cannot express.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: must be a new or empty folder")
    updates = _our_updates(pet, tensors, spec)
    names = _their_names(spec)
    modules, table = _by_their_names(updates, names, spec)
    ranks = {module: update.rank for module, update in modules.items()}
    config = written_config(pet, ranks, set(names.values()), spec, base_name)
    stored = {f"{_PREFIX}{name}": array for name, array in tensors.items() if _is_score(name, spec)}
    for module, update in modules.items():
        stored[f"{_PREFIX}{module}.lora_A.weight"] = update.a
        stored[f"{_PREFIX}{module}.lora_B.weight"] = update.b
        if update.magnitude is not None:
            stored[f"{_PREFIX}{module}.lora_magnitude_vector"] = update.magnitude
    stored = {name: np.ascontiguousarray(array, np.float32) for name, array in stored.items()}
    metadata = {"format": "pt"} | ({_PARTS: json.dumps(table)} if table else {})
    heads = {name: head_of(array) for name, array in stored.items()}
    size = file_size(".safetensors", heads, metadata)
    with NewFolder(folder, size) as new:
        with StagedFile(new / _WEIGHT_FILES[0], size) as staged:
            write_tensors(staged, heads, stored.__getitem__, metadata)
            staged.commit()
        write_json(new / CONFIG_FILE, config)
        new.commit()
    return folder


def _is_score(name: str, spec: DecoderSpec) -> bool:
    return spec.head == "sequence" and name.startswith(f"{HEAD_NAMES[spec.head]}.")


def _our_updates(pet: LoraConfig, tensors: Mapping[str, np.ndarray], spec: DecoderSpec) -> dict[str, Update]:
    """Our tensors as updates by linear layer; every tensor must be used."""
    model = linears(spec)
    updates: dict[str, Update] = {}
    for name in tensors:
        linear, _, kind = name.rpartition(".")
        if kind not in (LORA_A, LORA_B, MAGNITUDE):
            if not _is_score(name, spec):
                raise UserError(f"{name}: only LoRA's factors can be written for PEFT")
        elif linear not in model:
            raise UserError(f"{name}: this model has no such linear layer; name the config it was trained with")
        elif kind == LORA_A:
            updates[linear] = _our_update(linear, pet, tensors, model[linear])
    if not updates:
        raise UserError("there is no LoRA in the adapter")
    return updates


def _our_update(linear: str, pet: LoraConfig, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Update:
    names = [f"{linear}.{LORA_A}", f"{linear}.{LORA_B}"] + ([f"{linear}.{MAGNITUDE}"] if pet.use_dora else [])
    wanted = [(pet.lora_rank, shape[1]), (shape[0], pet.lora_rank), (shape[0],)]
    for name, expected in zip(names, wanted, strict=False):
        if name not in tensors:
            raise UserError(f"{name} is missing in the adapter")
        if tensors[name].shape != expected:
            raise UserError(
                f"{name} is {list(tensors[name].shape)}; rank {pet.lora_rank} of this model wants {list(expected)}"
            )
    arrays = [np.asarray(tensors[name], np.float32) for name in names]
    return Update(arrays[0], arrays[1], scaling(pet), arrays[2] if pet.use_dora else None)


def _their_names(spec: DecoderSpec) -> dict[str, str]:
    """Our (split) linear layers -> Hugging Face's modules."""
    family = "falcon" if spec.mlp == "gelu" else "llama"
    return {name: to_hf(f"{name}.weight", family).removesuffix(".weight") for name in _split_linears(spec)}


def _by_their_names(
    updates: Mapping[str, Update], names: Mapping[str, str], spec: DecoderSpec
) -> tuple[dict[str, Update], dict[str, dict[str, list[int]]]]:
    """Updates by Hugging Face's modules, and for fused ones which columns belong to which part."""
    apart: dict[str, Update] = {}
    sizes = _split_linears(spec)
    for name, update in updates.items():
        parts = [part.removesuffix(".weight") for part in parts_of(f"{name}.weight")]
        if parts:
            ends = np.cumsum([sizes[part][0] for part in parts])
            apart |= split(update, dict(zip(parts, np.split(np.arange(ends[-1]), ends[:-1]), strict=True)))
        else:
            apart[name] = update
    modules: dict[str, Update] = {}
    table: dict[str, dict[str, list[int]]] = {}
    for name, update in apart.items():
        module = names[name]
        parts = [part.removesuffix(".weight") for part in parts_of_fused(f"{module}.weight")]
        if not parts:
            modules[module] = update
        elif module not in modules:
            one = join({part: (apart.get(part), sizes[part]) for part in parts}, module)
            table[module] = parts_table({part: apart.get(part) for part in parts}, one)
            rows = QkvLayout(spec.num_kv_heads, spec.head_dim).join(
                *np.split(np.arange(len(one.b)), np.cumsum([sizes[part][0] for part in parts])[:-1])
            )
            modules[module] = one.with_rows(rows)
    return modules, table


def write_our_file(path: str | Path, pet: LoraConfig, tensors: Mapping[str, np.ndarray], base_name: str) -> Path:
    """Write an adapter as one .safetensors or .ckpt file that adapter_id takes, with how it was made in its manifest.

    base_name: what the manifest names as its base, "" = not known. Raises UserError for another suffix.
    """
    path = Path(path)
    if path.suffix not in WRITABLE:
        raise UserError(f"{path}: the name of an adapter's file must end in {' or '.join(WRITABLE)}")
    heads = {name: head_of(array) for name, array in tensors.items()}
    metadata = {"format": "ms"}
    state = {"adapter": adapter_state(pet, base_name, {})}
    with StagedFile(path, file_size(path.suffix, heads, metadata)) as staged:
        write_tensors(staged, heads, tensors.__getitem__, metadata)
        commit_with_manifest(staged, Version(staged.sha256, staged.size, state=state))
    return path
