"""What the user has typed: the positional forms of MindFormers' msrun_launcher.sh, and a few options."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_core.errors import UserError
from llm_core.launch import slurm

USAGE = """\
usage: msrun_launcher.sh [OPTIONS] CMD
       msrun_launcher.sh [OPTIONS] CMD N
       msrun_launcher.sh [OPTIONS] CMD N PORT LOG_DIR JOIN TIMEOUT
       msrun_launcher.sh [OPTIONS] CMD N LOCAL_N ADDR PORT NODE_RANK LOG_DIR JOIN TIMEOUT
       slurm_launch.sh   [OPTIONS] CMD [LOCAL_N [LOG_DIR [TIMEOUT]]]          within srun, one task a node

  CMD        what each process runs, one word of the shell: "run_llm.py --config FILE --use_parallel True"
  N          processes in all (default: $NPROC_PER_NODE, else one for each listed device, else 8)
  LOCAL_N    processes on this machine; N / LOCAL_N machines run the same command
  ADDR PORT  of the machine with NODE_RANK 0 (127.0.0.1:8118)
  LOG_DIR    scheduler.log, worker_{rank}.log, msrun.log (output/msrun_log)
  JOIN       taken, and not followed: the launcher always waits for its processes
  TIMEOUT    seconds within which all of them must be there (7200)

  --restart K   after a failure start again, up to K times, from the last whole checkpoint of this launch
  --grace S     seconds that a stopped run has for its last checkpoint before it is killed (45)
"""

DEFAULT_PORT = 8118
DEFAULT_LOG_DIR = "output/msrun_log"
DEFAULT_TIMEOUT = 7200


class UsageError(Exception):
    """A command line that has none of the forms; the exit code is upstream's, 1."""


@dataclass(frozen=True)
class Job:
    """One machine's part of a group of processes.

    words: the command behind the interpreter, such as ("run_llm.py", "--config", ...).
    ranks, local, node: processes in all and here, and this machine's number; rank = node * local + number here.
    port_given: the user has named the port, so no other will do.
    timeout, grace: seconds, see USAGE. restarts: how often a failed group is started again.
    notes: lines to show before the start.
    """

    words: tuple[str, ...]
    ranks: int
    local: int
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    node: int = 0
    log_dir: Path = Path(DEFAULT_LOG_DIR)
    timeout: int = DEFAULT_TIMEOUT
    interpreter: str = sys.executable
    port_given: bool = False
    restarts: int = 0
    grace: int = 45
    notes: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        """Machines that make up the group."""
        return self.ranks // self.local

    def ranks_of(self, node: int) -> range:
        """The ranks that a machine runs."""
        return range(node * self.local, (node + 1) * self.local)

    def resumed(self) -> Job:
        """The same job, a run of ours, going on from the newest whole checkpoint that it has."""
        return replace(self, words=(*self.words, "--resume_training", "True"))  # the last of two flags counts


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Job:
    """The job of a command line. UsageError, or UserError for a value that cannot be meant."""
    options, given = _options(argv)
    if options.slurm:
        job = _within_srun(given, environment)
    elif len(given) in (1, 2, 6, 9):
        job = _positional(given, environment)
    else:
        raise UsageError(f"{len(given)} arguments, but 1, 2, 6 or 9 make a command; CMD is one word, in quotes")
    if job.ranks % job.local or job.node >= job.nodes:
        raise UserError(
            f"N {job.ranks}, LOCAL_N {job.local}, NODE_RANK {job.node}: each machine runs LOCAL_N of the N processes, "
            "so LOCAL_N must divide N, and NODE_RANK be less than N / LOCAL_N"
        )
    return replace(job, restarts=options.restart, grace=options.grace)


def run_arguments(words: Sequence[str]) -> list[str] | None:
    """The flags of a run, if that is what the command is: no other script, and none of the verbs (plan, check ...)."""
    words = words[_interpreter_flags(words) :]
    if len(words) > 1 and re.fullmatch(r"-[^WXmc-]*m", words[0]) and words[1] == "llm_core.cli":
        rest = list(words[2:])
    elif words and Path(words[0]).name == "run_llm.py":
        rest = list(words[1:])
    else:
        return None
    return rest if rest and rest[0].startswith("-") else None


def _interpreter_flags(words: Sequence[str]) -> int:
    """How many words stand before the script, -m or -c: flags of Python, and the values of those that have one."""
    index = 0
    while index < len(words) and words[index].startswith("-") and not re.match(r"-[^WXmc-]*[mc]", words[index]):
        index += 2 if re.fullmatch(r"-[^WXmc-]*[WX]|--check-hash-based-pycs", words[index]) else 1
    return index


def devices(environment: Mapping[str, str]) -> list[str] | None:
    """The accelerators that this process may use, of ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES; None: all."""
    for name in ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        if name not in environment:
            continue
        found: list[str] = []
        for item in filter(None, environment[name].replace(" ", "").split(",")):
            if item == "-1":  # CUDA: what follows is not seen
                break
            ends = re.fullmatch(r"(\d+)-(\d+)", item)
            found += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [item]
        return found
    return None


def _options(argv: Sequence[str]) -> tuple[Any, list[str]]:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--restart", type=_number, default=0)
    parser.add_argument("--grace", type=_number, default=45)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("given", nargs="*")
    options = parser.parse_intermixed_args(argv)
    return options, options.given


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def _number(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return int(text)


def _positional(given: Sequence[str], environment: Mapping[str, str]) -> Job:
    words, interpreter = _command(given[0])
    per_node = _per_node(environment)
    if len(given) == 1:
        ranks = per_node or 8
        return Job(words, ranks, ranks, interpreter=interpreter)
    ranks = _positive("N", given[1])
    if len(given) == 9:
        _, _, local, address, port, node, log_dir, join, timeout = given
        local_ranks = _positive("LOCAL_N", local)
        node_rank = _positive("NODE_RANK", node, least=0)
    else:
        per_node = _per_node({"NPROC_PER_NODE": environment.get("NPROC_PER_NODE", "")})
        if per_node and per_node < ranks:
            raise UserError(
                f"N is {ranks}, but NPROC_PER_NODE allows {per_node} processes on this machine; the form with nine "
                "arguments starts a group on several"
            )
        local_ranks, node_rank, address = ranks, 0, "127.0.0.1"
        if len(given) == 2:
            return Job(words, ranks, ranks, interpreter=interpreter)
        _, _, port, log_dir, join, timeout = given
    return Job(
        words, ranks, local_ranks, address, _port(port), node_rank, Path(log_dir), _positive("TIMEOUT", timeout),
        interpreter, port_given=True, notes=_join_note(join),
    )  # fmt: skip


def _within_srun(given: Sequence[str], environment: Mapping[str, str]) -> Job:
    if not 1 <= len(given) <= 4:
        raise UsageError(f"{len(given)} arguments, but CMD [LOCAL_N [LOG_DIR [TIMEOUT]]] make a command")
    words, interpreter = _command(given[0])
    place = slurm.place(environment)
    local = _positive("LOCAL_N", given[1]) if len(given) > 1 else _per_node(environment) or place.devices or 8
    log_dir = given[2] if len(given) > 2 else DEFAULT_LOG_DIR
    timeout = _positive("TIMEOUT", given[3]) if len(given) > 3 else DEFAULT_TIMEOUT
    return Job(
        words, local * place.nodes, local, place.address, place.port, place.node, Path(log_dir), timeout,
        interpreter, port_given=True,
    )  # fmt: skip


def _command(text: str) -> tuple[tuple[str, ...], str]:
    """CMD as words, behind its `python` if it begins with one, and the interpreter: a path there is followed."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"CMD: {text}: {error}") from None
    interpreter = sys.executable
    if words and re.fullmatch(r"python[\d.]*", Path(words[0]).name):
        first = words.pop(0)
        if "/" in first:
            interpreter = first
            if shutil.which(first) is None:
                raise UserError(f"CMD: {first}: no such interpreter")
    if not words:
        raise UserError(f"CMD is '{text}': give a script, such as \"run_llm.py --config FILE --use_parallel True\"")
    if words[0] == "run-llm":
        words[:1] = ["-m", "llm_core.cli"]
    script = "".join(words[_interpreter_flags(words) :][:1])
    if script and not script.startswith("-") and not Path(script).is_file():
        raise UserError(f"CMD: {script}: no such file in {Path.cwd()}")
    return tuple(words), interpreter


def _per_node(environment: Mapping[str, str]) -> int:
    """Processes of one machine by its environment; 0: it does not say."""
    if environment.get("NPROC_PER_NODE"):
        return _positive("NPROC_PER_NODE", environment["NPROC_PER_NODE"])
    return len(devices(environment) or [])


def _positive(name: str, text: str, least: int = 1) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
        raise UsageError(f"{name} is '{text}'; give a number, {least} or more")
    return int(text)


def _port(text: str) -> int:
    port = _positive("PORT", text)
    if not 1024 <= port <= 65535:
        raise UsageError(f"PORT is {port}; give one from 1024 to 65535")
    return port


def _join_note(join: str) -> tuple[str, ...]:
    if join.lower() not in ("true", "false"):
        raise UsageError(f"JOIN is '{join}'; give True or False")
    if join.lower() == "true":
        return ()
    return ("JOIN False is not followed: the launcher waits for its processes, as a failure would go unseen otherwise",)
