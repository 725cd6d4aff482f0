"""A worker agent's own decisions: pure, so every order of events can be tried."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini_gnn.recovery.outcome import STOPPED, Failure
from gemini_gnn.recovery.worker.decisions import (
    MAX_WARM_DEATHS,
    Begin,
    Close,
    Exited,
    Failed,
    Fork,
    Kill,
    Listens,
    Registered,
    Say,
    StartWarm,
    State,
    Tell,
    TellReady,
    TellStuck,
    TellUnable,
    Tick,
    WarmDied,
    WarmReady,
    WarmRefused,
    decide,
)

KILLED = WarmDied("SIGKILL")


def play(state: State, *events, now: float = 0.0):
    """The state after all events, and the actions of the last one."""
    actions = []
    for event in events:
        state, actions = decide(state, event, now)
    return state, actions


def ready(slots: int = 2) -> State:
    state, actions = play(State(slots), WarmReady(), *map(Registered, range(slots)))
    assert actions == [TellReady(True)] and state.deadline is None
    return state


def running(slots: int = 2, first: int = 0, generation: int = 1) -> State:
    ranks = frozenset(range(first, first + slots))
    state, actions = play(ready(slots), Begin(generation, ranks))
    assert actions == [Fork(generation, ranks)] and state.alive == ranks
    return state


def unable(actions) -> Failure:
    (action,) = [action for action in actions if isinstance(action, TellUnable)]
    return action.failure


def test_ready_when_every_slot_and_the_warm_parent_are_there_in_any_order():
    assert play(State(2), Registered(1), WarmReady())[1] == []
    assert play(State(2), Registered(1), WarmReady(), Registered(0))[1] == [TellReady(True)]
    assert play(State(2), Registered(1), Registered(0), WarmReady())[1] == [TellReady(True)]


def test_readiness_is_told_once():
    assert play(ready(), WarmReady())[1] == []


def test_of_its_trainers_everything_is_told_with_their_generation():
    state = running(2, first=4, generation=7)
    error = Failed(Failure(5, 2, 1.0, "error", "traceback"))
    for event in (Listens(4), error, Exited(5, 2), Exited(4, -9, "out of memory")):
        state, actions = play(state, event)
        assert actions == [Tell(event, 7)]
    assert state.alive == frozenset()


def test_close_kills_what_lives_and_the_next_generation_may_begin_when_it_is_reaped():
    state, actions = play(running(3), Exited(1, -9), Close())
    assert actions == [Kill(frozenset({0, 2}))] and state.deadline == state.limits.reap_s
    state, _ = play(state, Exited(0, -9))
    with pytest.raises(AssertionError, match="before the last one was reaped"):
        decide(state, Begin(2, frozenset({0, 1, 2})), 0.0)
    state, actions = play(state, Exited(2, 1))  # raised while being killed
    assert actions == [Tell(Exited(2, 1), 1)] and state.deadline is None
    assert play(state, Begin(2, frozenset({0, 1, 2})))[1] == [Fork(2, frozenset({0, 1, 2}))]


def test_close_where_nothing_lives_changes_nothing():
    assert play(ready(), Close()) == (ready(), [])


def test_a_second_close_kills_again():
    state, actions = play(running(), Close(), Close())
    assert actions == [Kill(frozenset({0, 1}))] and state.closing


def test_a_warm_parent_that_dies_harms_no_trainer_and_the_root_hears_of_it():
    state, actions = play(running(), KILLED)
    assert actions[0] == TellReady(False) and isinstance(actions[1], Say) and actions[2:] == [StartWarm()]
    assert state.alive == frozenset({0, 1}) and state.deadline is None
    assert play(state, WarmReady())[1] == [TellReady(True)]


def test_a_warm_parent_that_dies_while_importing_is_tried_again_but_not_for_ever():
    state, _ = play(State(1), Registered(0))
    for _ in range(MAX_WARM_DEATHS):
        state, actions = play(state, KILLED)
        assert isinstance(actions[0], Say) and actions[1:] == [StartWarm()]
    state, actions = play(state, KILLED)
    assert "4 times" in unable(actions).summary and state.unable is not None and state.deadline is None


def test_a_warm_parent_that_was_ready_begins_the_count_again():
    state, _ = play(State(1), Registered(0), *[KILLED] * MAX_WARM_DEATHS, WarmReady())
    assert play(state, KILLED)[1][-1] == StartWarm()


def test_without_a_warm_parent_the_trainers_work_on_and_only_another_generation_is_impossible():
    state, actions = play(running(), *[KILLED] * (MAX_WARM_DEATHS + 1))
    assert actions == [] and state.unable is None
    ended, actions = play(state, Exited(0, 0), Exited(1, 0))
    assert actions == [Tell(Exited(1, 0), 1)]
    assert "4 times" in unable(play(ended, Close())[1]).summary
    _, actions = play(state, Close(), Exited(0, -9), Exited(1, -9))
    assert actions[0] == Tell(Exited(1, -9), 1) and "4 times" in unable(actions).summary
    # The root may be gone, and another one ask for nothing: it hears in the end.
    assert "4 times" in unable(play(ended, Tick(), now=ended.limits.start_s)[1]).summary


def test_a_warm_parent_that_cannot_import():
    failure = Failure(-1, 1, 0.0, "no module", "traceback")
    state, actions = play(State(1), Registered(0), WarmRefused(failure))
    assert actions == [TellUnable(failure)] and state.unable is failure and state.deadline is None


def test_slots_that_never_come():
    state, _ = play(State(4), Registered(0))
    state, _ = play(state, Registered(1), now=10.0)  # no later end for it
    assert play(state, Tick(), now=state.limits.gather_s - 1.0)[1] == []
    assert "only 2 of 4" in unable(play(state, Tick(), now=state.limits.gather_s)[1]).summary


def test_slots_that_never_come_though_the_warm_parent_is_ready_or_has_died():
    for event in (WarmReady(), KILLED, Close()):
        state, _ = play(State(4), Registered(0), event)
        assert "only 1 of 4" in unable(play(state, Tick(), now=state.limits.gather_s)[1]).summary


def test_imports_may_take_longer_than_the_slots():
    state, _ = play(State(2), Registered(0), Registered(1), now=5.0)
    assert play(state, Tick(), now=5.0 + state.limits.gather_s)[1] == []
    assert "imports" in unable(play(state, Tick(), now=5.0 + state.limits.start_s)[1]).summary


@pytest.mark.parametrize(
    "events",
    [
        [KILLED],
        [Begin(1, frozenset({0, 1})), KILLED, Exited(0, -9), Exited(1, 1)],  # by themselves: the root is gone
        [Begin(1, frozenset({0, 1})), KILLED, Close(), Exited(0, -9), Exited(1, 1)],
    ],
)
def test_another_warm_parent_has_a_deadline_too_where_nothing_runs(events):
    state, _ = play(ready(), *events, now=7.0)
    assert "imports" in unable(play(state, Tick(), now=7.0 + state.limits.start_s)[1]).summary
    assert play(state, WarmReady(), Tick(), now=7.0 + state.limits.start_s)[1] == []


def test_begin_comes_when_the_warm_parent_has_just_died():
    state, _ = play(ready(), KILLED, Begin(1, frozenset({0, 1})))
    assert state.deadline is None
    state, _ = play(state, Exited(0, -9), Exited(1, -9), now=1.0)  # never forked
    assert state.deadline == 1.0 + state.limits.start_s


def test_what_cannot_be_reaped_is_told():
    state, _ = play(running(), Close(), Exited(0, -9), now=1.0)
    assert play(state, Tick(), now=0.9 + state.limits.reap_s)[1] == []
    state, actions = play(state, Tick(), now=1.0 + state.limits.reap_s)
    (stuck,) = actions
    assert isinstance(stuck, TellStuck) and "ranks 1 " in stuck.text and "stuck in the kernel" in stuck.text


def test_what_cannot_be_reaped_is_told_though_a_warm_parent_has_become_ready_meanwhile():
    state, _ = play(running(), KILLED, Close(), WarmReady(), now=1.0)
    (stuck,) = play(state, Tick(), now=1.0 + state.limits.reap_s)[1]
    assert isinstance(stuck, TellStuck)


def test_another_root_hears_again_of_what_cannot_be_reaped():
    state, _ = play(running(), Close(), Tick(), now=30.0)
    state, _ = play(state, Close(), now=40.0)
    assert isinstance(play(state, Tick(), now=40.0 + state.limits.reap_s)[1][0], TellStuck)


def test_state_is_a_value():
    state = running()
    decide(state, Exited(0, -9), 1.0)
    assert state == replace(state) and state.alive == frozenset({0, 1})


EVENTS = st.one_of(
    st.sampled_from([("warm_ready",), ("warm_died",), ("close",), ("begin",), ("register",)]),
    st.tuples(st.just("exit"), st.integers(0, 2), st.sampled_from([0, 1, STOPPED, -9])),
    st.tuples(st.just("wait"), st.floats(0.0, 700.0)),
)


@given(st.lists(EVENTS, max_size=40))
def test_any_order_of_events_keeps_the_invariants(script):
    """The root is told the truth, once; what lives is known; and for whatever the worker waits it has a deadline."""
    state, now, alive, warm, told, unable_told, slots = State(3), 0.0, set(), "imports", False, False, 0

    def act(event):
        nonlocal state, warm, told, unable_told
        state, actions = decide(state, event, now)
        for action in actions:
            match action:
                case Kill(ranks):
                    assert ranks == alive
                case StartWarm():
                    assert warm == ""
                    warm = "imports"
                case TellReady(is_ready):
                    assert is_ready is not told
                    told = is_ready
                case TellUnable():
                    unable_told = True
        assert state.alive == alive
        assert told is (warm == "ready" and slots == 3)
        lacks = not told and slots > 0 and not alive
        assert state.deadline is not None or not lacks or unable_told

    for kind, *rest in script:
        if kind == "register" and slots < 3:
            slots += 1
            act(Registered(slots - 1))
        elif kind == "warm_ready" and warm == "imports":
            warm = "ready"
            act(WarmReady())
        elif kind == "warm_died" and warm:
            warm = ""
            act(KILLED)
        elif kind == "begin" and told and not alive:
            alive = {0, 1, 2}
            act(Begin(state.generation + 1, frozenset(alive)))
        elif kind == "close":
            act(Close())
        elif kind == "exit" and rest[0] in alive:
            alive.discard(rest[0])
            act(Exited(*rest))
        elif kind == "wait":
            now += rest[0]
            act(Tick())
