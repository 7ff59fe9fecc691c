"""Stop signals that wait until somebody asks for them.

A handler will not do: MindSpore puts its own, which ends the process, in place at every call of a graph. So a signal
is blocked while a step or an answer is made, and asked for in between. A signal that one thread blocks goes to another
that does not; therefore NumPy and MindSpore must be imported with the signals blocked, for their threads to inherit it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_CAN_BLOCK = hasattr(signal, "pthread_sigmask")  # not on Windows, where Ctrl-C ends the program


@contextmanager
def signals_blocked(*numbers: signal.Signals) -> Iterator[None]:
    """The signals wait until the end of the block; threads that are started within never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers) if _CAN_BLOCK else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


with signals_blocked(signal.SIGINT, signal.SIGTERM):
    import numpy  # noqa: F401


class StopSignals:
    """A context in which the signals only leave a note; calling the object looks for it.

    Outside the main thread they never come. Behind the context Ctrl-C raises KeyboardInterrupt again.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self.numbers = frozenset(numbers)
        self.received: signal.Signals | None = None
        self._active = _CAN_BLOCK and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopSignals:
        if self._active:
            signal.pthread_sigmask(signal.SIG_BLOCK, self.numbers)
        return self

    def __call__(self) -> bool:
        """Whether one of the signals came since the context began; `received` then says which."""
        return self.look()

    def look(self) -> bool:
        """The same, of this process alone."""
        if self._active and self.numbers & signal.sigpending():
            self.received = signal.Signals(signal.sigwait(self.numbers))
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 + the signal's number; 0 if none came."""
        return 128 + self.received if self.received is not None else 0

    def __exit__(self, *_: object) -> None:
        self.look()
        if self._active:
            if signal.SIGINT in self.numbers:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.numbers)
