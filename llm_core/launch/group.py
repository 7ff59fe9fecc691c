"""One start of the group on this machine: msrun, the workers that it starts, and what becomes of them."""

from __future__ import annotations

import json
import secrets
import selectors
import signal
import socket
import subprocess
import time
from dataclasses import dataclass

from llm_core.launch import failure
from llm_core.launch.arguments import Job
from llm_core.launch.gate import Links
from llm_core.launch.processes import (
    Follower,
    StopSignals,
    environment_of,
    kill_all,
    msrun_command,
    msrun_log,
    set_aside_logs,
    state_of,
)  # fmt: skip

_TICK = 0.2  # seconds
_SETTLE = 3.0  # after a failure: the others may say what they have seen
_ORIGIN = 7.0  # more, after a rank that only tells of another's end: that one is ending, here or on another machine
_QUIET = 1.0  # after the last worker's end: what the scheduler still has to say; after msrun's, a stop signal to us
_USER_ERROR = 2


@dataclass(frozen=True)
class Outcome:
    """How a start ended: exit code, lines to show, and whether another start could end in another way."""

    code: int
    lines: tuple[str, ...] = ()
    worth_another: bool = False


@dataclass
class _Process:
    """The scheduler, or the worker of a rank (`name`); its connection, the real process, and its end."""

    name: str
    link: socket.socket
    pid: int
    status: int | None = None
    lost: bool = False  # its wrapper is gone without a word

    @property
    def end(self) -> int:
        """The status; who is gone without a word was killed."""
        return -signal.SIGKILL if self.status is None else self.status

    @property
    def label(self) -> str:
        return self.name if self.name == "scheduler" else f"rank {self.name}"

    @property
    def log(self) -> str:
        return "scheduler.log" if self.name == "scheduler" else f"worker_{self.name}.log"


class Group:
    """Started once, watched until nothing of it is left.

    job: what to start; address: of node 0, as numbers. links: to the launchers of other nodes. stop: signals of the
    launcher. Where rank 0 is, its log is printed while it grows.
    """

    def __init__(self, job: Job, address: str, links: Links, stop: StopSignals) -> None:
        self.job, self.address, self.links, self.stop = job, address, links, stop
        self.token = secrets.token_hex(16)
        self.processes: dict[str, _Process] = {}
        self.failed: list[_Process] = []  # in the order of their ends
        self.remote: dict | None = None  # the message of a node where something failed
        self.finished_nodes: set[int] = set()
        self.stopping: int | None = None
        self.stopped_elsewhere = False  # the ranks of another node have followed the stop signal
        self.deadline = self.settled = self.quiet = self.orphaned = float("inf")
        self.follower = Follower(job.log_dir / "worker_0.log")
        self.selector = selectors.DefaultSelector()

    def run(self) -> Outcome:
        """Start, wait for the end, and leave no process behind."""
        set_aside_logs(self.job)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0run_llm-{self.token}")  # an abstract name: no file, gone with the process
        listener.listen(self.job.local + 1)
        self.selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
        with listener, open(msrun_log(self.job), "wb") as log:
            msrun = subprocess.Popen(
                msrun_command(self.job, self.address), env=environment_of(self.job, self.token),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            alive: list[_Process] = []
            try:
                while not self._over(msrun):
                    self._turn(_TICK)
                alive = [each for each in self._workers() if each.status is None and not each.lost]
                states = {each.name: state_of(each.pid) for each in alive}
            finally:
                left = kill_all(self.token)
                msrun.wait()
                self.follower.print_new(last=True)
        outcome = self._outcome(msrun.returncode, alive, states)
        if left:
            outcome = Outcome(outcome.code or 1, (*outcome.lines, f"processes that cannot be killed: {left}"))
        self._tell_others(outcome)
        return outcome

    # ---- while it runs ----

    def _turn(self, seconds: float) -> None:
        ready = self.selector.select(seconds)
        if self.stop.first is not None and self.stopping is None:  # before the ends that it may have caused
            self._stop(self.stop.first)
        for key, _ in ready:
            key.data()
        self.follower.print_new()
        for node, message in self.links.receive():
            self._hear(node, message)
        if self.stop.again:
            self.deadline = min(self.deadline, time.monotonic())

    def _over(self, msrun: subprocess.Popen) -> bool:
        now = time.monotonic()
        workers = self._workers()
        idle = all(each.status is not None or each.lost for each in workers)
        ended = idle and len(workers) == self.job.local
        others = self.links.nodes - self.finished_nodes
        if self.remote is not None:
            return ended or now > self.settled
        if failures := self._failures():
            if not all(map(self._follows_another, failures)):
                return ended or now > self.settled
            limit = self.settled + _ORIGIN if self.stopping is None else self.deadline
            return (ended and not others) or now > limit
        if self.stopping is not None and now > self.deadline:
            return True
        if msrun.poll() is not None:
            self.orphaned = min(self.orphaned, now + _QUIET)
            saving = self.stopping is not None and not idle  # a stop signal to all has ended msrun first
            if ended or (now > self.orphaned and not saving):
                return True
        if ended and not (others and self.job.node == 0):
            self.quiet = min(self.quiet, now + _QUIET)
        return now > self.quiet

    def _accept(self, listener: socket.socket) -> None:
        link, _ = listener.accept()
        buffer = bytearray()
        self.selector.register(link, selectors.EVENT_READ, lambda: self._listen(link, buffer))

    def _listen(self, link: socket.socket, buffer: bytearray) -> None:
        data = _receive(link)
        buffer += data
        while b"\n" in buffer:
            line, _, rest = bytes(buffer).partition(b"\n")
            buffer[:] = rest
            self._note(link, json.loads(line))
        if not data:
            self.selector.unregister(link)
            link.close()
            for each in self.processes.values():
                if each.link is link and each.status is None:
                    each.lost = True
                    self._fail(each)

    def _note(self, link: socket.socket, message: dict) -> None:
        if "pid" in message:
            self.processes[message["name"]] = _Process(message["name"], link, message["pid"])
            if self.stopping is not None:
                _send_signal(link, self.stopping)
            return
        process = self.processes[message["name"]]
        process.status = message["status"]
        stop = _stop_signal(process.status)
        works = any(each.status is None for each in self._workers())
        if stop is not None and self.stopping is None and (works or process.name != "scheduler"):
            self._stop(stop)  # somebody stopped this one: the others may save as well
        elif process.status != 0 and (stop is None or self.stopping is None):
            self._fail(process)

    def _fail(self, process: _Process) -> None:
        if process.name == "scheduler" and self._workers() and all(each.status == 0 for each in self._workers()):
            return
        self.failed.append(process)
        self.settled = min(self.settled, time.monotonic() + _SETTLE)

    def _follows_another(self, process: _Process) -> bool:
        return failure.ended_by_another(process.end, self.job.log_dir / process.log)

    def _failures(self) -> list[_Process]:
        """Those that count: at a stop, that one ends before the others is no failure if it has followed the signal."""
        if self.stopping is None or not self.failed:
            return self.failed
        stopped = any(each.status is not None and _stop_signal(each.status) for each in self._workers())
        if not (stopped or self.stopped_elsewhere):
            return self.failed
        return [each for each in self.failed if not self._follows_another(each)]

    def _stop(self, number: int, from_others: bool = False) -> None:
        self.stopping = number
        self.deadline = time.monotonic() + self.job.grace
        for each in self._workers():
            _send_signal(each.link, number)
        if not from_others:  # else node 0 has passed it on
            self.links.send({"stop": number})

    def _hear(self, node: int, message: dict | None) -> None:
        if message is None:
            if node not in self.finished_nodes and self.remote is None:
                where = f"the launcher of node {node} is gone"
                self.remote = {"failed": 1, "lines": [where], "worth_another": True}
                self.settled = min(self.settled, time.monotonic())
        elif message.get("stop") in (signal.SIGINT, signal.SIGTERM) and self.stopping is None:
            self._stop(message["stop"], from_others=True)
        elif "done" in message:
            self.finished_nodes.add(message["done"])
            self.stopped_elsewhere |= message.get("stopped") is True
        elif "failed" in message and self.remote is None:
            self.remote = message
            self.settled = min(self.settled, time.monotonic())

    def _workers(self) -> list[_Process]:
        return [each for name, each in self.processes.items() if name != "scheduler"]

    # ---- when it is over ----

    def _outcome(self, msrun_code: int, alive: list[_Process], states: dict[str, str]) -> Outcome:
        failures = self._failures()
        origins = [each for each in failures if not self._follows_another(each)]
        if origins or (failures and self.remote is None):
            first = (origins or failures)[0]
            again = self.stopping is None and all(each.end != _USER_ERROR for each in failures)
            lines = self._blame(first, alive, states)
            return Outcome(failure.exit_code(first.end), tuple(lines), worth_another=again)
        if self.remote is not None:
            return Outcome(self.remote["failed"], tuple(self.remote["lines"]), self.remote["worth_another"])
        if self.stopping is not None:
            name = signal.Signals(self.stopping).name
            lines = [f"{name}: every rank has ended"]
            if alive:
                names = failure.rank_list(int(each.name) for each in alive)
                lines = [f"{name}: after {self.job.grace} s there was still {names}, which the launcher has killed"]
            return Outcome(128 + self.stopping, tuple(lines))
        workers = self._workers()
        if len(workers) == self.job.local and all(each.status == 0 for each in workers):
            return Outcome(0)
        log = msrun_log(self.job)
        lines = [f"msrun {failure.cause(msrun_code, log)}, with {len(workers)} of {self.job.local} ranks started"]
        return Outcome(failure.exit_code(msrun_code) or 1, (*lines, *failure.quote(log)), worth_another=bool(workers))

    def _blame(self, first: _Process, alive: list[_Process], states: dict[str, str]) -> list[str]:
        """Who failed and why, from the failure that began it, and from those that had not ended seconds later."""
        log_dir = self.job.log_dir
        missing = failure.not_joined(log_dir / "scheduler.log", self.job.ranks) if self.job.node == 0 else []
        if missing:
            lines = [f"{failure.rank_list(missing)} did not join the group within {self.job.timeout} s"]
            here = [rank for rank in missing if rank in self.job.ranks_of(self.job.node)]
            return [*lines, *(failure.quote(log_dir / f"worker_{here[0]}.log") if here else [])]
        lines = [f"{first.label} {failure.cause(first.end, log_dir / first.log)}"]
        others = [int(each.name) for each in self.failed if each is not first and each.name != "scheduler"]
        if others:
            lines.append(f"{failure.rank_list(others)} failed as well")
        lines += failure.quote(log_dir / first.log)
        if alive and failure.waited(log_dir / first.log):
            for each in alive:
                how = "is stopped (SIGSTOP)" if states[each.name] in ("T", "t") else "was still running"
                lines.append(f"{each.label} did not answer: its process {each.pid} {how}")
                lines += failure.quote(log_dir / each.log, 5)
        elif alive:
            names = failure.rank_list(int(each.name) for each in alive)
            lines.append(f"{names} ran on, and the launcher has ended them")
        return lines

    def _tell_others(self, outcome: Outcome) -> None:
        if self.remote is None and outcome.code and self.stopping is None:
            lines = [f"node {self.job.node}: {line}" for line in outcome.lines]
            self.links.send({"failed": outcome.code, "lines": lines, "worth_another": outcome.worth_another})
        else:
            stopped = self.stopping is not None and outcome.code == 128 + self.stopping
            self.links.send({"done": self.job.node, "stopped": stopped})
        self.links.close()


def _stop_signal(status: int) -> int | None:
    """The stop signal that a process followed: it says so by its code, or died of it before it could."""
    number = -status if status < 0 else status - 128
    return number if number in (signal.SIGTERM, signal.SIGINT) else None


def _send_signal(link: socket.socket, number: int) -> None:
    try:
        link.sendall(bytes([number]))
    except OSError:
        pass  # _listen sees that it is gone


def _receive(link: socket.socket) -> bytes:
    try:
        return link.recv(65536)
    except OSError:
        return b""
