"""Where ranks wait for each other as long as it takes, and exchange a few bytes: a rendezvous over TCP.

MindSpore's collectives on a CPU fail when a rank is 30 s late. Compiling and saving take ranks unequal times, so they
meet here first, all of them or those that compute together. Rank 0 serves; every rank, rank 0 too, is a client with one
connection. A rank that ends while others wait is reported to them by its number.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress

from llm_core.errors import EnvironmentFault

_LENGTH = struct.Struct("!Q")
_CONNECT_SECONDS = 60.0
_GREETING = 4096  # bytes at most: it comes from anybody who finds the port


class GateServer:
    """Rank 0's end: answers a meeting's members when all of them have come. world: the number of all ranks."""

    def __init__(self, host: str, world: int) -> None:
        self.token = secrets.randbits(62)
        self._all = list(range(world))
        self._listener = socket.create_server((host, 0), backlog=world)
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._members: dict[int, socket.socket] = {}
        self._meetings: dict[str, dict[int, str]] = {}
        self._gone: int | None = None
        threading.Thread(target=self._accept, name="gate", daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """One client's messages, until it is gone."""
        try:
            hello = _receive(connection, _GREETING)
        except (OSError, ValueError, RecursionError):
            hello = None
        if not isinstance(hello, dict) or hello.get("token") != self.token:
            connection.close()
            return
        rank = int(hello["rank"])
        with self._lock:
            self._members[rank] = connection
        try:
            while (message := _receive(connection)) is not None:
                self._arrive(rank, message)
        except OSError:
            pass
        self._leave(rank)

    def _arrive(self, rank: int, message: dict) -> None:
        with self._lock:
            members = message["of"] or self._all
            meeting = self._meetings.setdefault(message["name"], {})
            meeting[rank] = message["value"]
            if self._gone is not None:
                self._answer(rank, {"gone": self._gone})
            elif len(meeting) == len(members):
                del self._meetings[message["name"]]
                values = [meeting[i] for i in members]
                for member in members:
                    self._answer(member, {"values": values})

    def _leave(self, rank: int) -> None:
        """Tell those who wait, now and later, that one will never come."""
        with self._lock:
            self._gone = rank if self._gone is None else self._gone
            for waiting in {member for meeting in self._meetings.values() for member in meeting}:
                self._answer(waiting, {"gone": self._gone})

    def _answer(self, rank: int, message: dict) -> None:
        """Send to a rank, or to nobody where it has ended: then its own thread says so."""
        with suppress(OSError):
            _send(self._members[rank], message)


class Gate:
    """A rank's end of the rendezvous."""

    def __init__(self, host: str, port: int, token: int, rank: int) -> None:
        self._rank = rank
        self._connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
        self._connection.settimeout(None)
        _send(self._connection, {"token": token, "rank": rank})

    def meet(self, name: str, value: str = "", of: Sequence[int] = ()) -> list[str]:
        """Wait until all ranks `of` (default every rank) have come to the meeting `name`; returns their values in that
        order.

        They hold the same meetings in the same order. Raises EnvironmentFault when a rank of the run has ended.
        """
        try:
            _send(self._connection, {"name": name, "value": value, "of": list(of)})
            answer = _receive(self._connection)
        except OSError:
            answer = None
        if answer is None:
            raise EnvironmentFault(f"rank {self._rank}: rank 0 has ended; its log says why")
        if "gone" in answer:
            raise EnvironmentFault(f"rank {self._rank}: rank {answer['gone']} has ended; its log says why")
        return answer["values"]


def _send(connection: socket.socket, message: dict) -> None:
    content = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(content)) + content)


def _receive(connection: socket.socket, limit: int | None = None) -> dict | None:
    """The next message; None when the other end is closed. ValueError for one of more bytes than the limit."""
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    length = _LENGTH.unpack(head)[0]
    if limit is not None and length > limit:
        raise ValueError(f"a message of {length} bytes")
    content = _exactly(connection, length)
    return None if content is None else json.loads(content)


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    received = bytearray()
    while len(received) < count:
        piece = connection.recv(min(count - len(received), 1 << 20))
        if not piece:
            return None
        received += piece
    return bytes(received)
