"""Launches that tests watch from outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from llm_core.launch import group
from llm_core.launch.arguments import Job

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("worker_script.py")


class Launch:
    """The launcher's script in a process of its own, with what its ranks write into `folder`.

    CMD among `argv` stands for `command`, or for worker_script.py with `steps` and `words`. `inside`
    is a command to run it under.
    """

    def __init__(
        self, folder: Path, steps: int, *argv: str, words: str = "", inside: Sequence[str] = (),
        script: str = "msrun_launcher.sh", command: str = "", **environment: str,
    ) -> None:  # fmt: skip
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.mark = f"LAUNCH_TEST={folder}"
        with open(folder / "out", "ab") as out, open(folder / "err", "ab") as err:
            self.process = subprocess.Popen(
                [*inside, "bash", str(ROOT / "scripts" / script), *argv[: argv.index("CMD")],
                 command or f"python {SCRIPT} {folder} {steps} {words}", *argv[argv.index("CMD") + 1 :]],
                stdout=out, stderr=err, cwd=folder,
                env={**os.environ, "PYTHON": sys.executable, "LAUNCH_TEST": str(folder), "PYTHONPATH": str(ROOT)}
                | environment,
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

    def clean(self) -> None:
        """What a test that failed has left running."""
        self.process.kill()
        self.process.wait()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def launch() -> Iterator[Callable[..., Launch]]:
    """`Launch`, and nothing of it is left after the test."""
    made: list[Launch] = []

    def start(*args, **options) -> Launch:
        made.append(Launch(*args, **options))
        return made[-1]

    yield start
    for each in made:
        each.clean()


@pytest.fixture
def port() -> str:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def fake_command(job: Job, address: str) -> list[str]:
    """fake_msrun.py instead of msrun: its workers need no MindSpore."""
    first = job.ranks_of(job.node)[0]
    return [
        sys.executable, str(SCRIPT.with_name("fake_msrun.py")), str(job.log_dir), str(first), str(job.local),
        sys.executable, str(Path(group.__file__).with_name("worker.py")), str(job.grace), job.interpreter,
        *job.words,
    ]  # fmt: skip


@pytest.fixture
def fake_msrun(monkeypatch) -> None:
    """Groups in this process start fake_msrun.py."""
    monkeypatch.setattr(group, "msrun_command", fake_command)
