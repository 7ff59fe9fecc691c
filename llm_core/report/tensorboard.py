"""The same numbers for TensorBoard (SummaryMonitor), by tensorboard's own event writer: no torch."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from llm_core.errors import EnvironmentFault, UserError


class TensorBoardLog:
    """An event file in `summary_dir`, which `tensorboard --logdir` reads.

    purge_step k (a resumed run): TensorBoard then drops what earlier event files hold from step k on.
    """

    def __init__(self, summary_dir: str | Path, purge_step: int | None = None) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise UserError(
                f"callbacks: SummaryMonitor needs the package tensorboard ({error}); install it with "
                "`pip install run-llm[tensorboard]` or `pip install tensorboard`, or remove SummaryMonitor"
            ) from error
        self._event, self._summary = Event, Summary
        self.summary_dir = Path(summary_dir)
        try:
            self.summary_dir.mkdir(parents=True, exist_ok=True)
            self._writer = EventFileWriter(str(self.summary_dir))
        except OSError as error:
            raise EnvironmentFault(f"{self.summary_dir}: cannot write TensorBoard events: {error.strerror}; "
                                   "set SummaryMonitor's summary_dir to a writable folder") from error
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, *, step: int, **values: Any) -> None:
        """Append the finite numbers among `values` as scalars; all else is left out."""
        scalars = []
        for name, value in values.items():
            value = value.item() if hasattr(value, "item") else value
            if isinstance(value, bool | int | float) and math.isfinite(value):
                scalars.append(self._summary.Value(tag=name, simple_value=float(value)))
        if scalars:
            summary = self._summary(value=scalars)
            self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Write what is buffered; call it with every checkpoint."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()
