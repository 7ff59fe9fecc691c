"""Recomputation: drop activations after the forward pass and compute them again in the backward pass.

Applied from outside to a finished model, as MindFormers' `recompute_config` says; the numbers do not change.
On a CPU the graph keeps the activations all the same (MindSpore 2.9, 2.10), so nothing is saved there.
"""

from __future__ import annotations

from typing import Any

from llm_core.models.decoder import CausalLM


def apply_recompute(net: CausalLM, recompute_config: Any, stage: int | None = None) -> int:
    """Mark the layers that `recompute_config` (`.recompute`, `.select_recompute`) asks for; returns how many.

    Each of the two is a bool, or a list: of numbers of layers, one per pipeline stage (counted from the first
    layer; without stages, `stage` None, their sum), or of MindFormers' operator patterns, which count as True.
    `recompute` marks whole layers, `select_recompute` in the remaining ones only what is large and cheap to
    compute: the activation of the feed-forward and the attention weights.
    """
    layers = list(net.model.layers)
    whole = _layer_count(recompute_config.recompute, len(layers), stage)
    selected = _layer_count(recompute_config.select_recompute, len(layers), stage)
    for i, layer in enumerate(layers):
        if i < whole:
            layer.recompute()
        elif i < selected:
            layer.feed_forward.activation.recompute()
            layer.attention.attention.recompute()
    return max(whole, selected)


def _layer_count(value: bool | list[int] | list[str], layers: int, stage: int | None) -> int:
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        own = value if stage is None else value[stage : stage + 1]
        return min(sum(own), layers)
    return layers if value else 0
