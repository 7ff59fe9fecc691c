"""The one object through which a run speaks: `from llm_core.report.console import console`.

Where a line goes:
    result   stdout, always           an answer, a metric, a table: what the user asked for
    log      stdout, not with -q      the training log, one line a step
    info     stderr, not with -q      a note: what was mapped, loaded, written
    detail   stderr, only with -v
    warn     stderr, always
    error    stderr, always

Progress bars are drawn on stderr, and only on a terminal. Elsewhere (a file, a pipe, TERM=dumb) a loop prints
a plain line every tenth of the way instead. `log_to` copies every line into MindFormers' log files as well.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import IO, Any

from llm_core.errors import EnvironmentFault

QUIET, NORMAL, VERBOSE = -1, 0, 1

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}


def is_terminal(stream: IO[str]) -> bool:
    """True where a cursor can be moved: a terminal that is not TERM=dumb."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # the stream has been closed
        return False


def has_colour(stream: IO[str]) -> bool:
    """True where colours may be used: a terminal, and NO_COLOR is unset or empty (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def paint(text: str, colour: str, stream: IO[str] | None = None) -> str:
    """`text` in a colour (one of _COLOURS) if `stream` (default stdout) shows colours, else as it is."""
    if not has_colour(sys.stdout if stream is None else stream):
        return text
    return f"\033[{_COLOURS[colour]}m{text}\033[0m"


class Console:
    """See the module's docstring; the process has one instance, `console`."""

    def __init__(self) -> None:
        self.verbosity = NORMAL
        self._log_files: dict[str, IO[str]] = {}
        self._tqdm: Any = None  # our tqdm class, imported with the first bar

    def configure(self, verbosity: int) -> None:
        """-1 for -q (results, warnings and errors only), 0, or 1 for -v (details too)."""
        self.verbosity = verbosity

    def log_to(self, output_dir: str | Path, rank: int = 0) -> None:
        """Also append every line to output_dir/log/rank_{rank}/info.log; errors to error.log too."""
        self.close_logs()
        folder = Path(output_dir) / "log" / f"rank_{rank}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("info", "error"):
                self._log_files[name] = open(folder / f"{name}.log", "a", encoding="utf-8", buffering=1)
        except OSError as error:
            self.close_logs()
            raise EnvironmentFault(f"{folder}: cannot write the log files: {error.strerror}; "
                                   "choose another --output_dir") from error

    def close_logs(self) -> None:
        """End what `log_to` began."""
        for file in self._log_files.values():
            file.close()
        self._log_files = {}

    def result(self, line: str = "") -> None:
        """What the user asked for: an answer, a metric, a table. stdout, even with -q."""
        self._write(sys.stdout, line, "INFO")

    def log(self, line: str) -> None:
        """A line of the training log. stdout; -q hides it (the log file has it all the same)."""
        self._write(sys.stdout if self.verbosity >= NORMAL else None, line, "INFO")

    def info(self, line: str) -> None:
        """A note beside the results. stderr; -q hides it."""
        self._write(sys.stderr if self.verbosity >= NORMAL else None, line, "INFO")

    def detail(self, line: str) -> None:
        """A note for those who asked with -v. stderr."""
        if self.verbosity >= VERBOSE:
            self._write(sys.stderr, line, "DEBUG")

    def warn(self, line: str) -> None:
        """Something the user should look at, though the run goes on. stderr."""
        self._write(sys.stderr, line, "WARNING", paint("warning:", "yellow", sys.stderr) + " ")

    def error(self, line: str) -> None:
        """Why the run ends. stderr."""
        self._write(sys.stderr, line, "ERROR", paint("error:", "red", sys.stderr) + " ")

    def record_error(self, line: str) -> None:
        """Write `line` into the log files alone; it is shown elsewhere."""
        if self._log_files:
            self._write_logs(line, "ERROR")

    def progress(
        self,
        iterable_or_total: Iterable | int | None = None,
        desc: str = "",
        unit: str = "it",
        initial: int = 0,
    ) -> Any:
        """A progress bar over an iterable, or over a number of units that `update(n)` counts (None: unknown).

        Returns a tqdm on a terminal and a `PlainProgress` elsewhere; both iterate, work as context managers,
        and have update(n), set_postfix_str(text), close(), n and total. `initial` units were done before.
        """
        iterable, total = _iterable_and_total(iterable_or_total)
        if self.verbosity < NORMAL or not is_terminal(sys.stderr):
            return PlainProgress(self, iterable, total, desc, unit, initial)
        if self._tqdm is None:
            self._tqdm = _bar_class()
        size = {"dynamic_ncols": True} if _columns(sys.stderr) else {"ncols": 80, "nrows": 24}
        return self._tqdm(
            iterable, total=total, desc=desc, unit=unit, initial=initial, file=sys.stderr, **size
        )

    def _write(self, stream: IO[str] | None, line: str, level: str, mark: str = "") -> None:
        if stream is not None:
            if self._tqdm is not None and self._tqdm.is_drawn() and is_terminal(stream):
                self._tqdm.write(mark + line, file=stream)  # takes the bars away, writes, draws them again
            else:
                _print(stream, mark + line)
        if self._log_files:
            self._write_logs(line, level)

    def _write_logs(self, line: str, level: str) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f",{int(now % 1 * 1000):03d}"
        entry = f"{stamp} - llm_core - {level} - {line}\n"
        try:
            self._log_files["info"].write(entry)
            if level == "ERROR":
                self._log_files["error"].write(entry)
        except OSError:
            pass  # a full disk must not end a training for the sake of its log; saving will report it


class PlainProgress:
    """Progress for those who read a file: one line every tenth of the way (of an unknown way: every 30 s).

    Never two lines within two seconds, but for the last one, so that a quick loop says one line in all.
    """

    MIN_SECONDS = 2.0
    UNKNOWN_TOTAL_SECONDS = 30.0

    def __init__(
        self,
        console: Console,
        iterable: Iterable | None,
        total: int | None,
        desc: str,
        unit: str,
        initial: int,
    ) -> None:
        self.total = total
        self.n = initial
        self._console, self._iterable, self._desc, self._unit = console, iterable, desc, unit
        self._initial = initial
        self._postfix = ""
        self._start = self._last_time = time.monotonic()
        self._last_n = initial
        self._closed = False

    def __iter__(self) -> Iterator:
        if self._iterable is None:
            raise TypeError("this progress counts units by update(n); it has nothing to iterate over")
        try:
            for item in self._iterable:
                yield item
                self.update(1)
        finally:
            self.close()

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count `n` more units."""
        self.n += n
        now = time.monotonic()
        wait = self.MIN_SECONDS if self.total else self.UNKNOWN_TOTAL_SECONDS
        if now - self._last_time < wait or (self.total and 10 * (self.n - self._last_n) < self.total):
            return
        self._say(now)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Text that the next line ends with."""
        self._postfix = text

    def close(self) -> None:
        """Say where the loop ended, once."""
        if not self._closed and self.n > self._last_n:
            self._say(time.monotonic())
        self._closed = True

    def _say(self, now: float) -> None:
        self._last_time, self._last_n = now, self.n
        seconds = max(now - self._start, 1e-9)
        of_total = f"/{self.total} ({100 * self.n // self.total}%)" if self.total else ""
        line = f"{self._desc + ': ' if self._desc else ''}{self.n}{of_total} {self._unit}"
        line += f", {seconds:.0f} s, {(self.n - self._initial) / seconds:.3g} {self._unit}/s"
        self._console.info(line + (f", {self._postfix}" if self._postfix else ""))


def _iterable_and_total(iterable_or_total: Iterable | int | None) -> tuple[Iterable | None, int | None]:
    if iterable_or_total is None or isinstance(iterable_or_total, int):
        return None, iterable_or_total
    total = len(iterable_or_total) if isinstance(iterable_or_total, Sized) else None
    return iterable_or_total, total


def _columns(stream: IO[str]) -> int:
    """The terminal's width; 0 where none is set (recorders, CI), on which tqdm would draw nothing."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def _bar_class() -> Any:
    """tqdm without its two surprises: a watching thread, and a multiprocessing lock made at the first bar."""
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0

        @classmethod
        def is_drawn(cls) -> bool:
            return bool(getattr(cls, "_instances", None))

    Bar.set_lock(threading.RLock())
    return Bar


def _print(stream: IO[str], line: str) -> None:
    try:
        stream.write(line + "\n")
    except UnicodeEncodeError:  # a terminal of another encoding: show what it can show
        encoding = stream.encoding or "ascii"
        stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
    stream.flush()


console = Console()
