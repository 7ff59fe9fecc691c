"""Real groups through msrun: they end well, are stopped, fail in every way, and leave no process behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("worker_script.py")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Launch:
    """The launcher's script in a process of its own, with what its ranks write into `folder`."""

    def __init__(self, folder: Path, steps: int, *argv: str, words: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.mark = f"LAUNCH_TEST={folder}"
        self.started = time.monotonic()
        with open(folder / "out", "ab") as out, open(folder / "err", "ab") as err:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "scripts/msrun_launcher.sh"), *argv[: argv.index("CMD")],
                 f"python {SCRIPT} {folder} {steps} {words}", *argv[argv.index("CMD") + 1 :]],
                stdout=out, stderr=err, cwd=folder,
                env={**os.environ, "PYTHON": sys.executable, "LAUNCH_TEST": str(folder), "PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def rank(self, rank: int) -> dict:
        return json.loads((self.folder / f"rank_{rank}.json").read_text())

    def reached(self, step: int, *ranks: int) -> bool:
        paths = [self.folder / f"rank_{rank}.json" for rank in ranks]
        return all(path.exists() and json.loads(path.read_text()).get("step", 0) >= step for path in paths)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.errors
            assert time.monotonic() < end, self.errors
            time.sleep(0.1)

    def end(self, seconds: float) -> int:
        """Wait for it at most so long; and that no process of it is left."""
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            assert not self.left(), self.errors

    def left(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if self.mark.encode() in environment.split(b"\0"):
                    found.append(int(entry.name))
        return found

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def errors(self) -> str:
        return (self.folder / "err").read_text()


def test_sigterm_saves_on_every_rank_and_what_was_given_arrives_whole(tmp_path):
    prompt = "I love \"Beijing\", it's  $HOME"
    launch = Launch(tmp_path, 500, "CMD", "2", str(free_port()), "logs/here", "False", "120", words=shlex.quote(prompt))
    launch.wait_for(lambda: launch.reached(3, 0, 1))
    assert "step 2\n" in launch.output  # rank 0's log, live
    assert launch.rank(1)["arguments"] == [prompt] and launch.rank(1)["local"] == "2"
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end(50) == 143
    assert (tmp_path / "saved_0.json").read_text() == (tmp_path / "saved_1.json").read_text()
    assert "SIGTERM: every rank has ended" in launch.errors and "JOIN False" in launch.errors
    assert {path.name for path in (tmp_path / "logs/here").glob("*.log")} == {
        "msrun.log", "scheduler.log", "worker_0.log", "worker_1.log",
    }  # fmt: skip
    assert "step 3" in (tmp_path / "logs/here/worker_1.log").read_text()


def test_a_rank_that_fails_is_named_and_the_second_start_succeeds(tmp_path):
    (tmp_path / "faults").write_text("exit 1 7\n")
    launch = Launch(tmp_path, 3, "--restart", "2", "CMD", "2", str(free_port()), "logs", "True", "120")
    assert launch.end(120) == 0
    assert "rank 1 ended with code 7: ValueError: the fault that was asked for" in launch.errors
    assert "start 2 of at most 3" in launch.errors and "start 3" not in launch.errors
    assert "the fault" in (tmp_path / "logs/before/worker_1.log").read_text()
    assert launch.reached(2, 0, 1)


def test_kill_9_of_a_rank_ends_the_others(tmp_path):
    launch = Launch(tmp_path, 500, "CMD", "2", str(free_port()), "logs", "True", "120")
    launch.wait_for(lambda: launch.reached(2, 0, 1))
    os.kill(launch.rank(1)["pid"], signal.SIGKILL)
    assert launch.end(60) == 137
    assert "rank 1 was killed by SIGKILL" in launch.errors
    assert "the last lines of logs/worker_1.log" in launch.errors and "step 2" in launch.errors


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path):
    launch = Launch(tmp_path, 500, "CMD", "2", str(free_port()), "logs", "True", "120")
    launch.wait_for(lambda: launch.reached(2, 0, 1))
    os.kill(launch.rank(1)["pid"], signal.SIGSTOP)
    assert launch.end(60) not in (0, None)
    assert f"rank 1 did not answer: its process {launch.rank(1)['pid']} is stopped" in launch.errors


def test_a_rank_that_does_not_follow_a_stop_signal_is_killed(tmp_path):
    (tmp_path / "faults").write_text("deaf 1\n")
    launch = Launch(tmp_path, 0, "--grace", "4", "CMD", "2", str(free_port()), "logs", "True", "120")
    launch.wait_for(lambda: launch.reached(0, 0, 1))
    launch.process.send_signal(signal.SIGINT)
    assert launch.end(15) == 130
    assert (tmp_path / "saved_0.json").exists() and not (tmp_path / "saved_1.json").exists()
    assert "SIGINT: after 4 s there was still rank 1" in launch.errors


def test_kill_9_of_the_launcher_stops_its_group(tmp_path):
    launch = Launch(tmp_path, 0, "--grace", "4", "CMD", "2", str(free_port()), "logs", "True", "120")
    launch.wait_for(lambda: launch.reached(0, 0, 1))
    launch.process.kill()
    end = time.monotonic() + 30
    while launch.left() and time.monotonic() < end:
        time.sleep(0.2)
    assert not launch.left()
    assert (tmp_path / "saved_0.json").exists() and (tmp_path / "saved_1.json").exists()
