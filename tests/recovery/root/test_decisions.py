"""The root's decisions: pure, so every order of events can be tried. ``test_explored.py`` tries all of small jobs."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini_gnn.recovery.outcome import STOPPED, Failure
from gemini_gnn.recovery.root.decisions import decide, may_be_ending, may_restart
from gemini_gnn.recovery.root.state import (
    AskToStop,
    Begin,
    Cause,
    Claim,
    Claimed,
    Close,
    Damaged,
    DumpStacks,
    Exited,
    Failed,
    Finish,
    Gone,
    Hung,
    Joined,
    Limits,
    Listens,
    Phase,
    Plan,
    Planned,
    Reached,
    Ready,
    Say,
    State,
    StopAsked,
    Stuck,
    Tick,
    Unable,
    forming,
)

SHAPES = pytest.mark.parametrize(("machines", "local"), [(1, 3), (3, 1), (2, 2), (4, 2)])
STOP = StopAsked("Ctrl-C", 130)
HUNG = Hung(1, "rank 1 hangs in exchange of step 12 for 31 s")


def play(state: State, *events, now: float = 0.0):
    """The state after all events, and the actions of the last one. A planning is over at once, and a claim is won."""
    actions = []
    for event in events:
        state, actions = decide(state, event, now)
        if actions and actions[-1] == Plan():
            assert state.phase is Phase.PLANNING
            state, more = decide(state, Planned(), now)
            actions = actions[:-1] + more
        if actions and isinstance(actions[-1], Claim):
            assert state.phase is Phase.CLAIMING and not state.claimed
            state, more = decide(state, Claimed(True), now)
            actions = actions[:-1] + more
    return state, actions


def joined(machine: int, generation: int = 0, reached: int = 0) -> Joined:
    return Joined(machine, f"h{machine + 1}", generation, reached)


def gone(machine: int, kind: str = "agent") -> Gone:
    return Gone(machine, kind, f"the worker agent on h{machine + 1} is gone")


def running(machines: int = 1, local: int = 2, generation: int = 0, **limits) -> State:
    state = forming(machines, local, Limits(**limits), generation)
    for machine in range(machines):
        state, actions = play(state, joined(machine), Ready(machine))
    assert actions == [Begin(generation + 1)] and state.phase is Phase.RUNNING and state.deadline is None
    assert state.alive == frozenset(range(machines * local))
    return state


def listening(machines: int = 1, local: int = 2) -> State:
    state = running(machines, local)
    return play(state, *(Listens(rank, 1) for rank in range(state.world)))[0]


def exited(rank: int, code: int = -9, generation: int = 1, why: str = "") -> Exited:
    return Exited(rank, generation, code, why)


def reaped(state: State) -> list[Exited]:
    return [exited(rank, generation=state.generation) for rank in sorted(state.alive)]


def failure(rank: int, time_s: float, code: int = 1, consequence: bool = False, generation: int = 1) -> Failed:
    return Failed(Failure(rank, code, time_s, f"error of {rank}", f"traceback of {rank}", consequence), generation)


def unable(machine: int) -> Unable:
    return Unable(machine, Failure(-1, 3, 0.0, "no module", "traceback"))


def finished(actions):
    (action,) = [action for action in actions if isinstance(action, Finish)]
    return action.outcome


def said(actions) -> str:
    (action,) = [action for action in actions if isinstance(action, Say)]
    return action.text


# --- the planning -------------------------------------------------------------------------------------------------------


def planning(machines: int = 2) -> State:
    state = forming(machines, 1)
    for machine in range(machines):
        state, actions = play(state, joined(machine))
        state, actions = decide(state, Ready(machine), 0.0)
    assert actions == [Plan()] and state.phase is Phase.PLANNING and state.deadline is None
    return state


def test_a_generation_begins_when_the_planning_is_over_and_not_twice():
    state, actions = decide(planning(), Planned(), 0.0)
    assert actions == [Begin(1)] and state.phase is Phase.RUNNING
    assert decide(state, Planned(), 0.0) == (state, [])


@pytest.mark.parametrize("event", [Ready(1, False), gone(1), joined(1)], ids=["not ready", "gone", "come again"])
def test_a_planning_is_begun_anew_when_a_machine_was_away(event):
    state, actions = decide(planning(), event, 0.0)
    assert actions == [] and state.phase in (Phase.RECOVERING, Phase.WAITING)
    assert decide(state, Planned(), 0.0)[1] == [], "the answer of the planning before"
    events = [Ready(1)] if isinstance(event, Ready | Joined) else [joined(1), Ready(1)]
    for one in events:
        state, actions = decide(state, one, 0.0)
    assert actions == [Plan()]


def claiming() -> State:
    """Machine 1 has come back: it may have been a witness to another root."""
    state, actions = play(running(2, 1), gone(1), exited(0), joined(1))
    assert actions == [] and not state.claimed
    state, _ = decide(state, Ready(1), 0.0)
    state, actions = decide(state, Planned(), 0.0)
    assert actions == [Claim(witness=True)] and state.phase is Phase.CLAIMING
    return state


def test_a_job_may_be_stopped_while_it_plans():
    state, actions = decide(planning(), STOP, 0.0)
    assert finished(actions).kind == "stopped" and state.phase is Phase.ENDED


# --- the beginning ------------------------------------------------------------------------------------------------------


@SHAPES
def test_the_first_generation_begins_when_every_machine_is_here_and_ready(machines, local):
    state = forming(machines, local)
    for machine in range(machines):
        state, actions = play(state, joined(machine))
        assert actions == []
    for machine in range(machines):
        assert actions == []
        state, actions = play(state, Ready(machine))
    assert actions == [Begin(1)] and state.alive == frozenset(range(machines * local))


def test_a_machine_that_is_no_longer_ready_is_waited_for():
    state, _ = play(forming(2, 1), joined(0), joined(1), Ready(0), Ready(0, False))
    state, actions = play(state, Ready(1))
    assert actions == [] and state.phase is Phase.FORMING
    assert play(state, Ready(0))[1] == [Begin(1)]


def test_machines_that_never_come():
    state, _ = play(forming(3, 2), joined(0), Ready(0), now=5.0)
    state, _ = play(state, joined(1), now=50.0)  # no later end for it
    assert state.deadline == 5.0 + state.limits.join_s
    assert play(state, Tick(), now=304.0)[1] == []
    outcome = finished(play(state, Tick(), now=305.0)[1])
    assert (outcome.kind, outcome.code, outcome.keep) == ("failed", 1, True)
    assert outcome.reason.startswith("machine 3 in the order of the hostfile (ranks 4, 5) did not come within 300 s")


def test_a_machine_that_goes_before_the_beginning_may_come_again():
    state, _ = play(forming(2, 1), joined(0), Ready(0), joined(1), now=1.0)
    assert state.deadline is None  # the machine itself sees to its slot processes and its warm parent
    state, actions = play(state, gone(1), now=100.0)
    assert actions == [] and state.phase is Phase.FORMING and state.deadline == 100.0 + state.limits.join_s
    assert play(state, joined(1), Ready(1))[1] == [Begin(1)]
    assert "h2 (rank 1) did not come within 300 s" in finished(play(state, Tick(), now=400.0)[1]).reason


def test_a_machine_that_can_never_fork():
    outcome = finished(play(forming(2, 1), joined(0), unable(0))[1])
    assert (outcome.kind, outcome.code, outcome.reason) == ("failed", 3, "no module")


# --- the end of trainers ------------------------------------------------------------------------------------------------


@SHAPES
def test_done_when_all_end_with_zero(machines, local):
    state = running(machines, local)
    *most, last = [exited(rank, 0) for rank in reversed(range(state.world))]
    state, actions = play(state, *most)
    assert actions == []
    outcome = finished(play(state, last)[1])
    assert (outcome.kind, outcome.code, outcome.keep) == ("done", 0, False)


@SHAPES
def test_a_killed_trainer_restarts_all_after_the_others_are_reaped(machines, local):
    state, actions = play(running(machines, local), exited(1))
    assert actions[1:] == [Close()] and state.phase is Phase.RECOVERING and state.deadline is None
    assert "rank 1 was killed by SIGKILL" in said(actions)
    assert f"all {state.world} trainers as generation 2" in said(actions)
    *most, last = [exited(rank, 1) for rank in sorted(state.alive)]  # they raise while they are killed: no error
    state, actions = play(state, *most)
    assert actions == []
    state, actions = play(state, last)
    assert actions == [Begin(2)] and state.failures == () and state.codes == ()
    assert play(state, exited(0, generation=1)) == (state, [])  # of the last generation


def test_the_earliest_exception_is_the_jobs_error_whoever_exits_first():
    state, _ = play(running(3, 1), failure(1, 5.0), exited(1, 1), failure(2, 4.0, code=2), exited(2, 2), now=10.0)
    state, actions = decide(state, Tick(), 10.4)
    assert actions == []
    state, actions = decide(state, Tick(), 10.5)
    assert actions == [Close()]
    outcome = finished(play(state, exited(0))[1])
    assert (outcome.kind, outcome.code, outcome.failure.rank, outcome.keep) == ("failed", 2, 2, True)


def test_an_error_that_a_peer_is_gone_waits_for_the_peers_own_and_is_not_the_first():
    state, _ = play(running(3, 1), failure(0, 1.0, consequence=True), exited(0, 1), now=1.0)
    assert decide(state, Tick(), 1.0 + state.limits.settle_s)[1] == []
    state, _ = play(state, failure(2, 1.5, code=2), exited(2, 2), now=2.0)
    state, actions = decide(state, Tick(), 2.0 + state.limits.settle_s)
    assert actions == [Close()] and state.outcome.failure.rank == 2
    alone, _ = play(running(), failure(0, 1.0, consequence=True), exited(0, 1), now=1.0)
    _, actions = decide(alone, Tick(), 1.0 + alone.limits.cause_s)
    assert actions[1:] == [Close()] and "no trainer says why" in said(actions)


@SHAPES
def test_a_death_that_no_trainer_explains_is_one_to_go_on_from(machines, local):
    state = running(machines, local)
    told = [(failure(rank, 1.0 + rank, consequence=True), exited(rank, 1)) for rank in range(state.world)]
    ended, actions = play(state, *chain.from_iterable(told))
    assert "no trainer says why" in said(actions) and actions[1:] == [Close(), Begin(2)]
    assert ended.phase is Phase.RUNNING and ended.failures == () and ended.cause.kind == "network"
    waits, _ = play(state, *told[0], now=1.0)
    waits, actions = decide(waits, Tick(), 1.0 + state.limits.cause_s)
    assert actions[1:] == [Close()] and waits.outcome is None and waits.phase is Phase.RECOVERING


def test_an_unexplained_death_that_is_one_too_many_ends_the_job_with_what_was_seen():
    state = running(2, 1, same_step_failures=1)
    lost = [failure(0, 1.0, code=4, consequence=True), exited(0, 1), failure(1, 2.0, consequence=True), exited(1, 1)]
    outcome = finished(play(state, *lost)[1])
    assert (outcome.kind, outcome.code, outcome.failure.text) == ("failed", 4, "traceback of 0")
    assert "rank 0 lost a peer" in outcome.reason and "same_step_failures" in outcome.reason


def test_who_comes_while_an_error_waits_asks_again_and_after_a_restart_is_refused():
    assert not may_be_ending(forming(1, 2)) and not may_be_ending(running())
    state, _ = play(running(), failure(1, 1.0), exited(1, 1), now=1.0)
    assert may_be_ending(state)
    assert may_be_ending(decide(state, Tick(), 2.0)[0])
    state, _ = play(state, exited(0), now=1.1)
    assert not may_be_ending(state)  # the job goes on


def test_all_failed_ends_without_waiting():
    outcome = finished(play(running(), failure(0, 1.0), exited(0, 1), failure(1, 2.0), exited(1, 1))[1])
    assert outcome.failure.text == "traceback of 0"


def test_exit_without_a_word_is_an_error_too():
    outcome = finished(play(running(1, 1), exited(0, 17))[1])
    assert outcome.code == 17 and "exit code 17" in outcome.reason


def test_a_kill_seen_after_the_exceptions_it_caused_is_the_cause():
    state, _ = play(running(3, 1), failure(0, 1.0), exited(0, 1), now=1.0)
    state, actions = decide(state, exited(1), 1.3)
    assert actions[1:] == [Close()]
    assert play(state, exited(2))[1] == [Begin(2)]


def test_a_kill_seen_when_all_the_others_have_exited_names_the_right_generation():
    state, _ = play(running(), failure(0, 1.0, consequence=True), exited(0, 1), now=1.0)
    _, actions = play(state, exited(1), now=1.1)
    # Close is said though nothing lives: a worker that cannot fork another generation then says so.
    assert actions[1:] == [Close(), Begin(2)] and "as generation 2" in said(actions)


def test_a_trainer_that_stopped_by_itself_is_no_failure_and_the_others_run_on():
    state, _ = play(running(), exited(0, STOPPED), now=1.0)
    state, actions = play(state, Tick(), now=1.0 + state.limits.cause_s)
    assert actions == [] and state.phase is Phase.RUNNING and state.deadline is None


def test_left_by_itself():
    outcome = finished(play(running(), exited(0, STOPPED), exited(1, STOPPED))[1])
    assert (outcome.kind, outcome.code, outcome.keep) == ("stopped", STOPPED, True)


def test_a_trainer_that_told_its_error_and_stays_is_not_waited_for():
    state, _ = play(running(), failure(0, 1.0), now=1.0)
    assert decide(state, Tick(), 0.9 + state.limits.leave_s)[1] == []
    state, actions = decide(state, Tick(), 1.0 + state.limits.leave_s)
    assert actions == [Close()]
    outcome = finished(play(state, exited(0), exited(1))[1])
    assert (outcome.kind, outcome.failure.rank) == ("failed", 0)


def test_an_error_is_of_its_generation():
    state, _ = play(running(), failure(0, 1.0), exited(1), now=1.0)
    assert finished(play(state, STOP, exited(0), now=2.0)[1]).kind == "stopped"
    state, _ = play(state, exited(0))
    assert state.generation == 2
    assert play(state, failure(0, 1.0), Listens(0, 1), exited(0, 1)) == (state, [])  # late news of generation 1


@pytest.mark.parametrize("death", [exited(1), gone(1), gone(1, "silent")])
def test_an_error_that_was_told_is_not_hidden_by_a_later_death(death):
    told, _ = play(running(2, 1), failure(0, 1.0, code=2), now=1.0)
    assert decide(told, death, 1.0 + told.limits.settle_s)[0].outcome is None  # it may be the cause: restarted
    state, actions = decide(told, death, 1.1 + told.limits.settle_s)
    assert actions == [Close()]
    assert (state.outcome.kind, state.outcome.code, state.outcome.failure.rank) == ("failed", 2, 0)
    consequence, _ = play(running(2, 1), failure(0, 1.0, consequence=True), now=1.0)
    assert decide(consequence, death, 1.1 + told.limits.settle_s)[0].outcome is None


def test_an_error_that_was_told_is_not_hidden_by_a_machine_that_can_fork_no_more():
    state, _ = play(running(2, 1), failure(0, 1.0, code=2), unable(1), now=1.0)
    assert (state.outcome.code, state.outcome.failure.rank) == (2, 0)
    state, _ = play(running(2, 1), failure(0, 1.0, consequence=True), unable(1), now=1.0)
    assert state.outcome.reason == "no module"
    state, _ = play(running(2, 1), failure(0, 1.0, code=2), exited(1), unable(1), now=1.0)
    assert state.outcome.reason == "no module"  # the error was of the generation that is closed


def test_a_kill_says_why_where_it_is_known():
    known = exited(0, why="out of memory (memory cgroup /job)")
    state, actions = play(running(1, 1), known)
    words = "the trainer of rank 0 was killed: out of memory (memory cgroup /job); restarting"
    assert said(actions).startswith(words) and state.cause.kind == "out of memory"
    state = running(1, 1, same_step_failures=0)
    why, unknown = finished(play(state, known)[1]), finished(play(state, exited(0))[1])
    assert why.code == unknown.code == 137
    assert "dmesg" in unknown.reason and "dmesg" not in why.reason


# --- how often ----------------------------------------------------------------------------------------------------------


def test_failures_without_a_new_step_between_them_are_counted_and_end_the_job():
    state = running(1, 1, same_step_failures=3)
    for generation in (1, 2):
        state, actions = play(state, Reached(7), exited(0, -11, generation))
        assert actions[-1] == Begin(generation + 1) and state.row == generation
    outcome = finished(play(state, Reached(7), exited(0, -11, 3))[1])
    assert (outcome.kind, outcome.code, outcome.keep) == ("failed", 128 + 11, True)
    assert "by SIGSEGV; not restarted: 3 failures in a row without a new step are enough" in outcome.reason


def test_a_new_step_begins_the_count_again_and_an_old_one_does_not():
    state, _ = play(running(1, 1, same_step_failures=3), Reached(7), exited(0), exited(0, -9, 2))
    assert (state.row, state.row_step) == (2, 7)
    again, actions = play(state, Reached(8), exited(0, -9, 3))
    assert again.row == 1 and actions[-1] == Begin(4)
    # From an old checkpoint steps are done again: none of them is new.
    assert "3 failures in a row" in finished(play(state, Reached(3), exited(0, -9, 3))[1]).reason


def test_a_long_job_may_be_killed_a_hundred_times():
    state = running(2, 1)
    for generation in range(1, 101):
        state, actions = play(state, Reached(generation), exited(0, -9, generation), exited(1, -9, generation))
        assert actions == [Begin(generation + 1)]


@pytest.mark.parametrize("event", [exited(0), gone(0), gone(0, "silent")])
def test_nothing_is_restarted_where_the_limit_is_0(event):
    state, actions = play(running(2, 1, same_step_failures=0), event)
    assert actions == [Close()] and may_restart(state) is not None
    assert "not restarted: nothing is restarted (recovery.same_step_failures is 0" in state.outcome.reason


def test_a_lost_machine_counts_as_one_failure_however_long_it_is_away():
    state, _ = play(running(2, 1), gone(1), exited(0), gone(1), joined(1), gone(1), joined(1))
    assert state.row == 1


# --- machines that go and come ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["agent", "silent"])
def test_a_machine_that_is_gone_is_waited_for_and_its_trainers_are_taken_for_living(kind):
    state, actions = play(running(2, 2), gone(1, kind), now=10.0)
    assert actions[1:] == [Close()] and state.cause.kind == kind and state.cause.machine == 1
    assert said(actions) == "the worker agent on h2 is gone; restarting all 4 trainers as generation 2"
    assert state.phase is Phase.WAITING and state.deadline == 10.0 + state.limits.wait_s
    state, actions = play(state, exited(0), exited(1), now=11.0)
    assert actions == [] and state.alive == {2, 3}
    state, actions = play(state, joined(1), now=12.0)  # another agent: it has killed what the last one left
    assert actions == [] and state.phase is Phase.RECOVERING and state.deadline is None and not state.alive
    assert play(state, Ready(1))[1] == [Begin(2)]


def test_a_machine_away_longer_than_wait_s_ends_the_job_and_the_snapshots_stay():
    state, _ = play(running(3, 1), gone(1), exited(0), exited(2), now=10.0)
    state, _ = play(state, gone(2), now=30.0)  # a second one: the first one's deadline stays
    assert play(state, Tick(), now=69.9)[1] == []
    outcome = finished(play(state, Tick(), now=70.0)[1])
    assert (outcome.kind, outcome.code, outcome.keep) == ("failed", 1, True)
    assert outcome.reason.startswith("the worker agent on h2 is gone; h2 (rank 1) and h3 (rank 2) did not come back")
    back, _ = play(state, joined(1), now=40.0)  # the other one has 60 s of its own
    assert back.phase is Phase.WAITING and back.deadline == 30.0 + state.limits.wait_s
    assert "h3 (rank 2) did not come back within 60 s" in finished(play(back, Tick(), now=90.0)[1]).reason


def test_two_machines_at_once_are_one_failure_and_both_are_waited_for():
    state, actions = play(running(4, 2), gone(1), gone(3, "silent"))
    assert actions == [] and state.phase is Phase.WAITING and state.row == 1 and state.cause.machine == 1
    state, _ = play(state, *(exited(rank) for rank in (0, 1, 4, 5)), joined(1), Ready(1))
    assert state.phase is Phase.WAITING
    assert play(state, joined(3), Ready(3))[1] == [Begin(2)]


def test_two_trainers_at_once_are_one_failure():
    state, _ = play(running(2, 2), exited(0), exited(3))
    state, actions = play(state, exited(1), exited(2))
    assert actions == [Begin(2)] and state.row == 1


def test_a_machine_may_go_while_the_trainers_are_killed():
    state, _ = play(running(2, 1), exited(0))
    state, actions = play(state, gone(1), now=5.0)
    assert actions == [] and state.phase is Phase.WAITING and state.deadline == 5.0 + state.limits.wait_s
    assert play(state, joined(1), Ready(1))[1] == [Begin(2)]


def test_news_that_a_lost_machine_is_gone_changes_nothing():
    state, _ = play(running(2, 1), gone(1))
    assert play(state, gone(1))[0].phase is Phase.WAITING
    assert play(state, gone(1))[1] == []


def test_a_worker_that_joins_again_before_the_root_missed_it_has_lost_its_generation():
    state, actions = play(running(2, 1), joined(1))
    assert said(actions).startswith("the worker agent on h2 lost its connection; restarting")
    assert actions[1:] == [Close()] and state.phase is Phase.RECOVERING and state.alive == {0}
    assert play(state, exited(0), Ready(1))[1] == [Begin(2)]


# --- each event in each phase -------------------------------------------------------------------------------------------


def in_every_phase() -> dict[Phase, State]:
    """A job on two machines in every phase but the last; in WAITING machine 1 is away. In CLAIMING it has come back."""
    states = [
        play(forming(2, 1), joined(0), joined(1), Ready(0))[0],
        planning(),
        claiming(),
        running(2, 1),
        play(listening(2, 1), STOP)[0],
        play(running(2, 1), exited(0))[0],
        play(running(2, 1), gone(1))[0],
        play(running(2, 1), STOP)[0],
    ]
    return {state.phase: state for state in states}


EACH = pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.ENDED])


def test_there_is_a_state_of_every_phase():
    assert set(in_every_phase()) == set(Phase) - {Phase.ENDED}


@EACH
def test_a_machine_joins_again_in_any_phase(phase):
    """None of its trainers lives. The others' are killed if they run."""
    state, actions = play(in_every_phase()[phase], joined(1))
    assert state.machines[1].here and not state.machines[1].ready and 1 not in state.alive
    assert (Close() in actions) is (phase in (Phase.RUNNING, Phase.STOPPING))
    then = {
        Phase.FORMING: Phase.FORMING,
        Phase.PLANNING: Phase.RECOVERING,
        Phase.CLAIMING: Phase.RECOVERING,
        Phase.RUNNING: Phase.RECOVERING,
        Phase.STOPPING: Phase.ENDING,
        Phase.RECOVERING: Phase.RECOVERING,
        Phase.WAITING: Phase.RECOVERING,
        Phase.ENDING: Phase.ENDING,
    }
    assert state.phase is then[phase]


@EACH
def test_a_machine_goes_in_any_phase(phase):
    state, actions = play(in_every_phase()[phase], gone(0), now=1.0)
    assert not state.machines[0].here
    then = {
        Phase.FORMING: (Phase.FORMING, []),
        Phase.PLANNING: (Phase.WAITING, []),
        Phase.CLAIMING: (Phase.WAITING, []),
        Phase.RUNNING: (Phase.WAITING, [Close()]),
        Phase.STOPPING: (Phase.ENDING, [Close()]),
        Phase.RECOVERING: (Phase.WAITING, []),
        Phase.WAITING: (Phase.WAITING, []),
        Phase.ENDING: (Phase.ENDING, []),
    }
    assert (state.phase, [one for one in actions if not isinstance(one, Say)]) == then[phase]
    assert state.deadline is not None


@EACH
def test_readiness_in_any_phase_is_noted_and_begins_nothing_while_a_trainer_lives(phase):
    before = in_every_phase()[phase]
    if phase in (Phase.PLANNING, Phase.CLAIMING):  # begun anew
        assert play(before, Ready(0, False), Ready(0))[1] == [Begin(before.generation + 1)]
        return
    state, actions = play(before, Ready(0, False), Ready(0))
    assert actions == [] and state == before  # a machine that forked is still ready
    assert not play(before, Ready(0, False))[0].machines[0].ready


@EACH
def test_a_machine_that_can_fork_no_more_ends_the_job_unless_it_ends_already(phase):
    state, _ = play(in_every_phase()[phase], unable(0))
    ended = phase in (Phase.STOPPING, Phase.ENDING)
    assert state.outcome.reason == ("Ctrl-C" if ended else "no module")
    nothing_lives = dict.fromkeys((Phase.FORMING, Phase.PLANNING, Phase.CLAIMING), Phase.ENDED)
    assert state.phase is {Phase.STOPPING: Phase.STOPPING, **nothing_lives}.get(phase, Phase.ENDING)


@EACH
def test_what_cannot_be_reaped_ends_the_job_in_any_phase_and_is_not_waited_for(phase):
    state, actions = play(in_every_phase()[phase], Stuck(0, "stuck in the kernel"))
    assert state.outcome.kind == "lost" and state.outcome.keep and 0 not in state.alive
    if state.phase is not Phase.ENDED:  # the other machine's come first
        assert state.alive == {1}
        actions = play(state, exited(1))[1]
    assert finished(actions).reason == "stuck in the kernel"


@EACH
def test_a_request_to_stop_in_any_phase(phase):
    state, actions = play(in_every_phase()[phase], StopAsked("launch/stop.py", 143, keep=False, force=True))
    first = phase in (Phase.STOPPING, Phase.ENDING)
    assert state.outcome.code == (130 if first else 143) and not state.outcome.keep
    nothing_lives = phase in (Phase.FORMING, Phase.PLANNING, Phase.CLAIMING)
    assert state.phase is (Phase.ENDED if nothing_lives else Phase.ENDING)
    if state.phase is not Phase.ENDED:
        here = [one for one in reaped(state) if state.machines[one.rank].here]
        actions = play(state, *here)[1]
    assert finished(actions).kind == "stopped"


# --- the end ------------------------------------------------------------------------------------------------------------


@SHAPES
def test_stop_waits_for_the_step_of_those_who_listen(machines, local):
    state, actions = play(listening(machines, local), STOP)
    assert actions[1:] == [AskToStop()] and state.deadline == state.limits.stop_s
    outcome = finished(play(state, *(exited(rank, STOPPED) for rank in range(state.world)))[1])
    assert (outcome.kind, outcome.code, outcome.keep) == ("stopped", 130, True)


def test_stop_just_when_the_work_was_done():
    outcome = finished(play(listening(), STOP, exited(0, 0), exited(1, 0))[1])
    assert (outcome.kind, outcome.code, outcome.keep) == ("done", 0, False)


def test_stop_kills_at_the_deadline_or_when_forced():
    asked, _ = play(listening(2, 1), STOP, exited(0, STOPPED))
    state, actions = decide(asked, Tick(), asked.limits.stop_s)
    assert Close() in actions and "did not stop within 15 s" in said(actions)
    assert finished(play(state, exited(1))[1]).code == 130
    assert play(asked, replace(STOP, force=True))[1] == [Close()]
    assert play(asked, StopAsked("SIGTERM", 143))[1] == []  # the launcher's, after the terminal's: no second request


def test_stop_kills_at_once_who_does_not_listen():
    _, actions = play(running(), Listens(0, 1), STOP)
    assert actions == [Close()]


def test_stop_before_anything_runs():
    assert finished(play(forming(2, 1), joined(0), STOP)[1]).code == 130


def test_stop_while_a_machine_is_away_ends_when_those_that_are_here_are_reaped():
    state, actions = play(running(2, 2), gone(1), STOP, now=1.0)
    assert actions == [Close()] and state.deadline == 1.0 + state.limits.end_s
    outcome = finished(play(state, exited(0), exited(1))[1])
    assert (outcome.kind, outcome.code, outcome.keep) == ("stopped", 130, True)
    assert play(state, joined(1))[1] == [], "it is back, and has killed its own"


def test_a_machine_that_goes_in_the_end_is_not_waited_for():
    state, _ = play(running(2, 1), STOP, exited(0))
    assert finished(play(state, gone(1))[1]).code == 130


def test_a_worker_that_neither_reaps_nor_says_why_is_not_waited_for_for_ever():
    state, _ = play(running(2, 1), STOP, exited(0), now=1.0)
    assert play(state, Tick(), now=40.9)[1] == []
    assert finished(play(state, Tick(), now=41.0)[1]).code == 130


def test_a_later_stop_may_drop_what_an_earlier_one_kept():
    state, _ = play(listening(), STOP, StopAsked("launch/stop.py", 143, keep=False))
    outcome = finished(play(state, exited(0, STOPPED), exited(1, STOPPED))[1])
    assert (outcome.code, outcome.keep) == (130, False)


def test_an_error_that_was_told_is_not_hidden_by_a_request_to_stop():
    state, _ = play(listening(), failure(0, 1.0, code=2), now=1.0)
    state, actions = decide(state, StopAsked("launch/stop.py", 143, keep=False), 1.1)
    assert actions == [Close()]
    outcome = finished(play(state, exited(0, 2), exited(1))[1])
    assert (outcome.kind, outcome.code, outcome.failure.rank, outcome.keep) == ("failed", 2, 0, False)
    state, _ = play(listening(), failure(0, 1.0, consequence=True), STOP, now=1.0)
    assert finished(play(state, exited(0, 1), exited(1))[1]).kind == "stopped"


# --- hangs --------------------------------------------------------------------------------------------------------------


@SHAPES
def test_of_a_hang_the_stacks_are_written_then_it_is_gone_on_from_as_from_a_kill(machines, local):
    state, actions = play(running(machines, local), HUNG, now=100.0)
    assert actions == [DumpStacks()] and state.phase is Phase.RUNNING
    assert play(state, HUNG, Tick(), now=100.2)[1] == []
    state, actions = play(state, Tick(), now=100.0 + state.limits.dump_s)
    assert said(actions) == f"{HUNG.words}; restarting all {state.world} trainers as generation 2"
    assert actions[1:] == [Close()] and state.cause.kind == "hang" and state.cause.rank == 1
    state, actions = play(state, *reaped(state), now=102.0)
    assert actions == [Begin(2)] and state.hung is None


def test_hangs_count_as_failures_and_end_the_job_with_their_words():
    state, _ = play(running(same_step_failures=0), HUNG)
    state, _ = play(state, Tick(), now=1.0)
    outcome = finished(play(state, exited(0), exited(1), now=1.0)[1])
    assert outcome.kind == "failed" and outcome.code == 1 and outcome.keep
    assert outcome.reason.startswith(f"{HUNG.words}; not restarted: nothing is restarted")


def test_a_hang_is_not_looked_at_while_an_exit_is_awaited_or_the_job_ends():
    told = play(running(), failure(0, 0.0))[0]
    stopping = play(listening(), STOP)[0]
    for state in (told, stopping, play(running(), exited(1, 0))[0], forming(1, 2)):
        assert play(state, HUNG) == (state, [])


def test_a_stop_ends_a_job_that_hangs_at_once():
    state, _ = play(listening(), HUNG)
    state, actions = play(state, STOP)
    assert actions == [Close()] and state.outcome.code == 130


@pytest.mark.parametrize("death", [exited(1), gone(1)])
def test_a_death_while_the_stacks_are_written_is_gone_on_from(death):
    state, _ = play(running(2, 1), HUNG)
    state, actions = play(state, death, now=0.2)
    assert isinstance(actions[0], Say) and actions[1:] == [Close()] and state.row == 1


def test_all_done_before_the_stacks_are_written_is_done():
    state, _ = play(running(), HUNG)
    assert finished(play(state, exited(0, 0), exited(1, 0), now=0.2)[1]).kind == "done"


# --- damaged copies -----------------------------------------------------------------------------------------------------


def damaged(rank: int, time_s: float) -> Failed:
    text = "snapshot 1-1-7 cannot be restored from memory"
    return Failed(Failure(rank, 2, time_s, f"DamagedSnapshot: {text}", text, consequence=True), 1)


@pytest.mark.parametrize("together", [True, False], ids=["all exit", "one stays"])
def test_a_damaged_snapshot_is_the_cause_also_after_a_rank_that_only_lost_a_peer(together):
    told = [failure(0, 1.0, consequence=True), exited(0, 1), damaged(1, 2.0), exited(1, 2)]
    state, actions = play(running(1, 2 if together else 3), *told, now=2.0)
    if not together:
        state, actions = decide(state, Tick(), 2.0 + state.limits.cause_s)
    text = "snapshot 1-1-7 cannot be restored from memory"
    assert state.cause == Cause("damaged copy", text, rank=1) and Close() in actions
    assert said(actions).startswith(f"{text}; restarting all")


def test_an_error_of_its_own_comes_before_a_damaged_snapshot():
    state, _ = play(running(), damaged(0, 1.0), exited(0, 2), failure(1, 2.0, code=3), exited(1, 1), now=2.0)
    assert (state.outcome.code, state.outcome.failure.rank) == (3, 1)


def test_a_copy_that_is_found_damaged_ends_the_generation_and_counts_as_a_failure():
    event = Damaged(1, "rank-00001 of 1-1-7 is damaged, on h2")
    state, actions = play(running(2, 1), event)
    assert state.cause == Cause("damaged copy", event.text, machine=1) and state.row == 1
    assert said(actions).startswith(event.text) and actions[1:] == [Close()]
    assert play(state, event) == (state, []), "by another replicator, of the same generation"
    assert play(state, *reaped(state))[1] == [Begin(2)]
    stopping = play(listening(2, 1), STOP)[0]
    for other in (stopping, planning(), forming(2, 1)):
        assert decide(other, event, 1.0) == (other, [])


# --- in general ---------------------------------------------------------------------------------------------------------


def test_state_is_a_value():
    state = running()
    decide(state, exited(0), 1.0)
    assert state == replace(state) and state.phase is Phase.RUNNING


EVERY = [
    Tick(),
    exited(0, 0),
    STOP,
    joined(0),
    Ready(0),
    unable(0),
    gone(0),
    Stuck(0, "x"),
    HUNG,
    Damaged(0, "x"),
    Reached(9),
]


@pytest.mark.parametrize("event", EVERY)
def test_nothing_happens_after_the_end(event):
    state, _ = play(running(1, 1), exited(0, 0))
    assert state.phase is Phase.ENDED and decide(state, event, 99.0) == (state, [])


EVENTS = st.one_of(
    st.tuples(st.just("exit"), st.integers(0, 5), st.sampled_from([0, 1, 2, 17, STOPPED, -9, -11])),
    st.tuples(st.sampled_from(["failed", "listens", "hung"]), st.integers(0, 5)),
    st.tuples(st.sampled_from(["join", "go", "ready", "unready", "damaged"]), st.integers(0, 2)),
    st.tuples(st.just("stop"), st.booleans(), st.booleans()),
    st.tuples(st.just("reached"), st.integers(0, 9)),
    st.tuples(st.just("wait"), st.floats(0.0, 20.0)),
)


@given(st.sampled_from([(1, 3), (3, 1), (3, 2)]), st.lists(EVENTS, max_size=60))
def test_any_order_of_events_keeps_the_invariants(shape, script):
    """No generation begins before the last one is reaped and all are ready; the job ends once."""
    (machines, local), now, ended = shape, 0.0, []
    state, alive, here = forming(machines, local), set(), [False] * machines

    def act(event):
        nonlocal state, alive
        before = state
        state, actions = play(state, event, now=now)
        for action in actions:
            assert not ended, "an action after the end"
            match action:
                case Begin(generation):
                    assert not alive, "begun before the last generation was reaped"
                    assert all(here) and all(one.ready for one in state.machines)
                    assert generation == before.generation + 1
                    alive = set(range(machines * local))
                case AskToStop():
                    assert alive == before.listening and before.phase is Phase.RUNNING
                case DumpStacks():
                    assert before.phase is Phase.RUNNING
                case Finish(outcome):
                    ended.append(outcome)
        assert alive <= state.alive or ended or state.phase is Phase.ENDED
        assert [one.here for one in state.machines] == here or ended

    for machine in range(machines):
        here[machine] = True
        act(joined(machine))
        act(Ready(machine))
    for kind, *rest in script:
        place = rest[0] % machines if kind in ("join", "go", "ready", "unready", "damaged") else 0
        rank = rest[0] % (machines * local) if kind in ("exit", "failed", "listens", "hung") else 0
        tells = rank in alive and here[rank // local]
        if ended:
            break
        if kind == "exit" and tells:
            alive.discard(rank)
            act(Exited(rank, state.generation, rest[1]))
        elif kind == "failed" and tells:
            act(failure(rank, now, generation=state.generation))
        elif kind == "listens" and tells:
            act(Listens(rank, state.generation))
        elif kind == "hung" and tells:
            act(Hung(rank, "hangs"))
        elif kind == "join" and not here[place]:
            here[place] = True
            alive -= state.ranks_of(place)
            act(joined(place))
        elif kind == "go" and here[place]:
            here[place] = False
            act(gone(place))
        elif kind in ("ready", "unready") and here[place]:
            act(Ready(place, kind == "ready"))
        elif kind == "damaged" and here[place]:
            act(Damaged(place, "damaged"))
        elif kind == "stop":
            act(StopAsked("stop", 130, keep=rest[0], force=rest[1]))
        elif kind == "reached":
            act(Reached(rest[0]))
        elif kind == "wait":
            now += rest[0]
            act(Tick())
    if not ended:  # ask it to end: kills are obeyed, so it must
        act(StopAsked("stop", 130, force=True))
        for rank in sorted(alive):
            if here[rank // local] and not ended:
                alive.discard(rank)
                act(Exited(rank, state.generation, -9))
    assert len(ended) == 1 and state.phase is Phase.ENDED
