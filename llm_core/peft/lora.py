"""LoRA as plain facts: which linear layers get an adapter, its parameters' names and shapes, its scaling.

Without MindSpore, so that a checkpoint, a plan or a merge can be looked at before a model is built; the layer itself is
in `lora_linear`. Sources: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from llm_core.errors import UserError
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import HEAD_NAMES, DecoderSpec

if TYPE_CHECKING:
    from llm_core.config.model_section import LoraConfig

LORA_A, LORA_B, MAGNITUDE = "mindpet_delta_lora_a", "mindpet_delta_lora_b", "mindpet_delta_lora_magnitude"


def scaling(pet: LoraConfig) -> float:
    """What the update B A x is multiplied by: alpha / rank, with rsLoRA alpha / sqrt(rank)."""
    return pet.lora_alpha / (math.sqrt(pet.lora_rank) if pet.use_rslora else pet.lora_rank)


def linears(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """The linear layers of the model that an adapter may change: name -> (out, in). A classifier's head is none."""
    found = {
        name.removesuffix(".weight"): shape
        for name, shape in parameter_shapes(spec).items()
        if name.endswith(".weight") and len(shape) == 2
    }
    if spec.head != "causal":
        found.pop(HEAD_NAMES[spec.head])
    return found


def targets(spec: DecoderSpec, pet: LoraConfig) -> dict[str, tuple[int, int]]:
    """The linear layers that get an adapter: name -> (out, in).

    target_modules is matched as MindFormers does, from the beginning of a layer's leaf name (wq, w1, lm_head ...);
    exclude_layers from the beginning of its whole name (model.layers.0.attention.wq). Raises UserError for a regular
    expression that is none, and where nothing is left.
    """
    wanted, unwanted = _compiled("target_modules", pet.target_modules), None
    if pet.exclude_layers is not None:
        unwanted = _compiled("exclude_layers", pet.exclude_layers)
    every = linears(spec)
    matched = {name: shape for name, shape in every.items() if wanted.match(name.rpartition(".")[2])}
    if not matched:
        leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in every))
        raise UserError(
            f"pet_config.target_modules: {pet.target_modules!r} matches no linear layer of this model; it is matched "
            f"from the beginning of their names, which are {leaves}"
        )
    kept = {name: shape for name, shape in matched.items() if unwanted is None or not unwanted.match(name)}
    if not kept:
        raise UserError(
            f"pet_config.exclude_layers: {pet.exclude_layers!r} leaves none of the {len(matched)} layers that "
            f"target_modules names; it is matched from the beginning of whole names, such as {next(iter(matched))}"
        )
    return kept


def _compiled(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"pet_config.{key}: {pattern!r} is no regular expression: {error}") from None


def shapes(spec: DecoderSpec, pet: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The adapter's parameters: A [rank, in] and B [out, rank] of every target, with DoRA its magnitude [out]."""
    found: dict[str, tuple[int, ...]] = {}
    for name, (out_size, in_size) in targets(spec, pet).items():
        found[f"{name}.{LORA_A}"] = (pet.lora_rank, in_size)
        found[f"{name}.{LORA_B}"] = (out_size, pet.lora_rank)
        if pet.use_dora:
            found[f"{name}.{MAGNITUDE}"] = (out_size,)
    return found
