"""Where a run's time goes: named spans on one clock, and the operators of a few steps, as tables and traces.

Traces are trace-event files, for chrome://tracing or Perfetto.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Timeline:
    """Collects (name, begin, end) spans; keeps them all only when `keep` (a profile was asked for)."""

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.origin = time.perf_counter()
        self.spans: list[tuple[str, float, float, int]] = []  # name, begin s, end s, step
        self.totals: dict[str, float] = defaultdict(float)  # seconds by name
        self.counts: dict[str, int] = defaultdict(int)

    @contextmanager
    def span(self, name: str, step: int = 0) -> Iterator[None]:
        """Measure a block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.totals[name] += end - begin
            self.counts[name] += 1
            if self.keep:
                self.spans.append((name, begin - self.origin, end - self.origin, step))

    def table(self) -> list[str]:
        """One line a span name: total seconds, share of all, milliseconds a call."""
        total = sum(self.totals.values()) or 1.0
        lines = [f"{'phase':<14}{'seconds':>10}{'share':>8}{'calls':>8}{'ms/call':>10}"]
        for name, seconds in sorted(self.totals.items(), key=lambda item: -item[1]):
            calls = self.counts[name]
            lines.append(f"{name:<14}{seconds:>10.2f}{seconds / total:>8.1%}{calls:>8}{1e3 * seconds / calls:>10.1f}")
        return lines

    def write(self, path: Path) -> None:
        """The kept spans as a trace-event file (open it in chrome://tracing or Perfetto)."""
        rows = {name: row for row, name in enumerate(dict.fromkeys(span[0] for span in self.spans))}
        events = [
            {"name": name, "ph": "X", "ts": round(begin * 1e6), "dur": round((end - begin) * 1e6), "pid": os.getpid(),
             "tid": rows[name], "args": {"step": step}}
            for name, begin, end, step in self.spans
        ]
        names = [
            {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": row, "args": {"name": name}}
            for name, row in rows.items()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"traceEvents": names + events}))
        partial.replace(path)


class OperatorProfile:
    """MindSpore's own profile of steps `first` to `last`, in `folder`: which operator took how long."""

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self.folder = folder
        self.first, self.last = first, max(last, first)
        self._profile: Any = None

    def before(self, step: int) -> None:
        """To be called before each step."""
        if step == self.first:
            from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler

            self._profile = profile(
                activities=[ProfilerActivity.CPU], on_trace_ready=tensorboard_trace_handler(str(self.folder))
            )
            self._profile.start()

    def after(self, step: float) -> None:
        """To be called after each step, and with step = inf when the run ends."""
        if self._profile is not None and step >= self.last:
            self._profile.stop()
            self._profile = None

    def table(self, rows: int = 12) -> list[str]:
        """The operators that took longest; empty when there was nothing to profile."""
        files = sorted(self.folder.glob("*/FRAMEWORK/cpu_op_type_info_*.csv"))
        if not files:
            return []
        with open(files[-1], newline="") as file:
            operators = list(csv.DictReader(file))
        operators.sort(key=lambda row: -float(row["total_compute_time"]))
        total = sum(float(row["total_compute_time"]) for row in operators) or 1.0
        lines = [f"{'operator':<36}{'calls':>8}{'ms in all':>12}{'share':>8}"]
        for row in operators[:rows]:
            spent = float(row["total_compute_time"])
            calls = int(row["type_occurrences"])
            lines.append(f"{row['op_type']:<36}{calls:>8}{spent:>12.1f}{spent / total:>8.1%}")
        return lines
