"""The rendezvous: of all ranks, of some of them, and what the others hear when one has ended."""

from __future__ import annotations

import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_core.errors import EnvironmentFault
from llm_core.parallel.gate import Gate, GateServer

WORLD = 4


@pytest.fixture
def server() -> GateServer:
    """Rank 0's end."""
    return GateServer("127.0.0.1", WORLD)


@pytest.fixture
def gates(server: GateServer) -> list[Gate]:
    """A rank's end each."""
    return [Gate("127.0.0.1", server.port, server.token, rank) for rank in range(WORLD)]


def on_all(work) -> list:
    """work(rank) on every rank at the same time."""
    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(work, range(WORLD), timeout=60))


def test_groups_meet_as_often_as_they_like_between_meetings_of_all(gates):
    def work(rank: int) -> list[list[str]]:
        group = (0, 1) if rank < 2 else (2, 3)
        heard = [gates[rank].meet(f"{group} {i}", f"{rank}.{i}", group) for i in range(3 if rank < 2 else 1)]
        return [*heard, gates[rank].meet("all", str(rank))]

    every = ["0", "1", "2", "3"]
    first = [*([f"0.{i}", f"1.{i}"] for i in range(3)), every]
    assert on_all(work) == [first, first, *[[["2.0", "3.0"], every]] * 2]


def test_one_that_has_ended_is_named_to_those_who_wait(gates):
    def work(rank: int) -> str:
        if rank == 2:
            gates[2]._connection.shutdown(socket.SHUT_RDWR)
            return ""
        with pytest.raises(EnvironmentFault) as fault:
            gates[rank].meet("all" if rank == 3 else "two", "", () if rank == 3 else (0, 1, 2))
        return str(fault.value)

    heard = [f"rank {rank}: rank 2 has ended; its log says why" for rank in range(WORLD)]
    heard[2] = ""
    assert on_all(work) == heard


def test_a_lost_connection_is_not_that_of_the_rank_that_came_last(server, gates):
    """Rank 1's breaks while it waits; the server finds that out when it answers the meeting that rank 3 completes."""
    for gate in gates:
        gate._connection.settimeout(20)  # not for ever, should nobody answer

    def work(rank: int) -> list[str] | str:
        if rank == 3:
            while len(server._meetings.get("all", ())) < WORLD - 1:
                time.sleep(0.01)
            server._members[1].shutdown(socket.SHUT_WR)
        try:
            return gates[rank].meet("all", str(rank))
        except EnvironmentFault as fault:
            return str(fault)

    every = ["0", "1", "2", "3"]
    assert on_all(work) == [every, "rank 1: rank 0 has ended; its log says why", every, every]
    assert gates[3].meet("alone", "x", (3,)) == ["x"]


@pytest.mark.parametrize("content", [struct.pack("!Q", 1 << 40), struct.pack("!Q", 4097) + b" " * 4096])
def test_a_stranger_cannot_make_rank_0_hold_more_than_a_greeting(server, gates, content):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as stranger:
        stranger.sendall(content)
        try:
            assert stranger.recv(1) == b""  # closed at once, whatever was still to come
        except ConnectionResetError:
            pass
    assert on_all(lambda rank: gates[rank].meet("all", str(rank)))[2] == ["0", "1", "2", "3"]
