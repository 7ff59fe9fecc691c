"""What a launcher makes of the ends of its processes: scripts under the real watch, without MindSpore."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_core.launch.arguments import Job
from llm_core.launch.gate import Links
from llm_core.launch.group import Group, Outcome
from llm_core.launch.processes import StopSignals

pytestmark = pytest.mark.usefixtures("fake_msrun")

_RANK = "import os, sys; exec(open(sys.argv[1] + '/rank_' + os.environ['RANK_ID']).read())"
_BEGIN = """
import pathlib, signal, sys, time
mine = lambda name: pathlib.Path(sys.argv[1], name + os.environ['RANK_ID'])
def on_stop(follow):
    signal.signal(signal.SIGTERM, follow)
    mine('ready_').touch()
    for _ in range(1200):
        time.sleep(0.05)  # one sleep of 60 s, if the signal comes just before the system call, is slept to its end
"""
WAITS = "mine('ready_').touch(); time.sleep(60)"
SAVES = """
def follow(number, _):
    time.sleep(2)
    mine('saved_').touch()
    sys.exit(128 + number)
on_stop(follow)
"""
MISTAKE = "time.sleep(0.8); print('run.yaml: no such key'); sys.exit(2)"


def ends(line: str, code: int) -> str:
    return f"print({line!r}); sys.exit({code})"


def follows(line: str, code: int) -> str:
    """A rank that hears of a stop signal and fails."""
    return f"on_stop(lambda *_: (print({line!r}), sys.exit({code})))"


def gone(rank: int, other: int) -> str:
    return f"rank {rank}: rank {other} has ended; its log says why"


class Watch:
    """One machine's launcher, in a thread."""

    def __init__(
        self, folder: Path, *ranks: str, node: int = 0, nodes: int = 1, link: socket.socket | None = None,
        grace: int = 8,
    ) -> None:  # fmt: skip
        self.folder, self.stop = folder, StopSignals()
        log_dir = folder / f"logs_{node}"
        log_dir.mkdir(parents=True)
        local = len(ranks)
        job = Job(("-c", _RANK, str(folder)), local * nodes, local, node=node, log_dir=log_dir, grace=grace)
        for rank, script in zip(job.ranks_of(node), ranks, strict=True):
            (folder / f"rank_{rank}").write_text(_BEGIN + script)
        self.log_dir, self.outcome = log_dir, Outcome(-1)
        self.group = Group(job, "127.0.0.1", Links({} if link is None else {1 - node: link}), self.stop)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.outcome = self.group.run()

    def ready(self, *ranks: int) -> None:
        end = time.monotonic() + 20
        while not all((self.folder / f"ready_{rank}").exists() for rank in ranks):
            assert time.monotonic() < end
            time.sleep(0.05)

    def end(self) -> Outcome:
        self.thread.join(40)
        assert not self.thread.is_alive()
        return self.outcome


@pytest.fixture
def pair(tmp_path) -> Iterator:
    """Two machines with a rank each."""
    ends = socket.socketpair()

    def start(first: str, second: str) -> tuple[Watch, Watch]:
        return tuple(
            Watch(tmp_path, script, node=node, nodes=2, link=ends[node]) for node, script in enumerate((first, second))
        )

    yield start
    for link in ends:
        link.close()


def test_msrun_that_gets_the_stop_signal_too_does_not_end_the_saving(tmp_path):
    watch = Watch(tmp_path, SAVES, SAVES)
    watch.ready(0, 1)
    os.kill(int((watch.log_dir / "msrun.pid").read_text()), signal.SIGTERM)
    time.sleep(0.3)  # as systemd does: one process after the other
    watch.stop.first = signal.SIGTERM
    outcome = watch.end()
    assert (outcome.code, outcome.lines) == (143, ("SIGTERM: every rank has ended",))
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


def test_msrun_that_is_killed_ends_the_group(tmp_path):
    watch = Watch(tmp_path, WAITS, WAITS)
    watch.ready(0, 1)
    os.kill(int((watch.log_dir / "msrun.pid").read_text()), signal.SIGKILL)
    outcome = watch.end()
    assert outcome.code == 137 and "msrun was killed by SIGKILL" in outcome.lines[0] and outcome.worth_another


def test_who_ended_first_is_blamed_and_not_who_waited_for_it(tmp_path):
    outcome = Watch(tmp_path, ends(gone(0, 1), 1), MISTAKE).end()
    assert (outcome.code, outcome.worth_another) == (2, False)
    assert outcome.lines[0] == "rank 1 ended with code 2: run.yaml: no such key"
    assert outcome.lines[1] == "rank 0 failed as well"


def test_a_mistake_of_any_rank_is_no_reason_to_start_again(tmp_path):
    outcome = Watch(tmp_path, ends("ValueError: mine", 1), MISTAKE).end()
    assert (outcome.code, outcome.worth_another) == (1, False)


def test_who_ended_first_is_blamed_on_the_other_machine_too(pair):
    first, second = pair(ends(gone(0, 1), 1), MISTAKE)
    assert second.end().lines[0] == "rank 1 ended with code 2: run.yaml: no such key"
    outcome = first.end()
    assert (outcome.code, outcome.worth_another) == (2, False)
    assert outcome.lines[0] == "node 1: rank 1 ended with code 2: run.yaml: no such key"


def test_a_failure_of_the_first_machine_ends_the_second(pair):
    first, second = pair("time.sleep(1); print('ValueError: no'); sys.exit(7)", WAITS)
    assert (first.end().code, second.end().code) == (7, 7)
    assert second.end().lines[0] == "node 0: rank 0 ended with code 7: ValueError: no"


def test_a_stop_before_the_first_step_is_no_failure(tmp_path):
    """A rank that is still starting dies of the signal, and another one tells that it is gone."""
    watch = Watch(tmp_path, follows(gone(0, 1), 1), WAITS)
    watch.ready(0, 1)
    watch.stop.first = signal.SIGTERM
    outcome = watch.end()
    assert (outcome.code, outcome.lines) == (143, ("SIGTERM: every rank has ended",))


def test_a_stop_before_the_first_step_is_no_failure_on_two_machines(pair):
    first, second = pair(follows(gone(0, 1), 1), WAITS)
    first.ready(0, 1)
    first.stop.first = signal.SIGTERM
    assert (first.end().code, second.end().code) == (143, 143)


def test_a_save_that_fails_at_a_stop_is_a_failure(tmp_path):
    watch = Watch(tmp_path, follows("out: no room on the disk", 1), SAVES)
    watch.ready(0, 1)
    watch.stop.first = signal.SIGTERM
    outcome = watch.end()
    assert outcome.code == 1 and outcome.lines[0] == "rank 0 ended with code 1: out: no room on the disk"
    assert not outcome.worth_another


def test_a_rank_that_dies_while_it_saves_is_a_failure_on_both_machines(pair):
    first, second = pair(follows(gone(0, 1), 1), "on_stop(lambda *_: os.kill(os.getpid(), signal.SIGKILL))")
    first.ready(0, 1)
    first.stop.first = signal.SIGTERM
    assert second.end().code == 137 and first.end().code == 1


def test_a_rank_that_does_not_follow_a_stop_signal_is_killed(tmp_path):
    watch = Watch(tmp_path, SAVES, "signal.signal(signal.SIGINT, signal.SIG_IGN); " + WAITS, grace=3)
    watch.ready(0, 1)
    watch.stop.first = signal.SIGINT
    outcome = watch.end()
    assert outcome.code == 130 and outcome.lines == (
        "SIGINT: after 3 s there was still rank 1, which the launcher has killed",
    )


def test_a_second_signal_ends_the_group_at_once(tmp_path):
    watch = Watch(tmp_path, SAVES, SAVES)
    watch.ready(0, 1)
    watch.stop.first, watch.stop.again = signal.SIGTERM, True
    assert watch.end().code == 143 and not (tmp_path / "saved_0").exists()


def test_messages_that_make_no_sense_stop_nothing(tmp_path):
    ours, theirs = socket.socketpair()
    watch = Watch(tmp_path, WAITS, nodes=2, link=ours)
    watch.ready(0)
    theirs.sendall(b'{"stop": 9}\n{"stop": "x"}\n{"stop": 99}\n')
    time.sleep(1)
    assert watch.thread.is_alive() and watch.group.stopping is None
    theirs.sendall(b"\xff\xfe{\n")
    outcome = watch.end()
    theirs.close()
    assert outcome.code == 1 and outcome.lines == ("the launcher of node 1 is gone",)


def test_a_terminal_that_is_closed_is_a_stop_signal(tmp_path, port):
    """The launcher has it as its controlling terminal, gets SIGHUP, and can write nothing more."""
    code = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "from conftest import fake_command; from llm_core.launch import __main__, group\n"
        "group.msrun_command = fake_command; code = __main__.main(sys.argv[2:])\n"
        "open(sys.argv[1], 'w').write(str(code))"
    )
    script = tmp_path / "mine.py"
    script.write_text("import os" + _BEGIN + SAVES.replace("time.sleep(2)", "print(1); time.sleep(3)"))
    here = Path(__file__).parent
    master, terminal = pty.openpty()
    command = [f"{sys.executable} {script} {tmp_path}", "2", port, str(tmp_path / "logs"), "True", "60"]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "code"), *command], start_new_session=True, cwd=here.parents[1],
        stdin=terminal, stdout=terminal, stderr=terminal, env=os.environ | {"PYTHONPATH": f"{here}:{here.parents[1]}"},
    ) as launcher:  # fmt: skip
        os.close(terminal)
        end = time.monotonic() + 30
        while not all((tmp_path / f"ready_{rank}").exists() for rank in range(2)):
            assert time.monotonic() < end and launcher.poll() is None
            time.sleep(0.05)
        os.close(master)
        launcher.send_signal(signal.SIGHUP)  # the shell's own
        launcher.wait(70)  # ranks that do not follow are killed after 45 s, and have saved nothing
    assert (tmp_path / "code").read_text() == "143"
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()
