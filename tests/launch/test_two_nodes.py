"""Two machines: network namespaces with a cable between them, each with its own addresses and host names."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Machines:
    """Two namespaces; `inside(0)` is the command prefix that runs something on the first one."""

    def __init__(self) -> None:
        self.names = [f"launch{os.getpid()}{letter}" for letter in "ab"]
        self.addresses = ["10.231.7.1", "10.231.7.2"]

    def inside(self, node: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[node]]

    def build(self) -> None:
        cables = [f"{name[-10:]}v" for name in self.names]
        for name in self.names:
            ip("netns", "add", name)
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            hosts = [f"{address} node{node:02}" for node, address in enumerate(self.addresses)]
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        ip("link", "add", cables[0], "netns", self.names[0], "type", "veth", "peer", cables[1], "netns", self.names[1])
        for name, cable, address in zip(self.names, cables, self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (iproute2) to make network namespaces")
    machines = Machines()
    try:
        machines.build()
        subprocess.run([*machines.inside(0), "true"], check=True, capture_output=True, text=True)
    except (subprocess.CalledProcessError, OSError) as error:
        machines.remove()
        pytest.skip(f"needs the right to make network namespaces: {getattr(error, 'stderr', '') or error}")
    yield machines
    machines.remove()


def ranks_at(step: int, *nodes) -> bool:
    return all(node.reached(step, rank) for rank, node in enumerate(nodes))


def test_tasks_of_srun_a_failure_that_is_known_on_both_their_second_start_and_a_stop(launch, machines, tmp_path):
    """srun itself is not here; its environment is all that the script sees of it."""
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[00-01]"}
    first, second = (
        launch(
            tmp_path / f"node{node}", 500, "--restart", "1", "CMD", "1", "logs", "120", inside=machines.inside(node),
            script="slurm_launch.sh", **slurm, SLURM_PROCID=str(node), SLURM_NODEID=str(node),
        )
        for node in range(2)
    )  # fmt: skip
    first.wait_for(lambda: ranks_at(2, first, second))
    assert f"scheduler at {machines.addresses[0]}:20077" in first.errors
    assert "step 1\n" in first.output and second.output == ""
    assert (tmp_path / "node1/logs/worker_1.log").exists() and not (tmp_path / "node1/logs/scheduler.log").exists()
    os.kill(second.rank(1)["pid"], signal.SIGKILL)
    for node, name in ((second, "rank 1"), (first, "node 1: rank 1")):
        node.wait_for(lambda node=node: "start 2 of at most 2" in node.errors, 60)
        assert f"launcher: {name} was killed by SIGKILL" in node.errors
    for rank, node in enumerate((first, second)):
        (node.folder / f"rank_{rank}.json").unlink()
    first.wait_for(lambda: ranks_at(2, first, second))
    second.process.send_signal(signal.SIGTERM)
    assert second.end(50) == 143 and first.end(50) == 143
    saved = [(tmp_path / f"node{rank}/saved_{rank}.json").read_text() for rank in range(2)]
    assert saved[0] == saved[1]
