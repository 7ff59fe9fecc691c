"""adapter_config.json of Hugging Face's PEFT: what it says of a LoRA, and what of it is not computed here.

A setting that changes numbers is followed or refused by its name, never passed over: a key that this module does not
know is refused as soon as it says anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_core.config.model_section import LoraConfig
from llm_core.errors import UserError
from llm_core.models.spec import HEAD_NAMES, DecoderSpec
from llm_core.peft.lora import scaling

CONFIG_FILE = "adapter_config.json"
_TASKS = {"causal": "CAUSAL_LM", "sequence": "SEQ_CLS"}

# what each key may say; values elsewhere mean something that is not computed here
_WANTED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),  # the others change the base
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "ensure_weight_tying": (False, None),
}
# which layers: the tensors themselves say it; how a training begins or runs; where things came from
_WITHOUT_MEANING = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "auto_mapping",
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
}  # fmt: skip
_READ = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save",
}  # fmt: skip


# ---- reading


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder; UserError, naming file and line, when it is no JSON object."""
    path = Path(folder) / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object")
    return content


def refuse_foreign(config: Mapping[str, Any], folder: Path, spec: DecoderSpec) -> None:
    """Raise UserError, naming the key, for what is not computed here."""
    path = folder / CONFIG_FILE
    for key, allowed in _WANTED.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            names = " or ".join(repr(each) for each in allowed if each is not None)
            raise UserError(f"{path}: {key}: {value!r} is not supported; it must be {names}")
    saved = config.get("modules_to_save") or []
    if saved and (spec.head != "sequence" or HEAD_NAMES[spec.head] not in saved):
        raise UserError(
            f"{path}: modules_to_save: {saved!r}: weights trained whole beside the adapter are not supported, except "
            f"score of a sequence classifier (this model is of the kind {spec.head!r})"
        )
    for key, value in config.items():
        if key not in _WANTED and key not in _READ and key not in _WITHOUT_MEANING and value:
            raise UserError(f"{path}: {key}: {value!r} is not supported")
    for key, default in (("r", 8), ("lora_alpha", 8)):
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{path}: {key}: {value!r} is not a number above 0")
    dropout = config.get("lora_dropout") or 0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"{path}: lora_dropout: {dropout!r} is not a number from 0 to below 1")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(config.get(key) or {}, f"{path}: {key}")


def _check_pattern(pattern: Any, where: str) -> None:
    if not isinstance(pattern, dict):
        raise UserError(f"{where}: {pattern!r} is not a JSON object")
    for regex, value in pattern.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{where}: {value!r} is not a number above 0")
        try:
            re.compile(regex)
        except re.error as error:
            raise UserError(f"{where}: {regex!r} is no regular expression: {error}") from None


def _pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """A module's entry in rank_pattern or alpha_pattern, found as PEFT finds it: keys are regular expressions."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def scaling_of(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scaling of a module, by r, lora_alpha, their patterns and use_rslora."""
    rank = _pattern_value(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = _pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


# ---- writing


def written_config(
    pet: LoraConfig, ranks: Mapping[str, int], every: Iterable[str], spec: DecoderSpec, base_name: str
) -> dict[str, Any]:
    """adapter_config.json for an adapter of ours.

    ranks: of each adapted module. every: all modules of the model that could have one; those are named by their leaf
    where all of that leaf are alike, else in full. Raises UserError for a head that PEFT has no task for.
    """
    if spec.head not in _TASKS:
        raise UserError(f"PEFT folders are written of causal LMs and sequence classifiers, not of {spec.head!r}")
    other = {module: rank for module, rank in ranks.items() if rank != pet.lora_rank}
    alphas = {m: scaling(pet) * (math.sqrt(rank) if pet.use_rslora else rank) for m, rank in other.items()}
    return {
        "peft_type": "LORA",
        "task_type": _TASKS[spec.head],
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": pet.lora_rank,
        "lora_alpha": _number(pet.lora_alpha),
        "lora_dropout": pet.lora_dropout,
        "target_modules": list(_by_leaf(dict.fromkeys(ranks, True), every)),
        "rank_pattern": _by_leaf(other, every),
        "alpha_pattern": {name: _number(alpha) for name, alpha in _by_leaf(alphas, every).items()},
        "use_rslora": pet.use_rslora,
        "use_dora": pet.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": [HEAD_NAMES[spec.head]] if spec.head == "sequence" else None,
        "init_lora_weights": True,
    }


def _by_leaf(values: Mapping[str, Any], every: Iterable[str]) -> dict[str, Any]:
    """The same by leaf name wherever all modules of that leaf have the same value."""
    leaves: dict[str, list[str]] = {}
    for module in sorted(every):
        leaves.setdefault(module.rpartition(".")[2], []).append(module)
    result: dict[str, Any] = {}
    for leaf, modules in leaves.items():
        found = {module: values[module] for module in modules if module in values}
        if len(found) == len(modules) and len(set(found.values())) == 1:
            result[leaf] = next(iter(found.values()))
        else:
            result |= found
    return result


def _number(value: float) -> int | float:
    """A whole number as PEFT writes it."""
    return int(value) if float(value).is_integer() else value
