"""The rendezvous: of all ranks, of some of them, and what the others hear when one has ended."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_core.errors import EnvironmentFault
from llm_core.parallel.gate import Gate, GateServer

WORLD = 4


@pytest.fixture
def gates() -> list[Gate]:
    """A rank's end each."""
    server = GateServer("127.0.0.1", WORLD)
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
