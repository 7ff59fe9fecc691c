"""loss.png: training loss (raw and smoothed), evaluation loss, and the learning rate below."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.errors import EnvironmentFault

RAW, TRAIN, EVAL, RATE = "#9ecae1", "#1f5fa8", "#d1495b", "#666666"


def draw_losses(metrics: Sequence[dict[str, Any]], path: Path, title: str = "") -> Path | None:
    """Draw the lines of a metrics file to `path` (PNG) and return it; None when they hold no finite loss.

    Written under a temporary name first, so that a viewer never sees half a picture.
    """
    steps, losses = column(metrics, "loss")
    eval_steps, eval_losses = column(metrics, "eval_loss")
    if len(steps) + len(eval_steps) == 0:
        return None
    # Without pyplot: no global state, no display, and safe beside a user's own matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    rate_steps, rates = column(metrics, "lr")
    if len(rate_steps):
        loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        _draw_rate(rate_axes, rate_steps, rates)
        rate_axes.set_xlabel("optimizer step")
    else:
        loss_axes = figure.subplots()
        loss_axes.set_xlabel("optimizer step")
    _draw_train(loss_axes, steps, losses)
    if len(eval_steps):
        label = f"evaluation (last {eval_losses[-1]:.3f}, best {eval_losses.min():.3f})"
        loss_axes.plot(eval_steps, eval_losses, "o-", color=EVAL, markersize=4, linewidth=1.2, label=label)
    loss_axes.set_ylabel("loss (nats a token)")
    loss_axes.set_ylim(*_limits(losses, eval_losses))
    loss_axes.legend(frameon=False)
    loss_axes.set_title(title or "Training loss")
    loss_axes.xaxis.get_major_locator().set_params(integer=True)
    style(loss_axes)
    _add_token_axis(loss_axes, metrics)
    return save_figure(figure, path)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, [N] -> [N]; near the ends over as many as both sides have.

    Centred, because an average over the past lags behind a falling curve and so always looks too bad.
    """
    count = len(values)
    index = np.arange(count)
    half = np.minimum(np.minimum(index, count - 1 - index), window // 2)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def _draw_train(axes: Any, steps: np.ndarray, losses: np.ndarray) -> None:
    if not len(steps):
        return
    window = 2 * min(len(losses) // 60, 50) + 1
    if window > 1:
        axes.plot(steps, losses, color=RAW, linewidth=0.8, alpha=0.8, label="training, each step")
    name = "training" if window == 1 else f"training, mean of {window} steps"
    label = f"{name} (last {losses[-window:].mean():.3f})"
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, smooth(losses, window), color=TRAIN, linewidth=1.8, marker=marker, label=label)


def _draw_rate(axes: Any, steps: np.ndarray, rates: np.ndarray) -> None:
    axes.plot(steps, rates, color=RATE, linewidth=1.2)
    axes.set_ylabel("learning\nrate")
    axes.set_ylim(0, max(rates.max() * 1.15, 1e-12))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    style(axes)


def _limits(losses: np.ndarray, eval_losses: np.ndarray) -> tuple[float, float]:
    """A frame for the bulk of the curve: a few spikes may leave it, the beginning may not."""
    values = np.concatenate([losses, eval_losses])
    low = values.min()
    bulk = np.concatenate([np.sort(losses)[: max(1, int(0.995 * len(losses)))], losses[:1], eval_losses])
    high = bulk.max()
    margin = 0.05 * (high - low) or 0.1
    return float(low - margin), float(high + margin)


def _add_token_axis(axes: Any, metrics: Sequence[dict[str, Any]]) -> None:
    """Tokens seen so far along the top, where the file counts them at every step."""
    steps, tokens = column(metrics, "supervised_tokens")
    if len(steps) < 2:
        return
    seen = np.cumsum(tokens)
    if seen[-1] <= 0:
        return
    knots, counts = np.append(steps[0] - 1, steps), np.append(0.0, seen)
    top = axes.secondary_xaxis(
        "top",
        functions=(lambda step: _extend(step, knots, counts), lambda count: _extend(count, counts, knots)),
    )
    top.set_xlabel("supervised tokens", fontsize=9, color=RATE)
    top.tick_params(colors=RATE, labelsize=8)
    top.xaxis.set_major_formatter(lambda count, _: _short(count))
    top.spines["top"].set_visible(False)


def _extend(x: Any, knots: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Piecewise linear through the points, and on at the mean slope beyond them."""
    x = np.asarray(x, dtype=np.float64)
    slope = (values[-1] - values[0]) / max(knots[-1] - knots[0], 1e-9)
    inside = np.interp(x, knots, values)
    return inside + slope * (np.minimum(x - knots[0], 0) + np.maximum(x - knots[-1], 0))


def _short(count: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def style(axes: Any) -> None:
    """A light grid, and a frame on two sides."""
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def column(metrics: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [N], values [N]) of the lines that carry a finite `name`, by step; of a step run twice, the last."""
    by_step = {line["step"]: line[name] for line in metrics if isinstance(line.get(name), int | float)}
    columns = np.array(sorted(by_step.items()), dtype=np.float64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def save_figure(figure: Any, path: Path) -> Path:
    """Write `figure` as a PNG that has its name only when it is whole; returns `path`. EnvironmentFault on failure."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EnvironmentFault(f"{path}: {error.strerror}; choose another --output_dir") from error
    return path
