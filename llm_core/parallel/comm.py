"""Communication between the ranks of a run: the one file that touches MindSpore's collectives.

Within graphs: Cells over a group of ranks. Between graphs: `Comm`'s methods. On a CPU MindSpore has AllReduce for any
group and little else, so the others are made of it; on other devices they are the real ones (not verified there).
A group is a sorted tuple of ranks. A group of one rank costs nothing: its Cells return their argument.
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from llm_core.errors import EnvironmentFault, UserError
from llm_core.parallel.gate import Gate, GateServer
from llm_core.parallel.layout import Layout, Place

Group = tuple[int, ...]

MOST_BYTES = 8 << 20  # in one collective: MindSpore's on a CPU hang or die at some 24 MB a rank
_BYTES = 4


class Comm:
    """This process's place among the ranks of `layout`; made once, by all ranks together.

    Raises UserError where the number of started processes is not that of the layout.
    """

    def __init__(self, layout: Layout) -> None:
        from mindspore import communication

        communication.init()
        self.layout = layout
        self.rank, world = communication.get_rank(), communication.get_group_size()
        if world != layout.world:
            raise UserError(
                f"parallel_config: data_parallel {layout.dp} x model_parallel {layout.tp} x pipeline_stage {layout.pp} "
                f"= {layout.world} ranks, and {world} are started: change one of them"
            )
        self.place = layout.place(self.rank)
        self.world: Group = tuple(range(world))
        self._gate = _open_gate(self.rank, self.world)
        self._meetings: Counter[Group] = Counter()

    def gate(self, value: str = "", group: Group | None = None) -> list[str]:
        """Wait for all ranks (of the group), however long they take; returns what each has brought, by rank."""
        group = group or self.world
        self._meetings[group] += 1
        return self._gate.meet(f"{group} {self._meetings[group]}", value, group)

    def of_replicas(self, value: Any) -> list[Any]:
        """What each dp rank of the last stage has brought (anything JSON holds), on all ranks; a `gate`."""
        values = self.gate(json.dumps(value))
        last = self.layout.pp - 1
        return [json.loads(values[self.layout.rank(Place(last, i, 0))]) for i in range(self.layout.dp)]

    def sum(self, values: Sequence[float], group: Group | None = None) -> list[float]:
        """Each number summed over the group (default all ranks), exact for whole numbers below 2^40."""
        numbers = np.asarray(values, np.float64)
        high = np.floor(numbers / 65536)
        both = np.concatenate([high, numbers - high * 65536]).astype(np.float32)
        total = _sum_cell(group or self.world)(Tensor(both)).asnumpy().astype(np.float64)
        return list(total[: len(numbers)] * 65536 + total[len(numbers) :])

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return self.sum([float(flag)])[0] > 0


def _open_gate(rank: int, world: Group) -> Gate:
    """The rendezvous of all ranks. Its address goes round by a collective, as numbers that float32 holds exactly."""
    host = _own_address()
    server = GateServer(host, len(world)) if rank == 0 else None
    numbers = np.zeros(9, np.float32)
    if server is not None:
        parts = [(server.token >> (16 * i)) & 0xFFFF for i in range(4)]
        numbers[:] = [*map(int, host.split(".")), server.port, *parts]
    numbers = [int(number) for number in _sum_cell(world)(Tensor(numbers)).asnumpy()]
    token = sum(part << (16 * i) for i, part in enumerate(numbers[5:]))
    try:
        return Gate(".".join(map(str, numbers[:4])), numbers[4], token, rank)
    except OSError as error:
        raise EnvironmentFault(
            f"rank {rank} cannot reach rank 0 at {'.'.join(map(str, numbers[:4]))}:{numbers[4]}: {error}; ranks need "
            "open TCP ports between their machines"
        ) from None


def _own_address() -> str:
    """This machine's IPv4 address as the machine of the scheduler sees it."""
    scheduler = os.environ.get("MS_SCHED_HOST", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((scheduler, int(os.environ.get("MS_SCHED_PORT", "8118"))))
        return probe.getsockname()[0]


@cache
def _name(group: Group) -> str:
    """MindSpore's name of a group, made at its first use: by all of its members."""
    from mindspore import communication

    if len(group) == communication.get_group_size():
        return communication.GlobalComm.WORLD_COMM_GROUP
    name = "ranks_" + "_".join(map(str, group))
    communication.create_group(name, list(group))
    return name


@cache
def _sum_cell(group: Group) -> nn.Cell:
    return Sum(group)


def on_cpu() -> bool:
    """Whether collectives beside AllReduce have to be made of it."""
    return ms.get_context("device_target") == "CPU"


# ---- Cells


class Sum(nn.Cell):
    """x fp32 of any shape -> the sum over the group, on all of its ranks. Not to be differentiated."""

    def __init__(self, group: Group) -> None:
        super().__init__(auto_prefix=False)
        self.alone = len(group) == 1
        self.reduce = None if self.alone else ops.AllReduce(group=_name(group))
        self.most = MOST_BYTES // _BYTES

    def construct(self, x: Tensor) -> Tensor:
        if self.alone:
            return x
        if x.size <= self.most:
            return self.reduce(x)
        flat, done = x.reshape(-1), ()
        for begin in range(0, x.size, self.most):
            done = done + (self.reduce(flat[begin : min(begin + self.most, x.size)]),)
        return ops.concat(done).reshape(x.shape)


class SumForward(nn.Cell):
    """Sum over the group; its gradient passes as it is (Megatron's g): behind a layer cut by its inputs."""

    def __init__(self, group: Group) -> None:
        super().__init__(auto_prefix=False)
        self.sum = Sum(group)

    def construct(self, x):
        return self.sum(x)

    def bprop(self, x, out, dout):
        return (dout,)


class SumBackward(nn.Cell):
    """x as it is; its gradient is summed over the group (Megatron's f): before layers cut by their outputs."""

    def __init__(self, group: Group) -> None:
        super().__init__(auto_prefix=False)
        self.sum = Sum(group)

    def construct(self, x):
        return x

    def bprop(self, x, out, dout):
        return (self.sum(dout),)


class Gather(nn.Cell):
    """The parts x [n, ...] of all ranks, one below the other: [len(group) * n, ...]. Not to be differentiated."""

    def __init__(self, group: Group, rank: int) -> None:
        super().__init__(auto_prefix=False)
        self.count, self.index = len(group), group.index(rank)
        self.sum = Sum(group)
        self.gather = None if self.count == 1 or on_cpu() else ops.AllGather(group=_name(group))

    def construct(self, x: Tensor) -> Tensor:
        if self.count == 1:
            return x
        if self.gather is not None:
            return self.gather(x)
        parts = ()
        for i in range(self.count):
            parts = parts + (x if i == self.index else ops.zeros_like(x),)
        return self.sum(ops.concat(parts))


class ReduceScatter(nn.Cell):
    """Of the sum over the group of x [len(group) * n, ...] this rank's rows [n, ...]. Not to be differentiated."""

    def __init__(self, group: Group, rank: int) -> None:
        super().__init__(auto_prefix=False)
        self.count, self.index = len(group), group.index(rank)
        self.sum = Sum(group)
        self.scatter = None if self.count == 1 or on_cpu() else ops.ReduceScatter(group=_name(group))

    def construct(self, x: Tensor) -> Tensor:
        if self.count == 1:
            return x
        if self.scatter is not None:
            return self.scatter(x)
        rows = x.shape[0] // self.count
        return self.sum(x)[self.index * rows : (self.index + 1) * rows]


class RowsOfSum(nn.Cell):
    """x [R, ...] -> the rows of its sum over the ranks `summed` that belong to this one of the `replicas`, which are
    among them. Not to be differentiated."""

    def __init__(self, summed: Group, replicas: Group, rank: int) -> None:
        super().__init__(auto_prefix=False)
        self.all_replicas = summed == replicas
        self.scatter, self.sum = ReduceScatter(replicas, rank), Sum(summed)
        self.count, self.index = len(replicas), replicas.index(rank)

    def construct(self, x: Tensor) -> Tensor:
        if self.all_replicas:
            return self.scatter(x)
        rows = x.shape[0] // self.count
        return self.sum(x)[self.index * rows : (self.index + 1) * rows]


class GatherRows(nn.Cell):
    """Rows [n, ...] of every rank -> all rows, on all ranks. The gradient is summed over the ranks, each of which used
    all rows for something of its own; with `same_use` they all did the same, and it is only cut."""

    def __init__(self, group: Group, rank: int, same_use: bool = False) -> None:
        super().__init__(auto_prefix=False)
        self.gather, self.scatter = Gather(group, rank), ReduceScatter(group, rank)
        self.count, self.index, self.same_use = len(group), group.index(rank), same_use

    def construct(self, x):
        return self.gather(x)

    def bprop(self, x, out, dout):
        if not self.same_use:
            return (self.scatter(dout),)
        rows = dout.shape[0] // self.count
        return (dout[self.index * rows : (self.index + 1) * rows],)


class SumRows(nn.Cell):
    """x [N, ...], a part of a sum on every rank -> this rank's rows of the sum; `same_use` as in `GatherRows`: x is the
    same on all ranks, and is only cut."""

    def __init__(self, group: Group, rank: int, same_use: bool = False) -> None:
        super().__init__(auto_prefix=False)
        self.gather, self.scatter = Gather(group, rank), ReduceScatter(group, rank)
        self.count, self.index, self.same_use = len(group), group.index(rank), same_use

    def construct(self, x):
        if not self.same_use:
            return self.scatter(x)
        rows = x.shape[0] // self.count
        return x[self.index * rows : (self.index + 1) * rows]

    def bprop(self, x, out, dout):
        return (self.gather(dout),)


class Exchange(nn.Cell):
    """Two ranks give each other something at the same time: mine fp32 -> theirs, of shape `their_shape`.

    Blocks until both have come, so an order of exchanges that could lock up does so on a CPU too.
    """

    def __init__(self, peer: int, rank: int, own_shape: tuple[int, ...], their_shape: tuple[int, ...]) -> None:
        super().__init__(auto_prefix=False)
        self.first = rank < peer
        self.shape = their_shape
        self.size = int(np.prod(their_shape))
        self.sum = Sum(tuple(sorted((peer, rank))))
        self.empty = Tensor(np.zeros(self.size, np.float32))

    def construct(self, mine: Tensor) -> Tensor:
        flat = mine.reshape(-1)
        both = ops.concat((flat, self.empty) if self.first else (self.empty, flat))
        both = self.sum(both)
        theirs = both[both.shape[0] - self.size :] if self.first else both[: self.size]
        return theirs.reshape(self.shape)
