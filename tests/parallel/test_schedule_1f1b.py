"""The order of a pipeline: proved by playing it with rendezvous that block, for every size up to 8 stages."""

from __future__ import annotations

from itertools import product

import pytest

from llm_core.parallel.schedule import (
    BACKWARD,
    DURATION,
    FORWARD,
    Compute,
    Meet,
    Message,
    gives,
    needs,
    schedule,
    warm_up,
)

SIZES = [(pp, m, chunks) for pp, chunks in product(range(1, 9), (1, 2, 3)) for m in range(1, 17)]


def play(stages) -> list[int]:
    """Each stage does its list in order and waits in a Meet until its peer is at the same one; returns when each ends.

    RuntimeError when all that are not done wait.
    """
    at, clock = [0] * len(stages), [0] * len(stages)

    def current(stage):
        return stages[stage][at[stage]] if at[stage] < len(stages[stage]) else None

    moving = True
    while moving:
        moving = False
        for stage in range(len(stages)):
            while (action := current(stage)) is not None:
                if isinstance(action, Compute):
                    clock[stage] += DURATION[action.kind]
                elif current(action.peer) == Meet(stage, action.receives, action.sends):
                    at[action.peer] += 1
                    clock[stage] = clock[action.peer] = max(clock[stage], clock[action.peer])
                else:
                    break
                at[stage] += 1
                moving = True
    if any(current(stage) is not None for stage in range(len(stages))):
        raise RuntimeError(f"all wait: {[current(stage) for stage in range(len(stages))]}")
    return clock


def computed(actions, kind=None) -> list[Compute]:
    return [a for a in actions if isinstance(a, Compute) and kind in (None, a.kind)]


def test_the_player_sees_a_lock_up():
    first, second = (list(actions) for actions in schedule(2, 2))
    meetings = [i for i, action in enumerate(second) if isinstance(action, Meet)]
    second[meetings[0]], second[meetings[1]] = second[meetings[1]], second[meetings[0]]
    with pytest.raises(RuntimeError, match="all wait"):
        play([first, second])


@pytest.mark.parametrize("backward", [True, False], ids=["training", "evaluation"])
def test_no_size_locks_up(backward):
    for pp, m, chunks in SIZES:
        play(schedule(pp, m, chunks, backward))


def test_each_stage_computes_everything_once_and_gradients_in_the_order_of_micro_batches():
    for pp, m, chunks in SIZES:
        for actions in schedule(pp, m, chunks):
            forwards, backwards = computed(actions, FORWARD), computed(actions, BACKWARD)
            for chunk in range(chunks):
                assert [w.micro_batch for w in forwards if w.chunk == chunk] == list(range(m))
                assert [w.micro_batch for w in backwards if w.chunk == chunk] == list(range(m))
            order = {work: i for i, work in enumerate(computed(actions))}
            assert all(order[w._replace(kind=FORWARD)] < order[w] for w in backwards)
        for actions in schedule(pp, m, chunks, backward=False):
            assert not computed(actions, BACKWARD) and len(computed(actions, FORWARD)) == m * chunks


@pytest.mark.parametrize("backward", [True, False], ids=["training", "evaluation"])
def test_what_is_needed_has_come_and_all_that_is_given_is_needed(backward):
    for pp, m, chunks in SIZES:
        for stage, actions in enumerate(schedule(pp, m, chunks, backward)):
            has, to_give = set(), set()
            for action in actions:
                if isinstance(action, Meet):
                    for message in filter(None, (action.sends, action.receives)):
                        owner = stage if message is action.receives else action.peer
                        assert message.piece % pp == owner and 0 <= message.piece < pp * chunks
                    if action.sends is not None:
                        to_give.remove(action.sends)
                    if action.receives is not None:
                        assert action.receives not in has
                        has.add(action.receives)
                    continue
                assert not to_give, "what is computed is given before the next computation"
                needed, given = needs(action, pp, stage, chunks), gives(action, pp, stage, chunks)
                if needed is not None:
                    has.remove(needed)
                if given is not None:
                    (has if pp == 1 else to_give).add(given)
            assert not has and not to_give


def test_the_most_inputs_kept_are_those_of_the_warm_up_and_one():
    for pp, m, chunks in SIZES:
        for stage, actions in enumerate(schedule(pp, m, chunks)):
            kept = most = 0
            for work in computed(actions):
                kept += 1 if work.kind == FORWARD else -1
                most = max(most, kept)
            assert most == min(warm_up(pp, stage, m, chunks) + 1, m * chunks)
            if chunks == 1:
                assert most <= pp - stage
            elif m % pp == 0:  # as arXiv 2104.04473's
                assert most <= 2 * (pp - stage - 1) + (chunks - 1) * pp + 1


def test_time_lost_is_that_of_filling_and_emptying_the_pipeline():
    both = DURATION[FORWARD] + DURATION[BACKWARD]
    for pp, m, chunks in SIZES:
        if m >= pp:  # in units of a piece's time; a piece is 1 / chunks of a stage
            least, uncut = both * (m * chunks + pp - 1), both * (m + pp - 1) * chunks
            taken = max(play(schedule(pp, m, chunks)))
            if chunks == 1 or (m % pp == 0 and pp in (2, 4, 5, 8)):
                assert taken == least
            elif m % pp == 0:  # around an odd ring of stages not all pairs can meet at once
                assert taken <= 1.07 * least and (taken < uncut or pp == 1)
            else:
                assert taken <= 1.02 * uncut


def test_gradient_and_hidden_states_cross_in_one_exchange():
    meetings = [action for action in schedule(4, 16)[1] if isinstance(action, Meet) and action.peer == 2]
    both_ways = [meet for meet in meetings if meet.sends is not None and meet.receives is not None]
    assert len(both_ways) == 13 and len(meetings) == 16 + 16 - 13  # all but those that fill and empty the pipeline
    assert both_ways[0] == Meet(2, Message(FORWARD, 3, 2), Message(BACKWARD, 1, 1))
