"""Ctrl-C ends the answer, not the program.

A handler will not do: MindSpore puts its own, which ends the process, in place at every call of a graph. So SIGINT is
blocked while an answer is written, and asked for between two tokens. A signal that one thread blocks goes to another
that does not; therefore NumPy and MindSpore must be imported with SIGINT blocked, for their threads to inherit that.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_CAN_BLOCK = hasattr(signal, "pthread_sigmask")  # not on Windows, where Ctrl-C ends the program


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """SIGINT waits until the end of the block; threads that are started within never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if _CAN_BLOCK else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


with sigint_blocked():
    import numpy  # noqa: F401


class CtrlC:
    """A context in which Ctrl-C only sets `pressed`; calling the object looks whether it came.

    Outside the main thread it never comes. Behind the context it raises KeyboardInterrupt again.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._active = _CAN_BLOCK and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> CtrlC:
        if self._active:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        return self

    def __call__(self) -> bool:
        if self._active and signal.SIGINT in signal.sigpending():
            signal.sigwait({signal.SIGINT})
            self.pressed = True
        return self.pressed

    def __exit__(self, *_: object) -> None:
        self()
        if self._active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
