"""A model with its adapter: the one place that knows every kind of pet_config.

Importing this module imports no MindSpore; `build_net` does.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

from llm_core.peft import lora

if TYPE_CHECKING:
    from mindspore import nn

    from llm_core.models.decoder import Piece
    from llm_core.models.layers import Parts
    from llm_core.models.spec import DecoderSpec

ADAPTER_MARK = "mindpet_delta"


def is_adapter_name(name: str) -> bool:
    """Whether a parameter is an adapter's, by its name."""
    return ADAPTER_MARK in name


def adapter_shapes(spec: DecoderSpec, pet: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that the adapter `pet` (a pet_config, None = none) adds to the model."""
    if pet is None:
        return {}
    if pet.pet_type == "lora":
        return lora.shapes(spec, pet)
    from llm_core.peft import prefix

    return prefix.shapes(spec, pet)


def build_net(
    spec: DecoderSpec, pet: Any, seed: int | None, adapter_seed: int = 0, parts: Parts | None = None,
    piece: Piece | None = None,
) -> nn.Cell:  # fmt: skip
    """The network of `spec`, with the adapter of `pet` (LoraConfig, PrefixTuningConfig, PTuning2Config or None) on it.

    seed: of the base's weights, None = zeros, for a base about to be loaded. With an adapter only its parameters can be
    trained, and the head of a classifier, which no base has; freeze_include and freeze_exclude of LoRA change that.
    parts, piece: what a rank holds of it, see `models.heads.build_model`.
    Raises UserError for targets that match nothing.
    """
    from llm_core.models.heads import build_model
    from llm_core.models.layers import Parts

    parts = parts or Parts(spec.bf16)
    if pet is not None and pet.pet_type == "lora":
        from llm_core.peft.lora_linear import LoraFactory

        parts.make_linear = LoraFactory(spec, pet, adapter_seed)
    net = build_model(parts.local(spec), parts, seed, piece)
    if pet is None:
        return net
    if pet.pet_type != "lora":
        from llm_core.peft import prefix

        prefix.attach(net, spec, pet, adapter_seed)
    for parameter in net.get_parameters():
        parameter.requires_grad = is_trainable(parameter.name, spec, pet)
    net.graph_key = {"adapter": pet}
    return net


def is_trainable(name: str, spec: DecoderSpec, pet: Any) -> bool:
    """Whether the parameter `name` learns: with an adapter (pet not None) only the adapter's and a classifier's head.

    freeze_include and freeze_exclude hold patterns of whole names with * and ? (*norm*, *layers.0.*); what
    freeze_exclude names learns, whatever else says.
    """
    from llm_core.models.spec import HEAD_NAMES

    if pet is None:
        return True
    learns = is_adapter_name(name)
    if spec.head != "causal":
        learns = learns or name.startswith(f"{HEAD_NAMES[spec.head]}.")
    if any(fnmatchcase(name, pattern) for pattern in getattr(pet, "freeze_include", ())):
        learns = False
    if any(fnmatchcase(name, pattern) for pattern in getattr(pet, "freeze_exclude", ())):
        learns = True
    return learns


def is_saved(name: str, spec: DecoderSpec, pet: Any) -> bool:
    """Whether an adapter's checkpoint holds the parameter `name`: what learns, and factors that are frozen."""
    return is_adapter_name(name) or is_trainable(name, spec, pet)


def parameter_counts(spec: DecoderSpec, pet: Any) -> tuple[int, int, int]:
    """How many values learn, and how many the base and the adapter have: (trainable, base, adapter)."""
    from llm_core.models.shapes import parameter_shapes

    base, adapter = parameter_shapes(spec), adapter_shapes(spec, pet)
    trainable = sum(prod(shape) for name, shape in (base | adapter).items() if is_trainable(name, spec, pet))
    return trainable, sum(map(prod, base.values())), sum(map(prod, adapter.values()))


def describe_parameters(spec: DecoderSpec, pet: Any) -> str:
    """One line for a run, `check` and `plan`: trainable and total parameters."""
    trainable, base, adapter = parameter_counts(spec, pet)
    if pet is None:
        return f"{base:,} parameters, {trainable:,} trainable"
    return (
        f"{base + adapter:,} parameters, {trainable:,} trainable ({trainable / base:.4%} of the base model's {base:,}; "
        f"{pet.pet_type})"
    )
