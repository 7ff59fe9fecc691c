"""Whether a run has saved since it was launched: a checkpoint of an earlier run in its folder is none of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_core.config.schema import RunConfig


def record_of(config: RunConfig) -> Path:
    """What a run writes anew when all its ranks have saved."""
    monitor = config.callback("CheckpointMonitor")
    folder = (monitor is not None and monitor.directory) or config.output_dir
    return Path(folder) / "checkpoint" / "rank_0" / "meta.json"


class Saves:
    """Looks at a record when it is made, and when it is asked; without one there is never a save."""

    def __init__(self, record: Path | None) -> None:
        self._record = record
        self._before = self._state()

    def any(self) -> bool:
        """Whether there was a save since this object was made."""
        return self._state() != self._before

    def _state(self) -> tuple[int, int, bytes] | None:
        try:
            status = self._record.stat() if self._record else None
            return (status.st_mtime_ns, status.st_ino, self._record.read_bytes()) if status else None
        except OSError:
            return None
