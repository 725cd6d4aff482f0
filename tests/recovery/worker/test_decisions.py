"""The worker agent's decisions: pure, so every order of events can be tried."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini_gnn.recovery.worker.decisions import (
    STOPPED,
    AskToStop,
    DumpStacks,
    Exited,
    Failed,
    Failure,
    Finish,
    Fork,
    Hung,
    Kill,
    Limits,
    Listens,
    Phase,
    Registered,
    Say,
    StartWarm,
    State,
    StopAsked,
    Tick,
    WarmDied,
    WarmReady,
    WarmRefused,
    decide,
    may_be_ending,
)


def play(state: State, *events, now: float = 0.0):
    """The state after all events, and the actions of the last one."""
    actions = []
    for event in events:
        state, actions = decide(state, event, now)
    return state, actions


def running(local: int = 2, world: int | None = None, **limits) -> State:
    state = State(local, world or local, Limits(**limits))
    first = 0
    state, actions = play(state, WarmReady(), *(Registered(first + r) for r in range(local)))
    assert actions == [Fork(1, frozenset(range(local)))]
    assert state.phase is Phase.RUNNING
    return state


def listening(local: int = 2) -> State:
    return play(running(local), *(Listens(r) for r in range(local)))[0]


def failure(rank: int, time_s: float, code: int = 1, consequence: bool = False) -> Failed:
    return Failed(Failure(rank, code, time_s, f"error of {rank}", f"traceback of {rank}", consequence))


def finished(actions):
    (action,) = [action for action in actions if isinstance(action, Finish)]
    return action.outcome


def test_forks_when_every_slot_and_the_warm_parent_are_there():
    state = State(2, 2)
    state, actions = play(state, Registered(0), Registered(1))
    assert actions == []
    state, actions = play(state, WarmReady())
    assert actions == [Fork(1, frozenset({0, 1}))]


def test_done_when_all_end_with_zero():
    state, actions = play(running(), Exited(1, 0))
    assert actions == []
    outcome = finished(play(state, Exited(0, 0))[1])
    assert (outcome.kind, outcome.code, outcome.keep) == ("done", 0, False)


def test_the_earliest_exception_is_the_jobs_error_whoever_exits_first():
    state, _ = play(running(3), failure(1, 5.0), Exited(1, 1), failure(2, 4.0, code=2), Exited(2, 2), now=10.0)
    state, actions = decide(state, Tick(), 10.4)
    assert actions == []
    state, actions = decide(state, Tick(), 10.5)
    assert actions == [Kill(frozenset({0}))]
    outcome = finished(play(state, Exited(0, -9))[1])
    assert (outcome.kind, outcome.code, outcome.failure.rank, outcome.keep) == ("failed", 2, 2, True)


def test_an_error_that_a_peer_is_gone_waits_for_the_peers_own_and_is_not_the_first():
    state, _ = play(running(3), failure(0, 1.0, consequence=True), Exited(0, 1), now=1.0)
    assert decide(state, Tick(), 1.0 + state.limits.settle_s)[1] == []
    state, _ = play(state, failure(2, 1.5, code=2), Exited(2, 2), now=2.0)
    _, actions = decide(state, Tick(), 2.0 + state.limits.settle_s)
    assert actions == [Kill(frozenset({1}))]
    alone, _ = play(running(2), failure(0, 1.0, consequence=True), Exited(0, 1), now=1.0)
    _, actions = decide(alone, Tick(), 1.0 + alone.limits.cause_s)
    assert actions[1:] == [Kill(frozenset({1}))] and "no trainer says why" in actions[0].text


def test_a_death_that_no_trainer_explains_is_one_to_go_on_from():
    lost = [failure(rank, 1.0 + rank, consequence=True) for rank in range(2)]
    state, actions = play(running(), lost[0], Exited(0, 1), lost[1], Exited(1, 1))
    assert "no trainer says why" in actions[0].text and actions[1:] == [Fork(2, frozenset({0, 1}))]
    assert state.phase is Phase.RUNNING and state.failures == ()
    state, _ = play(running(), lost[0], Exited(0, 1), now=1.0)
    state, actions = decide(state, Tick(), 1.0 + state.limits.cause_s)
    assert actions[1:] == [Kill(frozenset({1}))] and state.outcome is None


def test_unexplained_deaths_of_a_job_over_several_machines_end_it_with_the_error():
    state, _ = play(running(local=2, world=4), failure(0, 1.0, consequence=True), Exited(0, 1))
    outcome = finished(play(state, failure(1, 1.5, consequence=True), Exited(1, 1))[1])
    assert (outcome.kind, outcome.failure.rank) == ("failed", 0)


def test_who_comes_while_an_error_waits_asks_again_and_after_a_restart_is_refused():
    assert not may_be_ending(State(2, 2)) and not may_be_ending(running())
    state, _ = play(running(), failure(1, 1.0), Exited(1, 1), now=1.0)
    assert may_be_ending(state)
    assert may_be_ending(decide(state, Tick(), 2.0)[0])
    state, _ = play(state, Exited(0, -9), now=1.1)
    assert not may_be_ending(state)  # the job goes on


def test_all_failed_ends_without_waiting():
    outcome = finished(play(running(), failure(0, 1.0), Exited(0, 1), failure(1, 2.0), Exited(1, 1))[1])
    assert outcome.failure.text == "traceback of 0"


def test_exit_without_a_word_is_an_error_too():
    outcome = finished(play(running(1), Exited(0, 17))[1])
    assert outcome.code == 17 and "exit code 17" in outcome.reason


def test_a_killed_trainer_restarts_all_after_the_others_are_reaped():
    state, actions = play(running(3), Exited(1, -9))
    assert actions[1:] == [Kill(frozenset({0, 2}))]
    assert isinstance(actions[0], Say) and "SIGKILL" in actions[0].text and "generation 2" in actions[0].text
    state, actions = play(state, Exited(0, -9))
    assert actions == []
    state, actions = play(state, Exited(2, 1))  # raised while being killed: no error
    assert actions == [Fork(2, frozenset({0, 1, 2}))]
    assert state.failures == ()


def test_a_kill_seen_after_the_exceptions_it_caused_is_the_cause():
    state, _ = play(running(3), failure(0, 1.0), Exited(0, 1), now=1.0)
    state, actions = decide(state, Exited(1, -9), 1.3)
    assert Kill(frozenset({2})) in actions
    assert play(state, Exited(2, -9))[1] == [Fork(2, frozenset({0, 1, 2}))]


def test_a_kill_seen_when_all_the_others_have_exited_names_the_right_generation():
    state, _ = play(running(2), failure(0, 1.0, consequence=True), Exited(0, 1), now=1.0)
    _, actions = decide(state, Exited(1, -9), 1.1)
    assert actions[1:] == [Fork(2, frozenset({0, 1}))]
    assert "as generation 2" in actions[0].text


def test_restarts_are_limited_within_the_window():
    state = running(1, max_restarts=2, restart_window_s=100.0)
    for at in (0.0, 1.0):
        state, actions = decide(state, Exited(0, -9), at)
        assert any(isinstance(action, Fork) for action in actions)
    _, actions = decide(state, Exited(0, -11), 100.5)
    assert any(isinstance(action, Fork) for action in actions)  # the first one is out of the window
    outcome = finished(decide(state, Exited(0, -11), 2.0)[1])
    assert (outcome.kind, outcome.code) == ("failed", 128 + 11)
    assert "max_restarts" in outcome.failure.text


def test_no_restart_by_one_machine_of_several():
    state, actions = play(running(2, world=4), Exited(0, -9))
    assert actions == [Kill(frozenset({1}))]
    outcome = finished(play(state, Exited(1, -9))[1])
    assert outcome.code == 137 and "several machines" in outcome.reason


def test_stop_waits_for_the_step_of_those_who_listen():
    state, actions = play(listening(), StopAsked("Ctrl-C", 130))
    assert actions[1:] == [AskToStop(frozenset({0, 1}))]
    outcome = finished(play(state, Exited(0, STOPPED), Exited(1, STOPPED))[1])
    assert (outcome.kind, outcome.code, outcome.keep) == ("stopped", 130, True)


def test_stop_just_when_the_work_was_done():
    outcome = finished(play(listening(), StopAsked("Ctrl-C", 130), Exited(0, 0), Exited(1, 0))[1])
    assert (outcome.kind, outcome.code) == ("done", 0)


def test_stop_kills_at_the_deadline_or_when_forced():
    asked, _ = play(listening(), StopAsked("Ctrl-C", 130), Exited(0, STOPPED))
    state, actions = decide(asked, Tick(), asked.limits.stop_s)
    assert Kill(frozenset({1})) in actions
    assert finished(play(state, Exited(1, -9))[1]).code == 130
    assert play(asked, StopAsked("Ctrl-C", 130, force=True))[1] == [Kill(frozenset({1}))]
    assert play(asked, StopAsked("SIGTERM", 143))[1] == []  # the launcher's, after the terminal's: no second request


def test_stop_kills_at_once_who_does_not_listen():
    _, actions = play(running(), Listens(0), StopAsked("Ctrl-C", 130))
    assert actions == [Kill(frozenset({0, 1}))]


def test_stop_before_anything_runs():
    assert finished(play(State(2, 2), Registered(0), StopAsked("Ctrl-C", 130))[1]).code == 130


def test_a_later_stop_may_drop_what_an_earlier_one_kept():
    state, _ = play(listening(), StopAsked("Ctrl-C", 130), StopAsked("launch/stop.py", 143, keep=False))
    outcome = finished(play(state, Exited(0, STOPPED), Exited(1, STOPPED))[1])
    assert (outcome.code, outcome.keep) == (130, False)


def test_a_warm_parent_that_dies_harms_no_trainer_and_the_next_generation_waits_for_another():
    state, actions = play(running(), WarmDied("SIGKILL"))
    assert isinstance(actions[0], Say) and actions[1:] == [StartWarm()] and state.phase is Phase.RUNNING
    state, _ = play(state, Exited(0, -9))
    state, actions = play(state, Exited(1, -9))
    assert actions == [] and state.phase is Phase.GATHERING
    assert play(state, WarmReady())[1] == [Fork(2, frozenset({0, 1}))]


def test_warm_parent_that_dies_while_importing_is_tried_again_but_not_for_ever():
    state = State(1, 1)
    state, _ = play(state, Registered(0))
    for _ in range(3):
        state, actions = play(state, WarmDied("SIGKILL"))
        assert isinstance(actions[0], Say) and actions[1:] == [StartWarm()]
    assert "4 times" in finished(play(state, WarmDied("SIGKILL"))[1]).reason


def test_without_a_warm_parent_the_trainers_work_on_and_their_end_is_the_jobs():
    state, actions = play(running(), *[WarmDied("SIGKILL")] * 4)
    assert actions == [] and state.phase is Phase.RUNNING
    assert finished(play(state, Exited(0, 0), Exited(1, 0))[1]).kind == "done"
    assert "4 times" in finished(play(state, Exited(0, -9), Exited(1, -9))[1]).reason


def test_warm_parent_that_cannot_import():
    state, _ = play(State(1, 1), Registered(0))
    outcome = finished(play(state, WarmRefused(Failure(-1, 1, 0.0, "no module", "traceback")))[1])
    assert (outcome.kind, outcome.code) == ("failed", 1)


def test_slots_that_never_come():
    state, _ = decide(State(4, 4), Registered(0), 0.0)
    state, _ = decide(state, Registered(1), 10.0)  # no later end for it
    assert decide(state, Tick(), state.limits.gather_s - 1.0)[1] == []
    assert "only 2 of 4" in finished(decide(state, Tick(), state.limits.gather_s)[1]).reason


def test_imports_may_take_longer_than_the_slots():
    state, _ = play(State(2, 2), Registered(0), Registered(1), now=5.0)
    assert decide(state, Tick(), 5.0 + state.limits.gather_s)[1] == []
    assert "imports" in finished(decide(state, Tick(), 5.0 + state.limits.start_s)[1]).reason


def test_a_trainer_that_told_its_error_and_stays_is_not_waited_for():
    state, _ = play(running(), failure(0, 1.0), now=1.0)
    assert decide(state, Tick(), 0.9 + state.limits.leave_s)[1] == []
    state, actions = decide(state, Tick(), 1.0 + state.limits.leave_s)
    assert actions == [Kill(frozenset({0, 1}))]
    outcome = finished(play(state, Exited(0, -9), Exited(1, -9))[1])
    assert (outcome.kind, outcome.failure.rank) == ("failed", 0)


def test_an_error_that_was_told_is_not_hidden_by_a_request_to_stop():
    state, _ = play(listening(), failure(0, 1.0, code=2), now=1.0)
    state, actions = decide(state, StopAsked("launch/stop.py", 143, keep=False), 1.1)
    assert actions == [Kill(frozenset({0, 1}))]
    outcome = finished(play(state, Exited(0, 2), Exited(1, -9))[1])
    assert (outcome.kind, outcome.code, outcome.failure.rank, outcome.keep) == ("failed", 2, 0, False)
    state, _ = play(listening(), failure(0, 1.0, consequence=True), StopAsked("Ctrl-C", 130), now=1.0)
    assert finished(play(state, Exited(0, 1), Exited(1, -9))[1]).kind == "stopped"


def test_an_error_is_of_its_generation():
    state, _ = play(running(), failure(0, 1.0), Exited(1, -9), now=1.0)
    assert finished(play(state, StopAsked("Ctrl-C", 130), Exited(0, -9), now=2.0)[1]).kind == "stopped"


def test_an_error_that_was_told_is_not_hidden_by_a_later_death():
    death = Exited(1, -9)
    told, _ = play(running(), failure(0, 1.0, code=2), now=1.0)
    assert decide(told, death, 1.0 + told.limits.settle_s)[0].outcome is None  # it may be the cause: restarted
    state, actions = decide(told, death, 1.1 + told.limits.settle_s)
    assert actions == [Kill(state.alive)]
    assert (state.outcome.kind, state.outcome.code, state.outcome.failure.rank) == ("failed", 2, 0)
    consequence, _ = play(running(), failure(0, 1.0, consequence=True), now=1.0)
    assert decide(consequence, death, 1.1 + told.limits.settle_s)[0].outcome is None


def test_what_cannot_be_reaped_makes_the_machine_lost():
    state, _ = play(running(), Exited(0, -9), now=1.0)
    state, actions = decide(state, Tick(), 1.0 + state.limits.reap_s)
    outcome = finished(actions)
    assert outcome.kind == "lost" and "ranks 1" in outcome.reason and "stuck in the kernel" in outcome.reason


def test_left_by_itself():
    outcome = finished(play(running(), Exited(0, STOPPED), Exited(1, STOPPED))[1])
    assert (outcome.kind, outcome.code) == ("stopped", STOPPED)


EVENTS = st.one_of(
    st.just(("warm_ready",)),
    st.just(("warm_died",)),
    st.tuples(st.just("exit"), st.integers(0, 2), st.sampled_from([0, 1, 2, 17, STOPPED, -9, -11])),
    st.tuples(st.just("failed"), st.integers(0, 2)),
    st.tuples(st.just("listens"), st.integers(0, 2)),
    st.tuples(st.just("hung"), st.integers(0, 2)),
    st.tuples(st.just("stop"), st.booleans(), st.booleans()),
    st.tuples(st.just("wait"), st.floats(0.0, 20.0)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_any_order_of_events_keeps_the_invariants(script):
    """No generation begins before the last one is reaped; the job ends once, and when it ends nothing lives but the lost."""
    state, now, alive, warm, ready, generation, ended = State(3, 3), 0.0, set(), True, False, 0, []

    def act(event):
        nonlocal state, alive, warm, ready, generation
        before = state
        state, actions = decide(state, event, now)
        for action in actions:
            assert not ended, "an action after the end"
            if isinstance(action, Fork):
                assert not alive, "forked before the last generation was reaped"
                assert warm and ready
                assert action.generation == generation + 1
                generation, alive = action.generation, set(action.ranks)
            elif isinstance(action, Kill):
                assert action.ranks <= alive
            elif isinstance(action, AskToStop):
                assert action.ranks == alive == set(before.listening)
            elif isinstance(action, DumpStacks):
                assert action.ranks == alive and before.phase is Phase.RUNNING
            elif isinstance(action, StartWarm):
                assert not warm
                warm, ready = True, False
            elif isinstance(action, Finish):
                ended.append(action.outcome)
        assert state.alive == alive

    for rank in range(3):
        act(Registered(rank))
    for kind, *rest in script:
        if ended:
            break
        if kind == "warm_ready" and warm and not ready:
            ready = True
            act(WarmReady())
        elif kind == "warm_died" and warm:
            warm = ready = False
            act(WarmDied("SIGKILL"))
        elif kind == "exit" and rest[0] in alive:
            alive.discard(rest[0])
            act(Exited(*rest))
        elif kind == "failed" and rest[0] in alive:
            act(Failed(Failure(rest[0], 1, now, "", "")))
        elif kind == "listens" and rest[0] in alive:
            act(Listens(rest[0]))
        elif kind == "hung" and rest[0] in alive:
            act(Hung(rest[0], "hangs"))
        elif kind == "stop":
            act(StopAsked("stop", 130, keep=rest[0], force=rest[1]))
        elif kind == "wait":
            now += rest[0]
            act(Tick())
    if not ended:  # ask it to end: kills are obeyed, so it must
        act(StopAsked("stop", 130, force=True))
        for rank in sorted(alive):
            alive.discard(rank)
            act(Exited(rank, -9))
    assert len(ended) == 1
    assert ended[0].kind == "lost" or not alive


def test_state_is_a_value():
    state = running()
    decide(state, Exited(0, -9), 1.0)
    assert state == replace(state)
    assert state.phase is Phase.RUNNING


@pytest.mark.parametrize("event", [Tick(), Exited(0, 0), StopAsked("late", 130), WarmDied("x"), WarmReady()])
def test_nothing_happens_after_the_end(event):
    state, _ = play(running(1), Exited(0, 0))
    assert decide(state, event, 99.0) == (state, [])


HUNG = Hung(1, "rank 1 hangs in exchange of step 12 for 31 s")


def test_of_a_hang_the_stacks_are_written_then_it_is_gone_on_from_as_from_a_kill():
    state, actions = play(running(2), HUNG, now=100.0)
    assert actions == [DumpStacks(frozenset({0, 1}))] and state.phase is Phase.RUNNING
    assert play(state, HUNG, Tick(), now=100.2)[1] == []
    state, (said, killed) = play(state, Tick(), now=100.5)
    assert said.text == f"{HUNG.words}; restarting all 2 trainers as generation 2"
    assert killed == Kill(frozenset({0, 1}))
    state, actions = play(state, Exited(0, -9), Exited(1, -9), now=100.6)
    assert actions == [Fork(2, frozenset({0, 1}))] and state.hung == ""


def test_hangs_count_as_restarts_and_end_the_job_with_their_words():
    state, _ = play(running(2, max_restarts=0), HUNG)
    state, _ = play(state, Tick(), now=1.0)
    outcome = finished(play(state, Exited(0, -9), Exited(1, -9), now=1.0)[1])
    assert outcome.kind == "failed" and outcome.code == 1 and outcome.keep
    assert outcome.reason == f"{HUNG.words}; not restarted here: max_restarts is 0"


def test_on_several_machines_a_hang_ends_the_job_as_other_deaths_do():
    state, _ = play(running(2, world=4), HUNG)
    state, actions = play(state, Tick(), now=1.0)
    assert actions == [Kill(frozenset({0, 1}))]
    outcome = finished(play(state, Exited(0, -9), Exited(1, -9), now=1.0)[1])
    assert outcome.reason.startswith(f"{HUNG.words}; not restarted here: the job spans several machines")


def test_a_hang_is_not_looked_at_while_an_exit_is_awaited_or_the_job_ends():
    told = play(running(2), failure(0, 0.0))[0]
    stopping = play(listening(2), StopAsked("Ctrl-C", 130))[0]
    for state in (told, stopping, play(running(2), Exited(1, 0))[0], State(2, 2)):
        assert play(state, HUNG) == (state, [])


def test_a_stop_ends_a_job_that_hangs_at_once():
    state, _ = play(listening(2), HUNG)
    state, actions = play(state, StopAsked("Ctrl-C", 130))
    assert actions == [Kill(frozenset({0, 1}))] and state.outcome.code == 130


def test_a_death_while_the_stacks_are_written_is_gone_on_from():
    state, _ = play(running(2), HUNG)
    state, actions = play(state, Exited(1, -9), now=0.2)
    assert isinstance(actions[0], Say) and actions[1:] == [Kill(frozenset({0}))]


def test_all_done_before_the_stacks_are_written_is_done():
    state, _ = play(running(2), HUNG)
    assert finished(play(state, Exited(0, 0), Exited(1, 0), now=0.2)[1]).kind == "done"


def test_a_kill_says_why_where_it_is_known():
    _, actions = play(running(1), Exited(0, -9, "out of memory (memory cgroup /job)"))
    assert actions[0].text.startswith(
        "the trainer of rank 0 was killed: out of memory (memory cgroup /job); restarting"
    )
    state = running(1, max_restarts=0)
    known = finished(play(state, Exited(0, -9, "out of memory (memory cgroup /job)"))[1])
    unknown = finished(play(state, Exited(0, -9))[1])
    assert known.code == unknown.code == 137
    assert "dmesg" in unknown.reason and "dmesg" not in known.reason
