"""The story of a training run: epochs, windows of micro-batches, and what happens between two steps."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_core.checkpoint.store import CheckpointStore
from llm_core.data.batch import Batch, shift
from llm_core.data.loader import Loader
from llm_core.errors import EnvironmentFault, UserError
from llm_core.report.console import console, is_terminal
from llm_core.report.metrics import MetricsLog
from llm_core.report.steplog import format_bar_line, format_step_line
from llm_core.signals import StopSignals
from llm_core.train.anomaly import ROLLBACK, STOP, AnomalyPolicy
from llm_core.train.loss_scale import LossScale
from llm_core.train.timeline import OperatorProfile, Timeline

if TYPE_CHECKING:  # they import MindSpore, which has to be set up first
    from llm_core.parallel.comm import Comm
    from llm_core.train.parallel_step import ParallelStepper
    from llm_core.train.step import Stepper, StepResult

DRAW_SECONDS = 30.0  # between two drawings of loss.png during a run; the end draws one in any case


@dataclass
class Cursor:
    """Where a run stands. Everything here goes into a checkpoint's state and comes back from it."""

    epoch: int = 0  # 0-based
    batch: int = 0  # micro-batches of this epoch that have been used
    step: int = 0  # windows done, skipped ones included; the learning rate follows it
    updates: int = 0  # updates applied; Adam's t
    tokens: int = 0  # supervised tokens trained on
    barred: list[int] = field(default_factory=list)  # steps that a rollback leaves out when it meets them again


@dataclass(frozen=True)
class Intervals:
    """How often things happen, in steps; 0 = never."""

    print: int = 1
    save: int = 0
    evaluate: int = 0
    evaluate_epochs: int = 0
    sample: int = 0
    save_evaluated: bool = False  # save after every evaluation, for keep_best
    save_last: bool = False  # save when the run ends
    save_seconds: float = 0  # above 0: seconds between two saves, instead of steps


@dataclass
class Run:
    """The parts of one training run, built by `llm_core.train.run`."""

    title: str
    stepper: Stepper | ParallelStepper
    loader: Loader
    schedule: Callable[[int], float]  # 0-based step -> learning rate
    loss_scale: LossScale
    anomaly: AnomalyPolicy
    metrics: MetricsLog | None  # None: another rank reports
    intervals: Intervals
    epochs: int
    total_steps: int
    pad_token_id: int
    ignore_token_id: int
    flops_per_sample: float
    store: CheckpointStore
    snapshot: Callable[[], dict[str, np.ndarray]]  # weights and optimizer state by name
    load: Callable[[dict[str, np.ndarray]], None]  # the reverse
    settings: dict[str, Any]  # what a resumed run must have in common with this one
    comm: Comm | None = None  # with the other ranks; None: there are none
    adapter: dict[str, Any] | None = None  # how the trained adapter is made; None = all weights are trained
    trainable: frozenset[str] | None = None  # names of weights to be saved alone as well
    evaluate: Callable[[], dict[str, float]] | None = None  # -> figures for the metrics file, eval_loss among them
    sample: Callable[[], None] | None = None
    on_step: Callable[[int, dict[str, float]], None] | None = None  # TensorBoard
    operators: OperatorProfile | None = None
    cursor: Cursor = field(default_factory=Cursor)
    timeline: Timeline = field(default_factory=Timeline)
    stop: StopSignals = field(default_factory=lambda: StopSignals(signal.SIGINT, signal.SIGTERM))
    saved_step: int = -1
    newest: Path | None = None  # this run's last checkpoint, or the one it resumed from: what a rollback goes back to
    saved_at: float = field(default_factory=time.monotonic)
    drawn_at: float = field(default_factory=time.monotonic)
    window_began: float = 0.0  # on time.perf_counter's clock, before its data were asked for
    compiled: bool = False
    recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    @property
    def steps_per_epoch(self) -> int:
        """Windows in an epoch, the last partial one included."""
        return math.ceil(self.loader.steps_per_epoch / self.stepper.accumulation)

    @property
    def ranks(self) -> int:
        """That the work is shared by."""
        return 1 if self.comm is None else self.comm.layout.world

    @property
    def replicas(self) -> int:
        """Ranks that share the rows of every batch."""
        return 1 if self.comm is None else self.comm.layout.dp

    def place(self, step: int) -> tuple[int, int]:
        """The epoch and the step in it, both from 1, of the 1-based step."""
        epoch, step_in_epoch = divmod(max(step, 1) - 1, self.steps_per_epoch)
        return epoch + 1, step_in_epoch + 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the tensors (JSON)."""
        state = {
            "cursor": asdict(self.cursor),
            "loss_scale": self.loss_scale.state_dict(),
            "anomaly": self.anomaly.state_dict(),
            "settings": self.settings,
            "records_per_batch": self.loader.batch_size * self.replicas,
        }
        return state if self.adapter is None else {**state, "adapter": self.adapter}


class _RolledBack(Exception):
    """The run stands at an older checkpoint again; the loop starts over from its cursor."""


class _Stopped(Exception):
    """The run ends early, its state saved, with this exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


def fit(run: Run) -> int:
    """Train until the end, a stop signal, or an anomaly that the policy stops at; returns the exit code."""
    try:
        with run.stop:
            while True:
                try:
                    _train(run)
                    return 0
                except _RolledBack:
                    continue
    except _Stopped as stopped:
        return stopped.code
    except UserError:  # a damaged record, say: what has been trained until then is not lost
        if run.cursor.step > 0 and run.comm is None:  # of several ranks the others know nothing of it
            save(run)
            console.warn(f"stopped after step {run.cursor.step}, all is saved")
        raise
    finally:
        if run.operators is not None:
            run.operators.after(math.inf)
        if run.metrics is not None:
            _plot(run)
            run.metrics.close()


def _train(run: Run) -> None:
    cursor = run.cursor
    if run.comm is not None:
        run.comm.gate()  # to restore a checkpoint takes ranks unequal times
    with _bar(run) as bar:
        while cursor.step < run.total_steps:
            for window in _windows(run):
                if cursor.step + 1 in cursor.barred:
                    console.warn(f"step {cursor.step + 1} is left out: the run was rolled back because of it")
                else:
                    _step(run, window, bar)
                _advance(run, len(window))
                if bar is not None:
                    bar.update(1)
                _between_steps(run)
                if cursor.step >= run.total_steps:
                    break
    if run.intervals.save_last:
        save(run)


def _bar(run: Run) -> Any:
    """A bar under the log lines on a terminal; elsewhere nothing, since those lines show the progress themselves."""
    if is_terminal(sys.stderr):
        return console.progress(run.total_steps, desc="train", unit="step", initial=run.cursor.step)
    return contextlib.nullcontext()


def _windows(run: Run) -> Iterator[list[Batch]]:
    """The rest of the cursor's epoch, in windows of up to `accumulation` micro-batches."""
    batches = run.loader.epoch(run.cursor.epoch, run.cursor.batch)
    try:
        while True:
            run.window_began = time.perf_counter()
            with run.timeline.span("data", run.cursor.step + 1):
                window = list(itertools.islice(batches, run.stepper.accumulation))
            if not window:
                return
            yield window
    finally:
        batches.close()  # ends the loader's prefetching thread, also when the run stops mid-epoch


def _step(run: Run, window: Sequence[Batch], bar: Any) -> None:
    """Train on one window, judge its loss, report it."""
    cursor = run.cursor
    lr = run.schedule(cursor.step)
    scale = run.loss_scale.value
    if run.operators is not None:
        run.operators.before(cursor.step + 1)
    with run.timeline.span("compute", cursor.step + 1):
        result = run.stepper.run(
            [shift(batch, run.pad_token_id, run.ignore_token_id) for batch in window],
            lr=lr, scale=scale, update=cursor.updates + 1, step=cursor.step, loss_limit=run.anomaly.loss_limit,
        )
    if run.operators is not None:
        run.operators.after(cursor.step + 1)
    overflow = not math.isfinite(result.norm)
    run.loss_scale.update(overflow)
    # A gradient that overflows although nothing is left to scale down is as bad as a loss that is NaN.
    hopeless = overflow and run.loss_scale.value == scale
    action = run.anomaly.judge(math.nan if hopeless else result.loss)
    if action is not None:
        _react(run, window, result, action)
    if result.applied:
        cursor.updates += 1
        cursor.tokens += result.tokens
    seconds = time.perf_counter() - run.window_began
    samples = run.replicas * sum(len(batch.input_ids) for batch in window)
    _report(run, result, lr, scale, overflow, seconds, samples, bar)


def _react(run: Run, window: Sequence[Batch], result: StepResult, action: str) -> None:
    """Follow the anomaly policy; the window's update has not been applied."""
    step = run.cursor.step + 1
    records = ", ".join(str(number) for batch in window for number in batch.record_ids[:8] if number >= 0)
    what = (
        f"step {step}: loss {result.loss:.4g}, gradient norm {result.norm:.4g}, from records {records}"
        f"{' ...' if any(len(batch.record_ids) > 8 for batch in window) else ''}"
    )
    if action == ROLLBACK and run.newest is not None:
        barred = [*run.cursor.barred, step]
        restore(run, *run.store.read(run.newest)[:2], events=run.anomaly.events)
        run.cursor.barred = barred
        console.warn(f"{what}: rolled back to step {run.cursor.step}; this window will be left out")
        raise _RolledBack
    if action == STOP:
        save(run)
        console.error(
            f"{what}: stopped before the update, the weights are those of step {run.cursor.step}. Look at the "
            "records (run_llm.py show-data FILE --start N), lower the learning rate, or set anomaly.nan or "
            "anomaly.spike to skip"
        )
        raise _Stopped(1)
    console.warn(f"{what}: skipped" + (" (no checkpoint to roll back to)" if action == ROLLBACK else ""))


def _advance(run: Run, batches: int) -> None:
    """Move the cursor past a window."""
    cursor = run.cursor
    cursor.step += 1
    cursor.batch += batches
    if cursor.batch >= run.loader.steps_per_epoch:
        cursor.epoch, cursor.batch = cursor.epoch + 1, 0


def _report(
    run: Run, result: StepResult, lr: float, scale: float, overflow: bool, seconds: float, samples: int, bar: Any
) -> None:
    """MindFormers' log line, the bar, and a line in metrics.jsonl."""
    step = run.cursor.step + 1
    epoch, step_in_epoch = run.place(step)
    if run.compiled:  # the first step compiles: its time says nothing about the others
        run.recent_seconds.append(seconds)
    run.compiled = True
    mean_seconds = statistics.fmean(run.recent_seconds or [seconds])
    values = {
        "epoch": epoch, "loss": result.loss, "lr": lr, "loss_scale": scale, "overflow": overflow,
        "global_norm": result.norm, "step_ms": 1e3 * seconds, "tokens_per_s": result.tokens / seconds,
        "supervised_tokens": result.tokens,
    }
    if run.metrics is not None:
        run.metrics.write(step=step, **values)
    if run.on_step is not None:
        run.on_step(step, values)
    if bar is not None:
        bar.set_postfix_str(f"loss {result.loss:.3f}")
    if step % run.intervals.print == 0 or step == run.total_steps:
        line = format_step_line(
            epoch=epoch, epochs=run.epochs, step=step_in_epoch, steps_per_epoch=run.steps_per_epoch, loss=result.loss,
            step_ms=1e3 * seconds, lr=lr, overflow=overflow, loss_scale=scale, global_norm=result.norm,
            tflops=run.flops_per_sample * samples / seconds / 1e12 / run.ranks,
        )
        left = format_bar_line(
            done=step, total=run.total_steps, samples_per_second=samples / seconds / run.ranks,
            seconds_left=mean_seconds * (run.total_steps - step),
        )
        console.log(line)
        if bar is None:
            console.log(left)


def _between_steps(run: Run) -> None:
    """Evaluation, samples, checkpoints and stop signals, in this order, so that a save knows the newest loss."""
    step, intervals = run.cursor.step, run.intervals
    epoch_ended = run.cursor.batch == 0
    metric = None
    if run.evaluate is not None and (
        _due(step, intervals.evaluate) or (epoch_ended and _due(run.cursor.epoch, intervals.evaluate_epochs))
    ):
        with run.timeline.span("evaluate", step):
            figures = run.evaluate()
        metric = figures["eval_loss"]
        if run.metrics is not None:
            run.metrics.write(step=step, **figures)
    if run.sample is not None and _due(step, intervals.sample):
        with run.timeline.span("sample", step):
            run.sample()
    if _save_is_due(run) or (metric is not None and intervals.save_evaluated):
        save(run, metric)
    if step < run.total_steps and run.stop():  # behind the last step the run ends as it would have
        save(run)
        name = run.stop.received.name
        console.warn(f"{name}: stopped after step {step}, all is saved; --resume_training True goes on from here")
        raise _Stopped(run.stop.exit_code)


def _save_is_due(run: Run) -> bool:
    if run.intervals.save_seconds > 0:
        due = time.monotonic() - run.saved_at >= run.intervals.save_seconds
        return due if run.comm is None else run.comm.any(due)
    return _due(run.cursor.step, run.intervals.save)


def _due(count: int, interval: int) -> bool:
    return interval > 0 and count % interval == 0


def save(run: Run, metric: float | None = None) -> None:
    """Write a checkpoint of the whole state, unless this step has one already, or no step has been made."""
    if run.cursor.step == 0 or (run.saved_step == run.cursor.step and metric is None):
        return
    epoch, step_in_epoch = run.place(run.cursor.step)
    with run.timeline.span("save", run.cursor.step):
        run.newest = run.store.save(epoch, step_in_epoch, run.snapshot(), run.state(), metric, run.trainable)
        run.saved_step, run.saved_at = run.cursor.step, time.monotonic()
    # A plot takes up to a second, and a save may come every step.
    if run.metrics is not None and time.monotonic() - run.drawn_at > DRAW_SECONDS:
        _plot(run)


def restore(run: Run, tensors: dict[str, np.ndarray], state: dict[str, Any], events: int | None = None) -> None:
    """Put a checkpoint's tensors and state back; `events` keeps the anomaly count of a run that rolls back."""
    run.load(tensors)
    run.cursor = Cursor(**state["cursor"])
    batch = run.loader.batch_size * run.replicas  # under another layout a batch may hold more or fewer records
    saved = state.get("records_per_batch", state["settings"].get("batch_size", batch))
    run.cursor.batch = run.cursor.batch * saved // batch
    run.loss_scale.load_state_dict(state["loss_scale"])
    run.anomaly.load_state_dict(state["anomaly"])
    if events is not None:
        run.anomaly.events = events
    run.saved_step = run.cursor.step


def _plot(run: Run) -> None:
    """loss.png; a picture that cannot be drawn must not end a training."""
    run.drawn_at = time.monotonic()
    try:
        run.metrics.plot(run.title)
    except (OSError, EnvironmentFault, UserError) as error:
        console.warn(f"loss.png was not drawn: {error}")
