"""Loss scaling: the host-side state machine that picks the next step's scale.

The compiled step takes the scale as an input, multiplies the loss by it, divides the gradients by it and
reports whether any of them overflowed; `update` then decides about the next step. The state is small and goes
into the checkpoint's JSON.
"""

from __future__ import annotations

from typing import Any

from llm_core.errors import UserError

LARGEST = 2.0**126  # fp32 carries the scale: growth ends before the product becomes infinite


class FixedLossScale:
    """A scale that never changes (`scale_sense: 1.0`, or FixedLossScaleUpdateCell)."""

    def __init__(self, value: float = 1.0):
        if not 0 < value <= LARGEST:
            raise UserError(f"runner_wrapper.scale_sense: a loss scale must be above 0, {value} is not")
        self.value = float(value)

    def update(self, overflow: bool) -> None:
        """Take note of a step; a fixed scale has nothing to learn from it."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing to restore: the configuration alone decides about a fixed scale."""


class DynamicLossScale:
    """DynamicLossScaleUpdateCell: divided by `factor` at an overflow (never below 1), multiplied by it after
    `window` clean steps in a row."""

    def __init__(self, value: float, factor: float = 2.0, window: int = 1000):
        if value < 1 or factor <= 1 or window < 1:
            raise UserError(
                "runner_wrapper.scale_sense: loss_scale_value must be at least 1, scale_factor above 1 and "
                f"scale_window at least 1; got {value}, {factor}, {window}"
            )
        self.value, self.factor, self.window = float(value), float(factor), int(window)
        self.clean_steps = 0

    def update(self, overflow: bool) -> None:
        """Take note of a step: `overflow` says whether its gradients held an inf or a NaN."""
        if overflow:
            self.value, self.clean_steps = max(1.0, self.value / self.factor), 0
            return
        self.clean_steps += 1
        if self.clean_steps >= self.window:
            self.value, self.clean_steps = min(self.value * self.factor, LARGEST), 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self.clean_steps = float(state["value"]), int(state["clean_steps"])


class AdaptiveLossScale(DynamicLossScale):
    """AdaptiveLossScaleUpdateCell: dynamic, with a window that follows the run.

    Windows are levels: 1, then `min_window` doubled up to `max_window`. Three growths at a level lead to the
    next one (a scale that holds is tested ever more rarely); three overflows in a row lead back to a window
    of 1 (a scale that fell too far comes back fast). Upstream's levels are other numbers, same ends.
    """

    PATIENCE = 3

    def __init__(self, value: float, factor: float, window: int, min_window: int, max_window: int):
        super().__init__(value, factor, window)
        if not 0 < min_window < max_window:
            raise UserError(
                "runner_wrapper.scale_sense: min_scale_window must be above 0 and below max_scale_window; "
                f"got {min_window} and {max_window}"
            )
        self.levels = [1, int(min_window)]
        while self.levels[-1] < max_window:
            self.levels.append(min(self.levels[-1] * 2, int(max_window)))
        self.growths = self.overflows = 0

    def update(self, overflow: bool) -> None:
        super().update(overflow)
        if overflow:
            self.overflows += 1
            if self.overflows == self.PATIENCE:
                self.window, self.growths, self.overflows = 1, 0, 0
        elif self.clean_steps == 0:
            self.growths, self.overflows = self.growths + 1, 0
            if self.growths == self.PATIENCE:
                self.window = next((level for level in self.levels if level > self.window), self.levels[-1])
                self.growths = 0

    def state_dict(self) -> dict[str, float]:
        adaptive = {"window": self.window, "growths": self.growths, "overflows": self.overflows}
        return {**super().state_dict(), **adaptive}

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        self.window, self.growths = int(state["window"]), int(state["growths"])
        self.overflows = int(state["overflows"])


LossScale = FixedLossScale | DynamicLossScale


def build_loss_scale(runner_wrapper_cfg: Any) -> LossScale:
    """The loss scale of the `runner_wrapper` section (None: no scaling).

    `scale_sense` is a number (fixed) or a section with a type; its missing values are upstream's defaults
    (65536, 2, 1000). Raises UserError for an unknown type and for values outside their range.
    """
    sense = getattr(runner_wrapper_cfg, "scale_sense", None)
    if sense is None:
        return FixedLossScale(1.0)
    if isinstance(sense, (int, float)):
        return FixedLossScale(sense)

    def given(name: str, default: float) -> float:
        value = getattr(sense, name, None)
        return default if value is None else value

    value, factor = given("loss_scale_value", 65536), given("scale_factor", 2)
    if sense.type == "FixedLossScaleUpdateCell":
        return FixedLossScale(value)
    if sense.type == "DynamicLossScaleUpdateCell":
        return DynamicLossScale(value, factor, given("scale_window", 1000))
    if sense.type == "AdaptiveLossScaleUpdateCell":
        low, high = given("min_scale_window", 20), given("max_scale_window", 1000)
        return AdaptiveLossScale(value, factor, given("scale_window", low), low, high)
    raise UserError(
        f"runner_wrapper.scale_sense.type: {sense.type!r} is none of FixedLossScaleUpdateCell, "
        "DynamicLossScaleUpdateCell, AdaptiveLossScaleUpdateCell"
    )
