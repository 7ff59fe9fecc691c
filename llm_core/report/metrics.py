"""What a run measured: metrics.jsonl, one JSON object a line, and the plot made from it, loss.png.

A line is one write to the file, so a killed process leaves at most one torn line, which the next run drops.
"""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from llm_core.errors import EnvironmentFault, UserError

METRICS_NAME = "metrics.jsonl"
PLOT_NAME = "loss.png"


class MetricsLog:
    """metrics.jsonl of one run.

    resume_step None: a new run; a file of an earlier one is kept as metrics-1.jsonl, -2, ...
    resume_step k: the run goes on after step k; whole lines up to k stay, everything later goes, since those
    steps will be run again.
    """

    def __init__(self, output_dir: str | Path, resume_step: int | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.path = self.output_dir / METRICS_NAME
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                _set_aside(self.path)
            else:
                _keep_up_to(self.path, resume_step)
            self._descriptor: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise _fault(self.path, error) from error

    def write(self, *, step: int, **values: Any) -> None:
        """Append one line.

        The names in use: epoch, loss, lr, loss_scale, overflow, global_norm, step_ms, tokens_per_s,
        supervised_tokens (of this step), eval_loss, ppl, and of a classifier accuracy and f1. NaN and
        infinity, which JSON lacks, are written as null; None is left out. Numpy scalars are fine.
        """
        if self._descriptor is None:
            raise ValueError(f"{self.path} has been closed")
        line = {"step": int(step)}
        line |= {name: _plain(value) for name, value in values.items() if value is not None}
        content = (json.dumps(line) + "\n").encode()
        try:
            size = os.fstat(self._descriptor).st_size
            if os.write(self._descriptor, content) < len(content):  # a disk that is just becoming full
                os.ftruncate(self._descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _fault(self.path, error) from error

    def plot(self, title: str = "") -> Path | None:
        """Draw loss.png from everything in the file; None when the file holds no loss yet."""
        from llm_core.report.plot import draw_losses

        return draw_losses(read_metrics(self.path), self.output_dir / PLOT_NAME, title)

    def close(self) -> None:
        """Close the file; further writes are an error."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order; a torn last one is left out, a bad one is a UserError."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _fault(path, error) from error
    return [entry for entry, _ in _whole_lines(path, content)]


def _whole_lines(path: Path, content: bytes) -> list[tuple[dict[str, Any], bytes]]:
    lines = content.split(b"\n")[:-1]  # what follows the last newline is empty or torn
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, KeyError, TypeError):
            step = None
        if not isinstance(step, int):
            raise UserError(f"{path}:{number}: not a line of a metrics file (a JSON object with a step); "
                            "move the file away and start again")
        parsed.append((entry, line + b"\n"))
    return parsed


def _set_aside(path: Path) -> None:
    """Rename the file of an earlier run to the first free metrics-N.jsonl."""
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)


def _keep_up_to(path: Path, step: int) -> None:
    """Rewrite the file with its whole lines of steps <= `step`, by way of a temporary file."""
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b"".join(line for entry, line in _whole_lines(path, content) if entry["step"] <= step)
    if kept == content:
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """Numpy scalars as Python's; a number that is not finite as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _fault(path: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(f"{path}: {error.strerror}; free space there or choose another --output_dir")
