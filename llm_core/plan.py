"""The verb `plan`: how many parameters a run's model has, part by part, and how many of them learn.

All of it follows from the sizes in the run file: no weight is allocated, MindSpore and NumPy are not imported, so a 70B
model is planned as quickly as a small one.
"""

from __future__ import annotations

from math import prod
from typing import Any

from llm_core.config import LoadedConfig
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import HEAD_NAMES, DecoderSpec, spec_from_config
from llm_core.peft.apply import adapter_shapes, describe_parameters, is_adapter_name, is_trainable

PARTS = ("embedding", "attention", "feed-forward", "norms", "head", "adapter")


def plan(loaded: LoadedConfig) -> str:
    """What `run-llm plan` prints: a table of the parts, and the line of every run's log that sums it up."""
    model = loaded.config.model
    spec, pet = spec_from_config(model), model.config.pet_config
    rows = {part: counts for part, counts in count_parts(spec, pet).items() if counts[0]}
    total = [sum(counts[i] for counts in rows.values()) for i in range(2)]
    lines = [f"{'':<14}{'parameters':>18}{'trainable':>18}"]
    lines += [_row(part, *counts) for part, counts in rows.items()]
    if "head" not in rows:
        lines.append("(the head is the embedding)")
    lines += [_row("total", *total), "", f"{model.arch.type}: {describe_parameters(spec, pet)}"]
    return "\n".join(lines) + "\n"


def count_parts(spec: DecoderSpec, pet: Any) -> dict[str, tuple[int, int]]:
    """Part of the model -> (its parameters, how many of these learn). `pet`: the pet_config, or None."""
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, shape in (parameter_shapes(spec) | adapter_shapes(spec, pet)).items():
        size = prod(shape)
        every, learning = counts[_part(name)]
        counts[_part(name)] = every + size, learning + size * is_trainable(name, spec, pet)
    return counts


def _part(name: str) -> str:
    """The part that a parameter belongs to, by its name."""
    if is_adapter_name(name):
        return "adapter"
    if ".attention." in name:
        return "attention"
    if ".feed_forward." in name:
        return "feed-forward"
    if name.startswith("model.tok_embeddings."):
        return "embedding"
    return "head" if name.rpartition(".")[0] in HEAD_NAMES.values() else "norms"


def _row(part: str, every: int, learning: int) -> str:
    return f"{part:<14}{every:>18,}{learning:>18,}"
