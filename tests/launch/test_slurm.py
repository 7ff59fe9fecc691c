"""A task's place among those of srun, from its environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_core.errors import UserError
from llm_core.launch.arguments import UsageError, parse
from llm_core.launch.slurm import expand, place

RUN = str(Path(__file__).resolve().parents[2] / "run_llm.py")
SRUN = {
    "SLURM_JOB_ID": "731245", "SLURM_NNODES": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "node[01-03,7]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("login", ["login"]),
        ("a,b[1-2],c", ["a", "b1", "b2", "c"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_node_lists(text, names):
    assert expand(text) == names


@pytest.mark.parametrize("text", ["", "n[1", "n1]", "n[a-b]", "n[3-1]", "n[1,]", ",n"])
def test_what_is_no_node_list(text):
    with pytest.raises(UserError, match="no list of nodes"):
        expand(text)


def test_the_first_node_is_the_master_and_two_jobs_have_two_ports():
    here = place(SRUN)
    assert (here.nodes, here.node, here.address) == (4, 2, "node01")
    assert here.port == 21245 != place({**SRUN, "SLURM_JOB_ID": "731246"}).port
    assert place({**SRUN, "MASTER_PORT": "9999"}).port == 9999
    assert place({**SRUN, "MASTER_ADDR": "10.0.0.7"}).address == "10.0.0.7"  # where the name is 127.0.1.1 in /etc/hosts


def test_a_step_on_some_nodes_of_a_job_goes_by_the_step():
    step = {**SRUN, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[02-03]", "SLURM_STEP_NUM_TASKS": "2"}
    here = place({**step, "SLURM_PROCID": "1", "SLURM_NODEID": "1"})
    assert (here.nodes, here.node, here.address) == (2, 1, "node02")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "9"}, "--ntasks-per-node=1"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        ({"SLURM_NNODES": "3", "SLURM_NTASKS": "3"}, "names 4 nodes"),
        ({"MASTER_PORT": "80"}, "MASTER_PORT is '80'"),
    ],
)
def test_what_does_not_fit(change, word):
    with pytest.raises(UserError, match=word):
        place({**SRUN, **change})


def test_outside_srun():
    with pytest.raises(UserError, match="SLURM_NNODES is not set.*srun"):
        place({})


def test_the_job_of_a_task():
    job = parse(["--slurm", "--restart", "2", f"{RUN} --config c", "8", "logs", "600"], SRUN)
    assert (job.ranks, job.local, job.node, job.address, job.timeout, job.restarts) == (32, 8, 2, "node01", 600, 2)
    assert parse(["--slurm", RUN], {**SRUN, "NPROC_PER_NODE": "2"}).ranks == 8
    assert parse(["--slurm", RUN], {**SRUN, "SLURM_GPUS_ON_NODE": "4"}).ranks == 16
    with pytest.raises(UsageError, match="5 arguments"):
        parse(["--slurm", RUN, "8", "logs", "600", "more"], SRUN)
