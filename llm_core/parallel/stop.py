"""Stop signals of ranks that compute together: all of them stop at the same place, or none."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from llm_core.signals import StopSignals

if TYPE_CHECKING:
    from llm_core.parallel.comm import Comm, Group


class StopTogether(StopSignals):
    """As `StopSignals` of SIGINT and SIGTERM, of all ranks of a group: a signal that one has got stops them all."""

    def __init__(self, comm: Comm, group: Group | None = None) -> None:
        """group: default all ranks of the run."""
        super().__init__(signal.SIGINT, signal.SIGTERM)
        self._comm, self._group = comm, group

    def __call__(self) -> bool:
        """As `StopSignals`; to be asked by all ranks of the group together."""
        self.look()
        told = self._comm.sum([self.received == number for number in sorted(self.numbers)], self._group)
        for number, ranks in zip(sorted(self.numbers), told, strict=True):
            if ranks:
                self.received = number
        return self.received is not None
