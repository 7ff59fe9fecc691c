"""`python -m llm_core.launch`: what scripts/msrun_launcher.sh and scripts/slurm_launch.sh call."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TextIO

from llm_core.errors import EnvironmentFault, UserError
from llm_core.launch import checks
from llm_core.launch.arguments import USAGE, Job, UsageError, parse
from llm_core.launch.gate import Stopped, meet
from llm_core.launch.group import Group, Outcome
from llm_core.launch.processes import StopSignals, write
from llm_core.launch.saves import Saves


def main(argv: Sequence[str]) -> int:
    """Launch, and wait; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        _show(sys.stdout, USAGE)
        return 0
    try:
        with ExitStack() as keep:
            return _launch(parse(argv, os.environ), keep)
    except UsageError as error:
        _show(sys.stderr, f"{error}\n{USAGE}")
        return 1
    except (UserError, EnvironmentFault) as error:
        _show(sys.stderr, f"{error}\n")
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:  # a full disk under LOG_DIR, say; nothing is left running
        _say(str(error))
        return 1
    except KeyboardInterrupt:  # before there was anything to stop
        return 130


def _launch(job: Job, keep: ExitStack) -> int:
    saves = Saves(checks.require_runnable(job, os.environ))
    address = checks.resolve(job)
    job = checks.reserve(job, keep)
    for note in job.notes:
        _say(note)
    stop = keep.enter_context(StopSignals())
    for start in range(job.restarts + 1):
        outcome = _once(job, address, stop, saves)
        for line in outcome.lines:
            _say(line)
        if not outcome.worth_another or stop.first is not None or start == job.restarts:
            break
        _say(f"start {start + 2} of at most {job.restarts + 1}")
    return outcome.code


def _once(job: Job, address: str, stop: StopSignals, saves: Saves) -> Outcome:
    try:
        links = meet(job, address, _say, lambda: stop.first, saves.any())
    except Stopped:
        return Outcome(128 + (stop.first or 0), ("stopped before anything was started",))
    if links.resume:
        job = job.resumed()
        _say("going on from the last whole checkpoint")
    where = f"node {job.node} of {job.nodes}, " if job.nodes > 1 else ""
    _say(f"{where}{job.local} processes; logs in {job.log_dir}; scheduler at {address}:{job.port}")
    return Group(job, address, links, stop).run()


def _say(line: str) -> None:
    _show(sys.stderr, (line if line.startswith(" ") else f"launcher: {line}") + "\n")


def _show(stream: TextIO | None, text: str) -> None:
    write(stream, text.encode(errors="replace"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
