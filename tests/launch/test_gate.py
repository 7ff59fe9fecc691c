"""Launchers of several machines meeting: here threads with an address of this machine."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from llm_core.errors import EnvironmentFault
from llm_core.launch.arguments import Job
from llm_core.launch.gate import Links, Stopped, meet

HERE = "127.0.0.1"


def free_port() -> int:
    with socket.create_server((HERE, 0)) as server:
        return server.getsockname()[1]


def never() -> None:
    return None


def gather(jobs: list[Job]) -> list:
    """What `meet` gives, or raises, for each job, all at once."""
    results: list = [None] * len(jobs)

    def one(index: int) -> None:
        try:
            results[index] = meet(jobs[index], HERE, lambda line: None, never)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def nodes(count: int, *present: int, timeout: int = 10, local: int = 2) -> list[Job]:
    port = free_port()
    return [Job(("x",), count * local, local, HERE, port, node, timeout=timeout) for node in present]


def heard(links: Links, count: int) -> list:
    found, end = [], time.monotonic() + 10
    while len(found) < count and time.monotonic() < end:
        found += links.receive()
        time.sleep(0.01)
    return found


def test_all_meet_whoever_comes_first_and_hear_of_each_other():
    first, second, third = gather(nodes(3, 0, 1, 2))
    assert first.nodes == {1, 2} and second.nodes == third.nodes == {0}
    second.send({"failed": 3})
    assert heard(first, 1) == [(1, {"failed": 3})] and heard(third, 1) == [(0, {"failed": 3})]  # passed on
    assert second.receive() == []
    third.close()
    assert heard(first, 1) == [(2, None)]
    first.close()
    assert heard(second, 1) == [(0, None)]


def test_the_scheduler_can_listen_there_afterwards():
    jobs = nodes(2, 0, 1)
    gather(jobs)
    socket.create_server((HERE, jobs[0].port)).close()


def test_missing_nodes_are_named_on_every_machine():
    first, second = gather(nodes(4, 0, 2, timeout=2))
    for error in (first, second):
        assert isinstance(error, EnvironmentFault) and "ranks 2-3 and 6-7 (NODE_RANK 1, 3 of 4 nodes)" in str(error)
    (alone,) = gather(nodes(2, 1, timeout=1))
    assert isinstance(alone, EnvironmentFault) and "ranks 0-1 (NODE_RANK 0)" in str(alone)


def test_a_machine_that_means_something_else_is_refused():
    good = nodes(2, 0, 1, timeout=2)
    other = Job(("x",), 8, 4, HERE, good[0].port, 1, timeout=2)
    first, second = gather([good[0], other])
    assert "N 8 and LOCAL_N 4, but node 0 has 4 and 2" in str(second)
    assert isinstance(first, EnvironmentFault)
    three = nodes(3, 0, 1, 1, timeout=2)
    assert any("NODE_RANK 1 is taken" in str(result) for result in gather(three))


def test_strangers_do_not_disturb():
    jobs = nodes(2, 0, 1)
    stranger = threading.Thread(target=_stranger, args=(jobs[0].port,))
    stranger.start()
    first, second = gather(jobs)
    stranger.join()
    assert first.nodes == {1} and second.nodes == {0}


def _stranger(port: int) -> None:
    for _ in range(50):
        try:
            with socket.create_connection((HERE, port), timeout=5) as link:
                link.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return
        except OSError:
            time.sleep(0.02)


def test_a_stop_signal_ends_the_wait():
    (job,) = nodes(2, 0)
    with pytest.raises(Stopped):
        meet(job, HERE, lambda line: None, lambda: True)


def test_the_others_hear_that_the_first_was_stopped():
    jobs, stop, results = nodes(3, 0, 1), threading.Event(), {}

    def one(job: Job, stopped) -> None:
        try:
            meet(job, HERE, lambda line: None, stopped)
        except (Stopped, EnvironmentFault) as error:
            results[job.node] = error

    threads = [threading.Thread(target=one, args=args) for args in zip(jobs, (stop.is_set, never), strict=True)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert isinstance(results[0], Stopped) and "node 0 was stopped" in str(results[1])


def test_a_machine_may_come_again():
    jobs = nodes(3, 0, 1, 2)
    greeting = b'{"node": 1, "ranks": 6, "local": 2}\n'
    results: list = []
    first = threading.Thread(target=lambda: results.append(meet(jobs[0], HERE, lambda line: None, never)))
    first.start()
    for _ in range(2):  # the third time it is `gather`
        for _ in range(100):
            try:
                with socket.create_connection((HERE, jobs[0].port), timeout=5) as link:
                    link.sendall(greeting)
                    time.sleep(0.5)
                break
            except OSError:
                time.sleep(0.02)
    second, third = gather(jobs[1:])
    first.join(30)
    assert results[0].nodes == {1, 2} and second.nodes == third.nodes == {0}


def test_the_first_machine_decides_whether_to_resume():
    jobs, results = nodes(2, 0, 1), {}

    def one(job: Job) -> None:
        results[job.node] = meet(job, HERE, lambda line: None, never, resume=job.node == 0).resume

    threads = [threading.Thread(target=one, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {0: True, 1: True}


def test_one_machine_waits_for_nobody():
    assert meet(Job(("x",), 2, 2), HERE, lambda line: None, never).nodes == set()
