"""How many threads a process takes: by affinity, container, and the others of its group on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core import runtime

ROOT = Path(__file__).resolve().parents[1]
GROUP = ("LOCAL_WORLD_SIZE", "MS_WORKER_NUM", "RANK_SIZE", "MSRUN_CPU_LIST", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")


@pytest.fixture
def cores(monkeypatch):
    """Eight cores, no quota, no group; returns the function that changes their number."""
    for name in GROUP:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)

    def have(allowed: int, quota: int = sys.maxsize) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)), raising=False)
        monkeypatch.setattr(runtime, "_quota", lambda: quota)

    have(8)
    return have


@pytest.mark.parametrize(("group", "threads"), [
    ({}, 8),
    ({"LOCAL_WORLD_SIZE": "2"}, 4),
    ({"LOCAL_WORLD_SIZE": "3", "RANK_SIZE": "6"}, 2),
    ({"MS_WORKER_NUM": "4", "RANK_SIZE": "4"}, 2),
    ({"RANK_SIZE": "16"}, 1),
    ({"RANK_SIZE": "many"}, 8),
    ({"MS_WORKER_NUM": "4", "MSRUN_CPU_LIST": "[0, 1]"}, 8),
])
def test_processes_of_a_group_share_the_cores(cores, monkeypatch, group, threads):
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    assert runtime.threads_of_this_process() == threads


def test_a_container_with_a_quota_has_no_more_cores_than_that(cores, monkeypatch):
    cores(allowed=64, quota=2)
    assert runtime.usable_cores() == 2
    runtime.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "2" and os.environ["OMP_WAIT_POLICY"] == "passive"


def test_what_the_user_has_set_stays(cores, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    runtime.prepare_environment()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("5", "active")


def test_the_default_is_left_to_openmp(cores):
    """A variable set by this process would look like the user's wish to the processes that it starts."""
    runtime.prepare_environment()
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(("files", "cores"), [
    ({"cpu.max": "150000 100000\n"}, 2),
    ({"cpu.max": "max 100000\n"}, sys.maxsize),
    ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, sys.maxsize),
    ({}, sys.maxsize),
])
def test_the_quota_of_a_control_group(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert runtime._quota(tmp_path) == cores


def test_kernels_in_a_group_of_two_take_half_the_cores():
    """For real: OpenMP in a process that msrun's variables say is one of two."""
    code = ("from llm_core.runtime import prepare_environment, usable_cores; prepare_environment()\n"
            "from llm_core.kernels import library\n"
            "print(library().threads(), max(usable_cores() // 2, 1))")
    env = {name: value for name, value in os.environ.items() if name not in (*GROUP, "KERNELS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**env, "MS_WORKER_NUM": "2"},
                          capture_output=True, text=True, timeout=600)
    taken, half = done.stdout.split()
    assert taken == half, done.stderr
