"""Who computes what when in a pipeline, and who meets whom: one forward, one backward (1F1B). Pure, without MindSpore.

With chunks = 1 the order is that of PipeDream-Flush: a stage runs ahead by as many forwards as there are stages behind
it, then alternates. With chunks > 1 it is the interleaved one of arXiv 2104.04473, where stage s has the pieces s,
s + pp, s + 2 pp ... of the model.

Two stages exchange at a rendezvous, where both must come and wait for the other. The order of all meetings is found by
playing the whole pipeline once, with a clock: stages meet only between two computations, give what they have before
they go on, and what travels both ways at that moment goes in one exchange. Each stage's list is its own part of that
one sequence of events. So it cannot lock up: of the events that are not over, the first one has nobody to wait for.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from itertools import chain
from typing import NamedTuple

FORWARD, BACKWARD = "forward", "backward"
DURATION = {FORWARD: 1, BACKWARD: 3}  # for the clock alone: a backward does its forward again, and is twice as long


class Compute(NamedTuple):
    """A stage computes: the forward or backward of a micro-batch through one of its chunks, each counted from 0."""

    kind: str
    micro_batch: int
    chunk: int


class Message(NamedTuple):
    """What travels between stages: hidden states (forward) or their gradient (backward), for a piece of the model.

    piece: the one that it is for, 0 .. pp * chunks - 1; chunk c of stage s is the piece c * pp + s.
    """

    kind: str
    micro_batch: int
    piece: int


class Meet(NamedTuple):
    """A stage meets another one; blocks until both have come. At least one of them gives something."""

    peer: int
    sends: Message | None
    receives: Message | None


Action = Compute | Meet


@cache
def schedule(pp: int, micro_batches: int, chunks: int = 1, backward: bool = True) -> tuple[tuple[Action, ...], ...]:
    """The actions of every stage, in order. backward False: of an evaluation, forwards alone.

    Where pp is 1, messages do not travel, and there are no meetings. Gradients of a chunk come in the order of the
    micro-batches, so that their sum is that of one process.
    """
    orders = [deque(compute_order(pp, stage, micro_batches, chunks, backward)) for stage in range(pp)]
    actions: list[list[Action]] = [[] for _ in range(pp)]
    arrived: set[Message] = set()
    outbox: list[Message | None] = [None] * pp  # a stage has given what it computed before it computes more
    ends: dict[int, tuple[int, Compute]] = {}  # of the stages that compute: when, and what
    clock = 0
    while any(orders) or ends:  # what a stage gives is somebody's input, so nothing is left in an outbox
        for a, b in _neighbours(pp, chunks):
            if a not in ends and b not in ends:
                _meet(a, b, pp, outbox, actions, arrived)
        for stage in set(range(pp)) - ends.keys():
            if outbox[stage] is None and orders[stage]:
                needed = needs(orders[stage][0], pp, stage, chunks)
                if needed is None or needed in arrived:
                    work = orders[stage].popleft()
                    actions[stage].append(work)
                    ends[stage] = clock + DURATION[work.kind], work
        clock = min(end for end, _ in ends.values())
        for stage in [stage for stage, (end, _) in ends.items() if end == clock]:
            outbox[stage] = gives(ends.pop(stage)[1], pp, stage, chunks)
            if pp == 1 and outbox[0] is not None:
                arrived.add(outbox[0])
                outbox[0] = None
    return tuple(map(tuple, actions))


def compute_order(pp: int, stage: int, micro_batches: int, chunks: int = 1, backward: bool = True) -> list[Compute]:
    """What a stage computes, in order: forwards to warm up, then in turn one forward and one backward, the rest."""
    groups = _groups(pp, micro_batches, chunks)
    forwards = [Compute(FORWARD, m, c) for group in groups for c in range(chunks) for m in group]
    if not backward:
        return forwards
    backwards = [Compute(BACKWARD, m, c) for group in groups for c in reversed(range(chunks)) for m in group]
    ahead = min(warm_up(pp, stage, micro_batches, chunks), len(forwards))
    pairs = zip(forwards[ahead:], backwards, strict=False)
    return [*forwards[:ahead], *chain.from_iterable(pairs), *backwards[len(forwards) - ahead :]]


def warm_up(pp: int, stage: int, micro_batches: int, chunks: int = 1) -> int:
    """Forwards before the first pair of a forward and a backward; one more is the most inputs that a stage keeps."""
    behind = pp - stage - 1
    if chunks == 1:
        return behind
    return 2 * behind + (chunks - 1) * max(map(len, _groups(pp, micro_batches, chunks)))


def _groups(pp: int, micro_batches: int, chunks: int) -> list[range]:
    """Micro-batches that go through a chunk one behind the other before the stage turns to its next chunk.

    A group of at least pp keeps the stages busy. Where pp does not divide their number, the first are a little larger.
    """
    if chunks == 1:
        return [range(micro_batches)]
    count = max(micro_batches // pp, 1)
    ends = [-(-micro_batches * i // count) for i in range(count + 1)]
    return [range(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]


def needs(work: Compute, pp: int, stage: int, chunks: int) -> Message | None:
    """What has to have come before the computation; None for the model's first input and the loss's own gradient."""
    piece = work.chunk * pp + stage
    is_end = piece == (0 if work.kind == FORWARD else pp * chunks - 1)
    return None if is_end else Message(work.kind, work.micro_batch, piece)


def gives(work: Compute, pp: int, stage: int, chunks: int) -> Message | None:
    """What comes out of it for another piece; None behind the loss, and of the model's first input."""
    piece = work.chunk * pp + stage + (1 if work.kind == FORWARD else -1)
    return Message(work.kind, work.micro_batch, piece) if 0 <= piece < pp * chunks else None


def _neighbours(pp: int, chunks: int) -> list[tuple[int, int]]:
    """Pairs of stages that exchange: first those that can do so at the same time."""
    pairs = [(stage, stage + 1) for stage in range(pp - 1)]
    if chunks > 1 and pp > 2:
        pairs.append((pp - 1, 0))
    return pairs[::2] + pairs[1::2]


def _meet(
    a: int, b: int, pp: int, outbox: list[Message | None], actions: list[list[Action]], arrived: set[Message]
) -> None:
    """Let the stages a and b exchange what they have for each other, if there is anything."""
    for_b = outbox[a] if outbox[a] is not None and outbox[a].piece % pp == b else None
    for_a = outbox[b] if outbox[b] is not None and outbox[b].piece % pp == a else None
    if for_a is None and for_b is None:
        return
    actions[a].append(Meet(b, for_b, for_a))
    actions[b].append(Meet(a, for_a, for_b))
    if for_b is not None:
        outbox[a] = None
        arrived.add(for_b)
    if for_a is not None:
        outbox[b] = None
        arrived.add(for_a)
