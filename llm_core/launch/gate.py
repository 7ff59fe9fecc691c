"""Where the launchers of several machines meet before they start anything, and what they tell each other afterwards.

They meet at the scheduler's own address and port, which is free until all are there; the connections stay open, so that
a failure or a stop signal on one machine is known on all of them at once. Messages are lines of JSON.
"""

from __future__ import annotations

import errno
import json
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from llm_core.errors import EnvironmentFault
from llm_core.launch.arguments import Job
from llm_core.launch.failure import rank_list

_PORT_SECONDS = 10.0  # for a port that is in use to become free

Message = dict[str, Any]
_REMIND = 60.0  # seconds between two lines about who is missing


class Stopped(Exception):
    """A stop signal came while the launcher waited for the others."""


class Links:
    """Connections to the launchers of other nodes: node 0 has one to each, the others one to node 0.

    A message that node 0 receives it passes on to the rest, so everybody hears of everything. resume: what node 0 has
    decided of this start, for all.
    """

    def __init__(self, sockets: dict[int, socket.socket], resume: bool = False) -> None:
        self.resume = resume
        self._sockets = sockets
        self._rest = dict.fromkeys(sockets, b"")

    @property
    def nodes(self) -> set[int]:
        """Nodes that are connected."""
        return set(self._sockets)

    def send(self, message: Message, but: int | None = None) -> None:
        """To all who are connected, except one."""
        for node, link in self._sockets.items():
            if node != but:
                _send(link, message)

    def receive(self) -> list[tuple[int, Message | None]]:
        """What has come since the last call, as (node, message); None: that node's launcher is gone, or raves."""
        found: list[tuple[int, Message | None]] = []
        for node, link in list(self._sockets.items()):
            while select.select([link], [], [], 0)[0]:
                data = _receive(link)
                *lines, self._rest[node] = (self._rest[node] + data).split(b"\n")
                messages = [_decoded(line) for line in lines]
                if not data or None in messages:
                    del self._sockets[node]
                    link.close()
                    found.append((node, None))
                    break
                found += [(node, message) for message in messages]
        for node, message in found:
            if message is not None:
                self.send(message, but=node)
        return found

    def close(self) -> None:
        """End all connections."""
        for link in self._sockets.values():
            link.close()
        self._sockets.clear()


def meet(
    job: Job, address: str, say: Callable[[str], None], stopped: Callable[[], object], resume: bool = False
) -> Links:
    """Wait until the launchers of all nodes are here.

    `say` gets a line about those that are missing now and then. EnvironmentFault names the ranks that have not come
    within the job's timeout, Stopped ends the wait when `stopped()` is true. resume: node 0's word counts.
    """
    if job.nodes == 1:
        return Links({}, resume)
    if job.node == 0:
        return _receive_others(job, address, say, stopped, resume)
    return _join_first(job, address, say, stopped)


def _receive_others(
    job: Job, address: str, say: Callable[[str], None], stopped: Callable[[], object], resume: bool
) -> Links:
    server = _server(job, address)
    present: dict[int, socket.socket] = {}
    refusal = "node 0 has failed"
    try:
        with server:
            for waited in _turns(job.timeout, stopped):
                _drop_gone(present)
                if len(present) == job.nodes - 1:
                    break
                missing = _missing(job, present)
                if waited:
                    say(f"waiting for {missing}")
                if select.select([server], [], [], 0.2)[0]:
                    _welcome(job, server, present)
            else:
                refusal = f"after {job.timeout} s there is no {_missing(job, present)}"
                raise EnvironmentFault(
                    f"{refusal}: start the same command there, with its own NODE_RANK; it must reach "
                    f"{address}:{job.port}"
                )
    except BaseException as error:
        for link in present.values():
            _send(link, {"refused": "node 0 was stopped" if isinstance(error, Stopped) else refusal})
            link.close()
        raise
    links = Links(present, resume)
    links.send({"go": True, "resume": resume})
    return links


def _drop_gone(present: dict[int, socket.socket]) -> None:
    """Forget launchers that have ended while they waited: somebody may start them again."""
    for node, link in list(present.items()):
        try:
            gone = not link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:  # it waits
            gone = False
        except OSError:
            gone = True
        if gone:
            present.pop(node).close()


def _turns(timeout: float, stopped: Callable[[], object]) -> Any:
    """Until the time is over; each value tells whether another reminder is due."""
    start = reminded = time.monotonic()
    while (now := time.monotonic()) < start + timeout:
        if stopped():
            raise Stopped
        due = now - reminded >= _REMIND
        if due:
            reminded = now
        yield due


def _missing(job: Job, present: dict[int, socket.socket]) -> str:
    nodes = [node for node in range(1, job.nodes) if node not in present]
    ranks = rank_list(rank for node in nodes for rank in job.ranks_of(node))
    return f"{ranks} (NODE_RANK {', '.join(map(str, nodes))} of {job.nodes} nodes)"


def _welcome(job: Job, server: socket.socket, present: dict[int, socket.socket]) -> None:
    """Take in who has come, if that is a launcher of this very job."""
    link, (host, *_) = server.accept()
    link.settimeout(5)
    try:
        hello = json.loads(_line(link))
        node, sizes = int(hello["node"]), (hello["ranks"], hello["local"])
    except (OSError, ValueError, KeyError, TypeError):  # a port scanner, say
        link.close()
        return
    _drop_gone(present)
    refusal = ""
    if sizes != (job.ranks, job.local):
        refusal = f"N {sizes[0]} and LOCAL_N {sizes[1]}, but node 0 has {job.ranks} and {job.local}"
    elif node in present or not 0 < node < job.nodes:
        refusal = f"NODE_RANK {node} is taken; every machine needs its own, 0 to {job.nodes - 1}"
    if refusal:
        _send(link, {"refused": f"{host}: {refusal}"})
        link.close()
        return
    _watch(link)
    present[node] = link


def _join_first(job: Job, address: str, say: Callable[[str], None], stopped: Callable[[], object]) -> Links:
    reason = "no answer"
    for waited in _turns(job.timeout, stopped):
        if waited:
            say(f"waiting for node 0 at {address}:{job.port}: {reason}")
        try:
            link = socket.create_connection((address, job.port), timeout=5)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.3)
            continue
        _send(link, {"node": job.node, "ranks": job.ranks, "local": job.local})
        answer = _await_answer(link, job, stopped)
        if answer is None:  # what listened there was not a launcher: the scheduler of an earlier start, perhaps
            link.close()
            reason = "what listens there is no launcher of this job"
            time.sleep(0.3)
            continue
        if "refused" in answer:
            link.close()
            raise EnvironmentFault(f"node 0 at {address}:{job.port}: {answer['refused']}")
        _watch(link)
        return Links({0: link}, answer.get("resume") is True)
    first = rank_list(job.ranks_of(0))
    raise EnvironmentFault(
        f"after {job.timeout} s there is no {first} (NODE_RANK 0) at {address}:{job.port}: {reason}"
    )


def _await_answer(link: socket.socket, job: Job, stopped: Callable[[], object]) -> Message | None:
    """The first line of node 0; None if the connection ends before."""
    link.settimeout(None)
    for _ in _turns(job.timeout + 30, stopped):
        if select.select([link], [], [], 0.2)[0]:
            try:
                link.settimeout(5)
                return json.loads(_line(link))
            except (OSError, ValueError):
                return None
    return None


def _watch(link: socket.socket) -> None:
    """A machine that has lost its power says nothing: ask it every few seconds."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _line(link: socket.socket) -> bytes:
    """Up to the first line feed, which every message ends with; no byte more, they belong to the next one. OSError."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 4096:
        byte = link.recv(1)
        if not byte:
            raise ConnectionResetError
        line += byte
    return line


def _server(job: Job, address: str) -> socket.socket:
    """Listens at ADDR:PORT. The scheduler of the start before may hold the port for a moment longer."""
    end = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            return socket.create_server((address, job.port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                raise EnvironmentFault(f"port {job.port} of {job.address}: {error.strerror}") from None
        time.sleep(0.2)


def _decoded(line: bytes) -> Message | None:
    """The message; None where the line holds none, as nobody but a launcher's own words may come here."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _send(link: socket.socket, message: Message) -> None:
    try:
        link.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # receive() will see that it is gone


def _receive(link: socket.socket) -> bytes:
    try:
        return link.recv(65536)
    except OSError:
        return b""
