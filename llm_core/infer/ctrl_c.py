"""Ctrl-C ends the answer, not the program; pressed again at once, it ends the program."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class CtrlC:
    """A context in which SIGINT only sets a flag; calling the object tells whether it came.

    MindSpore installs its own handler whenever it compiles a graph, so every call puts ours back (a microsecond).
    Outside the main thread, where Python cannot set handlers, the flag just stays down.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._in_main_thread = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> CtrlC:
        self()
        return self

    def __call__(self) -> bool:
        if self._in_main_thread:
            signal.signal(signal.SIGINT, self._press)
        return self.pressed

    def __exit__(self, *_: object) -> None:
        if self._in_main_thread:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
