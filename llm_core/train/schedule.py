"""Learning rate schedules, as plain functions of the step.

Pure Python: the host computes the learning rate of a step in double precision and hands it to the compiled
train step as an input, so that a schedule never causes a compile and a resumed run sees the same numbers.

The classes, their keys and their aliases are MindFormers' (`lr_schedule` in its YAMLs). Two departures, both
where upstream contradicts its own description: the polynomial's decay is counted from the end of the warm-up
(upstream drops to `lr_end` `warmup_steps` too early), and the linear schedule ends at `lr_end` (upstream
ignores the key). With upstream's defaults, warm-up aside, the numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llm_core.errors import UserError

Schedule = Callable[[int], float]

ALIASES = {
    "constant_with_warmup": "ConstantWarmUpLR",
    "linear": "LinearWithWarmUpLR",
    "cosine": "CosineWithWarmUpLR",
    "cosine_with_restarts": "CosineWithRestartsAndWarmUpLR",
    "polynomial": "PolynomialWithWarmUpLR",
}


def build_schedule(
    lr_schedule_cfg: Any, optimizer_cfg: Any, total_steps: int, steps_per_epoch: int
) -> Schedule:
    """The learning rate as a function of the 0-based optimizer step.

    lr_schedule_cfg: the `lr_schedule` section, or None: then `optimizer.learning_rate` holds for every step
        (or is itself a schedule, `{type: ...}`).
    optimizer_cfg: the `optimizer` section; its learning_rate serves a schedule that names none.
    total_steps, steps_per_epoch: optimizer steps of the whole run and of an epoch; `total_steps` of the
        section wins unless it is -1 or absent.

    `warmup_ratio` wins over `warmup_epochs`, and that over `warmup_steps`.

    Raises UserError for an unknown type, a missing learning rate or a value outside its range.
    """
    base = getattr(optimizer_cfg, "learning_rate", None)
    if lr_schedule_cfg is None and getattr(base, "type", None):
        lr_schedule_cfg, base = base, None
    if lr_schedule_cfg is None:
        rate = _rate("optimizer.learning_rate", base)
        return lambda step: rate
    name = lr_schedule_cfg.type
    name = ALIASES.get(name, name)
    if name == "LearningRateWiseLayer":
        raise UserError(
            "lr_schedule.type: LearningRateWiseLayer scales the rate layer by layer (layer_scale of the "
            "vision models; MindFormers ignores it for language models); name its base schedule instead, "
            "e.g. CosineWithWarmUpLR"
        )
    if name not in _BUILDERS:
        raise UserError(f"lr_schedule.type: {name!r} is none of {', '.join([*_BUILDERS, *ALIASES])}")
    return _BUILDERS[name](_Settings(lr_schedule_cfg, base, total_steps, steps_per_epoch))


class _Settings:
    """The section's values with their defaults resolved and checked."""

    def __init__(self, section: Any, optimizer_rate: float | None, total_steps: int, steps_per_epoch: int):
        self._section = section
        own_rate = self.get("learning_rate", self.get("base_lr"))
        self.rate = _rate("lr_schedule.learning_rate", optimizer_rate if own_rate is None else own_rate)
        configured = self.get("total_steps", -1)
        self.total = total_steps if configured == -1 else configured
        if self.total < 1:
            raise UserError(f"lr_schedule.total_steps: {self.total} is no number of steps; give one, or -1")
        self.end = self.get("lr_end", 0.0)
        self.init = self.get("warmup_lr_init", 0.0)
        self.warmup = self._warmup_steps(steps_per_epoch)

    def get(self, name: str, default: Any = None) -> Any:
        value = getattr(self._section, name, None)
        return default if value is None else value

    def positive(self, name: str, default: int) -> int:
        value = self.get(name, default)
        if value < 1:
            raise UserError(f"lr_schedule.{name}: {value} must be at least 1")
        return value

    def _warmup_steps(self, steps_per_epoch: int) -> int:
        ratio, epochs = self.get("warmup_ratio"), self.get("warmup_epochs")
        steps = self.get("warmup_steps", 0)
        if ratio is not None:
            if not 0 <= ratio <= 1:
                raise UserError(f"lr_schedule.warmup_ratio: {ratio} is not between 0 and 1")
            return int(self.total * ratio)
        if epochs is not None:
            steps = int(epochs * steps_per_epoch)
        if steps < 0:
            raise UserError(f"lr_schedule.warmup_steps: {steps} is negative")
        return steps

    def after_warmup(self, decay: Schedule) -> Schedule:
        """A linear warm-up from `warmup_lr_init`, then `decay`, which is called with the global step."""
        rate, init, warmup = self.rate, self.init, self.warmup

        def schedule(step: int) -> float:
            if step < warmup:
                return init + (rate - init) * step / warmup
            return decay(step)

        return schedule


def _rate(key: str, value: Any) -> float:
    if value is None:
        raise UserError(f"{key}: no learning rate is given; set it, e.g. {key}: 5.e-5")
    if not value >= 0:
        raise UserError(f"{key}: {value} is negative")
    return float(value)


def _constant(s: _Settings) -> Schedule:
    return s.after_warmup(lambda step: s.rate)


def _linear(s: _Settings) -> Schedule:
    span = max(1, s.total - s.warmup)
    return s.after_warmup(lambda step: s.end + (s.rate - s.end) * max(0.0, (s.total - step) / span))


def _cosine(s: _Settings) -> Schedule:
    span, stop = max(1, s.total - s.warmup), s.positive("decay_steps", s.total)
    cycles = s.get("num_cycles", 0.5)

    def decay(step: int) -> float:
        if step >= stop:
            return s.end
        wave = 0.5 * (1 + math.cos(2 * math.pi * cycles * (step - s.warmup) / span))
        return s.end + (s.rate - s.end) * max(0.0, wave)

    return s.after_warmup(decay)


def _cosine_with_restarts(s: _Settings) -> Schedule:
    span, stop = max(1, s.total - s.warmup), s.positive("decay_steps", s.total)
    cycles = s.get("num_cycles", 1.0)

    def decay(step: int) -> float:
        if step >= min(stop, s.total):
            return s.end
        phase = cycles * (step - s.warmup) / span % 1.0
        return s.end + (s.rate - s.end) * 0.5 * (1 + math.cos(math.pi * phase))

    return s.after_warmup(decay)


def _polynomial(s: _Settings) -> Schedule:
    span, power, end = s.positive("decay_steps", max(1, s.total - s.warmup)), s.get("power", 1.0), s.end
    if not s.rate > end:
        raise UserError(f"lr_schedule.lr_end: {end} must be below the learning rate, {s.rate}")

    def decay(step: int) -> float:
        remaining = 1 - (step - s.warmup) / span
        return end + (s.rate - end) * remaining**power if remaining > 0 else end

    return s.after_warmup(decay)


def _cosine_annealing(s: _Settings) -> Schedule:
    low, t_max = s.get("eta_min", s.end), s.positive("t_max", s.total)
    return lambda step: low + (s.rate - low) * 0.5 * (1 + math.cos(math.pi * step / t_max))


def _cosine_annealing_warm_restarts(s: _Settings) -> Schedule:
    low, first, growth = s.get("eta_min", s.end), s.positive("t_0", s.total), s.positive("t_mult", 1)

    def schedule(step: int) -> float:
        start, length = 0, first
        if growth == 1:
            start = step // first * first
        while step >= start + length:
            start, length = start + length, length * growth
        return low + (s.rate - low) * 0.5 * (1 + math.cos(math.pi * (step - start) / length))

    return schedule


_BUILDERS = {
    "ConstantWarmUpLR": _constant,
    "LinearWithWarmUpLR": _linear,
    "CosineWithWarmUpLR": _cosine,
    "CosineWithRestartsAndWarmUpLR": _cosine_with_restarts,
    "PolynomialWithWarmUpLR": _polynomial,
    "CosineAnnealingLR": _cosine_annealing,
    "CosineAnnealingWarmRestarts": _cosine_annealing_warm_restarts,
}
