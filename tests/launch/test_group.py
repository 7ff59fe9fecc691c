"""Real groups through msrun: they end well, are stopped, fail in every way, and leave no process behind."""

from __future__ import annotations

import os
import shlex
import signal
import time

import pytest


def test_a_rank_that_fails_then_a_stop_of_the_second_start(launch, port, tmp_path):
    prompt = "I love \"Beijing\", it's  $HOME"
    (tmp_path / "faults").write_text("exit 1 7\n")
    options = ["--restart", "2", "CMD", "2", port, "logs/here", "False", "120"]
    group = launch(tmp_path, 500, *options, words=shlex.quote(prompt))
    group.wait_for(lambda: group.reached(3, 0, 1))
    assert "rank 1 ended with code 7: ValueError: the fault that was asked for" in group.errors
    assert "start 2 of at most 3" in group.errors and "JOIN False" in group.errors
    assert "the fault" in (tmp_path / "logs/here/before/worker_1.log").read_text()
    assert "step 2\n" in group.output  # rank 0's log, live
    assert group.rank(1)["arguments"] == [prompt] and group.rank(1)["local"] == "2"
    group.process.send_signal(signal.SIGTERM)
    assert group.end(50) == 143
    assert (tmp_path / "saved_0.json").read_text() == (tmp_path / "saved_1.json").read_text()
    assert "SIGTERM: every rank has ended" in group.errors and "start 3" not in group.errors
    assert {path.name for path in (tmp_path / "logs/here").glob("*.log")} == {
        "msrun.log", "scheduler.log", "worker_0.log", "worker_1.log",
    }  # fmt: skip
    assert "step 3" in (tmp_path / "logs/here/worker_1.log").read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(launch, port, tmp_path):
    group = launch(tmp_path, 500, "CMD", "2", port, "logs", "True", "120")
    group.wait_for(lambda: group.reached(2, 0, 1))
    os.kill(group.rank(1)["pid"], signal.SIGSTOP)
    assert group.end(60) not in (0, None)
    assert f"rank 1 did not answer: its process {group.rank(1)['pid']} is stopped" in group.errors


@pytest.mark.slow
def test_a_rank_that_does_not_join_is_named(launch, port, tmp_path):
    (tmp_path / "faults").write_text("late 1\n")
    group = launch(tmp_path, 3, "CMD", "2", port, "logs", "True", "15")
    assert group.end(90) == 1
    assert "rank 1 did not join the group within 15 s" in group.errors and "I am late" in group.errors


def test_kill_9_of_the_launcher_stops_its_group(launch, port, tmp_path):
    group = launch(tmp_path, 500, "--grace", "20", "CMD", "2", port, "logs", "True", "120")
    group.wait_for(lambda: group.reached(2, 0, 1))
    group.process.kill()
    end = time.monotonic() + 30
    while group.left() and time.monotonic() < end:
        time.sleep(0.2)
    assert not group.left()
    assert (tmp_path / "saved_0.json").read_text() == (tmp_path / "saved_1.json").read_text()
