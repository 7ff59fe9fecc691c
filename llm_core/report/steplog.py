"""MindFormers' training log, so that its readers find what they know: one line a step, then a bar line.

Upstream's form, field by field (MFLossMonitor with data sinking, 1.2 to 1.9):
    { Epoch:[  2/  2], step:[   12/   16], loss: 3.619, per_step_time: 88ms, lr: 5.903933e-05, ...
      87.5% |███████████████████████████████████████████       | 45.45455 samples/s/p  0:00:00 }
Pure functions: no clock, no printing.
"""

from __future__ import annotations

import datetime
import math

BAR_WIDTH = 50


def format_step_line(
    *,
    epoch: int,
    epochs: int,
    step: int,
    steps_per_epoch: int,
    loss: float,
    step_ms: float,
    lr: float,
    overflow: bool = False,
    loss_scale: float | None = None,
    global_norm: float | None = None,
    tflops: float | None = None,
) -> str:
    """The step line. `epoch` and `step` count from 1 (`step` within the epoch).

    loss_scale None means that nothing scales the loss; global_norm None that nobody computed the norm
    (upstream says `unavailable` and `None`). tflops: model TFLOP/s per device, left out when None.
    """
    throughput = "" if tflops is None else f", train_throughput_per_npu: {tflops:.3f}T"
    scale = "unavailable" if loss_scale is None else _as_float32(loss_scale)
    norm = "None" if global_norm is None else f"[{_as_float32(global_norm)}]"
    return (
        f"{{ Epoch:[{epoch:3d}/{epochs:3d}], step:[{step:5d}/{steps_per_epoch:5d}], loss: {loss:5.3f}, "
        f"per_step_time: {int(step_ms)}ms, lr: {_as_float32(lr)}, overflow cond: {bool(overflow)}, "
        f"loss_scale: {scale}, global_norm: {norm}{throughput}"
    )


def format_bar_line(*, done: int, total: int, samples_per_second: float, seconds_left: float) -> str:
    """The bar line that closes the step line's brace.

    `done` of `total` steps of the whole run; samples_per_second is per device; seconds_left is printed as
    [D day[s], ]H:MM:SS.
    """
    percent = 100.0 * done / max(total, 1)
    bar = "█" * int(BAR_WIDTH * percent / 100)
    left = datetime.timedelta(seconds=int(seconds_left)) if math.isfinite(seconds_left) else "?"
    return f"  {percent:4.1f}% |{bar:<{BAR_WIDTH}}| {samples_per_second:.5f} samples/s/p  {left} }}"


def _as_float32(value: float) -> str:
    """As numpy prints a float32, near enough: seven digits, and a point or an exponent (65536.0, 1e-05)."""
    text = f"{value:.7g}"
    if math.isfinite(value) and "e" not in text and "." not in text:
        text += ".0"
    return text
