"""What to do about a loss that is not a number, or that jumps: stop, skip the window, or roll back.

The update of such a window is never applied: the compiled step gets `loss_limit` and compares the loss with
it before it touches a weight, and a NaN fails every comparison.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

SKIP, ROLLBACK, STOP = "skip", "rollback", "stop"


class AnomalyPolicy:
    """Judges each window's loss.

    Args:
        nan: what to do about a loss that is not finite: stop, skip or rollback.
        spike: what to do about a loss above `spike_factor` times the mean of the last `spike_window` losses.
        spike_factor: 0 = spikes are not looked for.
        max_events: with more events than this in one run, stop whatever the policy says.
    """

    def __init__(
        self, *, nan: str = STOP, spike: str = SKIP, spike_factor: float = 0.0, spike_window: int = 50,
        max_events: int = 10,
    ) -> None:
        self.nan = nan
        self.spike = spike
        self.spike_factor = spike_factor
        self.max_events = max_events
        self.recent: deque[float] = deque(maxlen=spike_window)
        self.events = 0

    @property
    def loss_limit(self) -> float:
        """The loss above which a window is a spike; inf until half of the window has been seen."""
        if self.spike_factor <= 0 or len(self.recent) * 2 < (self.recent.maxlen or 0):
            return math.inf
        return self.spike_factor * sum(self.recent) / len(self.recent)

    def judge(self, loss: float) -> str | None:
        """None: the window is fine and its loss is remembered. Else what to do: stop, skip or rollback."""
        if not math.isfinite(loss):
            action = self.nan
        elif loss > self.loss_limit:
            action = self.spike
        else:
            self.recent.append(loss)
            return None
        self.events += 1
        return STOP if self.events > self.max_events else action

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would."""
        return {"recent": list(self.recent), "events": self.events}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.recent.clear()
        self.recent.extend(state["recent"])
        self.events = int(state["events"])
