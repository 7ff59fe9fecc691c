"""What to tell of processes that failed: which ranks, why, and the last lines of their logs."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

_LINES = 20
_TAIL_BYTES = 64 * 1024
# MindSpore's own words: of the scheduler about a silent rank, and of a collective that nobody else has come to.
_WAITED = re.compile(r"timed out node|wait receiving .* failed|AllReduce\w* launch failed|ollective .*time")

_GONE = re.compile(r"rank \d+ has ended; its log says why$")


def exit_code(status: int) -> int:
    """The shell's code of a process' status, which is negative for a signal (as `Popen.returncode`)."""
    return 128 - status if status < 0 else status


def cause(status: int, log: Path) -> str:
    """Why a process ended: its signal, or its code and the last exception in its log, else the log's last line."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        why = ": by somebody, or by the system for want of memory" if status == -signal.SIGKILL else ""
        return f"was killed by {name}{why}"
    lines = last_lines(log, 200)
    if not lines:
        return f"ended with code {status}"
    errors = [number for number, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Fault)\b", line)]
    found = lines[errors[-1]] if errors else lines[-1]
    if errors and found.endswith(":"):  # MindSpore's, whose text follows below a headline
        found += "".join([f" {line}" for line in lines[errors[-1] + 1 :] if not line.startswith("-")][:1])
    return f"ended with code {status}: {found[:300]}"


def last_lines(path: Path, count: int = _LINES) -> list[str]:
    """The last lines of a log that hold anything, less what MindSpore's C++ only remarks; none if there is no log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = (line.rstrip() for line in re.split(r"[\r\n]+", text))
    return [line for line in lines if line and not re.match(r"\[(INFO|WARNING)\] \w+\(", line)][-count:]


def waited(log: Path) -> bool:
    """Whether a process failed because another one did not come to a collective, or no longer answered."""
    return any(_WAITED.search(line) for line in last_lines(log, 200))


def ended_by_another(status: int, log: Path) -> bool:
    """Whether a rank of ours failed because another one had ended, as parallel/gate.py tells it."""
    return status == 1 and any(_GONE.search(line) for line in last_lines(log, 200))


def not_joined(scheduler_log: Path, ranks: int) -> list[int]:
    """The ranks that MindSpore's scheduler has waited for in vain; none unless its time was up."""
    try:
        text = scheduler_log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    if "Failed to initialize cluster" not in text:
        return []
    joined = {int(rank) for rank in re.findall(r"rank id: (\d+),.* is registered successfully", text)}
    return [rank for rank in range(ranks) if rank not in joined]


def quote(path: Path, count: int = _LINES) -> list[str]:
    """Lines that show the end of a log."""
    lines = last_lines(path, count)
    if not lines:
        return [f"  {path} is empty"]
    return [f"  the last lines of {path}:", *(f"    {line}" for line in lines)]


def rank_list(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-2 and 7`."""
    ordered = sorted(ranks)
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    joined = " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
    return f"rank {joined}" if len(ordered) == 1 else f"ranks {joined}"
