"""Where a task stands among those that srun has started, read from its environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from llm_core.errors import UserError


class Place(NamedTuple):
    """Machines of the step, this one's number, the first one's address and port; GPUs a machine (0: unknown)."""

    nodes: int
    node: int
    address: str
    port: int
    devices: int


def place(environment: Mapping[str, str]) -> Place:
    """This task's place. UserError outside srun, or where srun has started more than one task a node."""

    def value(*names: str) -> str:
        for name in names:
            if environment.get(name):
                return environment[name]
        raise UserError(f"{names[-1]} is not set: this is no task of srun; start it by srun --ntasks-per-node=1")

    def number(*names: str) -> int:
        text = value(*names)
        if not text.isdecimal():
            raise UserError(f"{names[-1]} is '{text}'; srun sets a number")
        return int(text)

    nodes = number("SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    task, node = number("SLURM_PROCID"), number("SLURM_NODEID")
    tasks = number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if "SLURM_NTASKS" in environment else nodes
    if tasks != nodes or task != node:
        raise UserError(
            f"srun has started {tasks} tasks on {nodes} nodes, and the launcher starts the processes of a node itself: "
            "give srun --ntasks-per-node=1"
        )
    hosts = expand(value("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    if len(hosts) != nodes:
        raise UserError(f"SLURM_JOB_NODELIST names {len(hosts)} nodes, SLURM_NNODES is {nodes}")
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    address = environment.get("MASTER_ADDR") or hosts[0]
    return Place(nodes, node, address, _port(environment), int(gpus) if gpus.isdecimal() else 0)


def expand(text: str) -> list[str]:
    """The names of a node list: `n[01-03,7],login` gives n01, n02, n03, n7, login. UserError where it is none."""
    items = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not text or ",".join(items) != text:
        raise UserError(f"'{text}' is no list of nodes, such as node[01-03,7]")
    return [name for item in items for name in _one(item)]


def _one(item: str) -> list[str]:
    """`a[1-2]b[3,4]` gives a1b3, a1b4, a2b3, a2b4."""
    bracket = re.search(r"\[([^\]]*)\]", item)
    if bracket is None:
        return [item]
    names = []
    for part in bracket[1].split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise UserError(f"'{item}' is no list of nodes: '{part}' is no number, nor two with a - between")
        for value in range(int(ends[1]), int(ends[2] or ends[1]) + 1):
            names += _one(f"{item[: bracket.start()]}{value:0{len(ends[1])}}{item[bracket.end() :]}")
    return names


def _port(environment: Mapping[str, str]) -> int:
    """$MASTER_PORT, else one of the job's own below the ports that the system hands out: two jobs may share a node."""
    given = environment.get("MASTER_PORT", "")
    if given:
        if not given.isdecimal() or not 1024 <= int(given) <= 65535:
            raise UserError(f"MASTER_PORT is '{given}'; give a port from 1024 to 65535")
        return int(given)
    job = environment.get("SLURM_JOB_ID", "0")
    return 20000 + (int(job) if job.isdecimal() else 0) % 10000
