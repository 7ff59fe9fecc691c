"""Which entries of a checkpoint are weights, and which the training's state."""

from __future__ import annotations

from collections.abc import Iterable

# scalars that MindSpore's and MindFormers' training checkpoints carry beside the weights
_COUNTERS = frozenset(
    ("epoch_num", "step_num", "global_step", "loss_scale", "scale_sense", "current_iterator_step",
     "last_overflow_iterator_step", "learning_rate", "beta1_power", "beta2_power", "beta_1", "beta_2", "weight_decay",
     "random_op", "network_params_num")
)  # fmt: skip


def is_state(name: str, weights) -> bool:
    """Whether `name` is optimizer state `slot.parameter` of one of `weights` (any container), or a counter."""
    return name in _COUNTERS or name.partition(".")[2] in weights


def without_state(names: Iterable[str]) -> list[str]:
    """The names of the weights alone."""
    names = list(names)
    every = set(names)
    return [name for name in names if not is_state(name, every)]
