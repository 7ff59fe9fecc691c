"""`python -m llm_core.launch`: what scripts/msrun_launcher.sh and scripts/slurm_launch.sh call."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from llm_core.errors import EnvironmentFault, UserError
from llm_core.launch import checks
from llm_core.launch.arguments import USAGE, Job, UsageError, parse
from llm_core.launch.gate import Stopped, meet
from llm_core.launch.group import Group, Outcome
from llm_core.launch.processes import StopSignals, write


def main(argv: Sequence[str]) -> int:
    """Launch, and wait; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        print(USAGE, end="")
        return 0
    try:
        with ExitStack() as keep:
            return _launch(parse(argv, os.environ), keep)
    except UsageError as error:
        print(f"{error}\n{USAGE}", end="", file=sys.stderr)
        return 1
    except (UserError, EnvironmentFault) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:  # a full disk under LOG_DIR, say; nothing is left running
        print(f"launcher: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there was anything to stop
        return 130


def _launch(job: Job, keep: ExitStack) -> int:
    checks.require_runnable(job, os.environ)
    address = checks.resolve(job)
    job = checks.reserve(job, keep)
    for note in job.notes:
        _say(note)
    stop = keep.enter_context(StopSignals())
    for start in range(job.restarts + 1):
        outcome = _once(job if start == 0 else job.resumed(), address, stop)
        for line in outcome.lines:
            _say(line)
        if not outcome.worth_another or stop.first is not None or start == job.restarts:
            break
        _say(f"start {start + 2} of at most {job.restarts + 1}, from the last whole checkpoint")
    return outcome.code


def _once(job: Job, address: str, stop: StopSignals) -> Outcome:
    try:
        links = meet(job, address, _say, lambda: stop.first)
    except Stopped:
        return Outcome(128 + (stop.first or 0), ("stopped before anything was started",))
    where = f"node {job.node} of {job.nodes}, " if job.nodes > 1 else ""
    _say(f"{where}{job.local} processes; logs in {job.log_dir}; scheduler at {address}:{job.port}")
    return Group(job, address, links, stop).run()


def _say(line: str) -> None:
    write(sys.stderr, (line if line.startswith(" ") else f"launcher: {line}").encode(errors="replace") + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
