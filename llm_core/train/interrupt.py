"""SIGINT and SIGTERM ask for a stop at the end of the step; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """While installed, remembers the first stop signal instead of dying of it.

    Install it AFTER the first compile: MindSpore puts its own handlers in place while it compiles, and a
    Python handler set before would be replaced without a word.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def install(self) -> None:
        """Take over SIGINT and SIGTERM (in the main thread only; elsewhere Python cannot)."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if callable(handler) or isinstance(handler, int) else signal.SIG_DFL)
        self._previous = {}

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 + the signal's number."""
        return 128 + (self.signal or 0)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self.restore()
            signal.raise_signal(number)
        self.signal = number
