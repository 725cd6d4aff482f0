"""Who holds a seat, and which root may go on: standbys, claims, and roots that take over. Pure."""

from __future__ import annotations

import pytest

from gemini_gnn.recovery.root.decisions import decide
from gemini_gnn.recovery.root.state import (
    Begin,
    Cause,
    Claim,
    Claimed,
    Close,
    Dismiss,
    Finish,
    Limits,
    Listens,
    Phase,
    Plan,
    Planned,
    Reached,
    Ready,
    Resign,
    Say,
    State,
    StopAsked,
    Stuck,
    Tick,
    Unreached,
    forming,
    succeeding,
)
from tests.recovery.root.test_decisions import STOP, exited, finished, gone, joined, play, said, unable


def running(seats: int = 2, standbys: int = 1, ready: bool = True) -> State:
    """All machines are here. ``ready``: the standbys are."""
    state = forming(seats + standbys, 1, Limits(), standbys=standbys)
    for machine in range(seats + standbys):
        state, _ = play(state, joined(machine), *[Ready(machine)] * (ready or machine < seats))
    assert state.phase is Phase.RUNNING and state.alive == frozenset(range(seats)) and state.claimed
    return state


def lost(state: State, *machines: int, kind: str = "silent", now: float = 10.0) -> State:
    """These machines are gone; the others' trainers are reaped."""
    state, _ = play(state, *(gone(machine, kind) for machine in machines), now=now)
    left = [exited(rank) for rank in sorted(state.alive) if state.machine_of(rank) not in machines]
    for one in left:
        state, _ = decide(state, one, now)
    return state


def successor(standbys: int = 1, silent: bool = True) -> State:
    """Of three machines, the first of which was root: machine 1 takes over."""
    names, seats = ["h1", "h2", "h3"], range(3 - standbys)
    cause = Cause("silent", "the root agent on h1 is gone", machine=0)
    options = {"root": 1, "lost": 0 if silent else None, "generation": 4, "reached": 7, "cause": cause, "now": 0.0}
    return succeeding(names, seats, 1, Limits(), **options)


# --- seats --------------------------------------------------------------------------------------------------------------


def test_a_standby_trains_nothing_and_is_not_waited_for():
    state, _ = play(forming(3, 2, standbys=1), joined(0), Ready(0), joined(1))
    assert state.world == 4 and state.ranks_of(2) == frozenset()
    assert play(state, Ready(1))[1] == [Begin(1)], "the standby has not even come"


def test_a_silent_machine_is_replaced_at_once_and_nobody_else_moves():
    state, actions = play(running(3, 1), gone(1, "silent"), now=10.0)
    assert state.seats == (0, 3, 2) and state.alive == {0, 2} and not state.claimed
    assert [one.text for one in actions if isinstance(one, Say)][-1] == "h4 takes the place of h2 (rank 1)"
    assert state.phase is Phase.RECOVERING and state.deadline is None
    state, actions = decide(state, exited(0), 10.1)
    assert actions == []
    state, actions = decide(state, exited(2), 10.1)
    assert actions == [Plan()]
    state, actions = decide(state, Planned(), 10.2)
    assert actions == [Claim(witness=True)] and state.phase is Phase.CLAIMING, "other seats need a term of their own"
    state, actions = decide(state, Claimed(True), 10.3)
    assert actions == [Begin(2)] and state.trained == (0, 3, 2) and state.claimed and state.deadline is None


def test_a_machine_whose_connection_broke_may_come_back_before_its_seat_is_taken():
    state = lost(running(), 1, kind="agent")
    assert state.phase is Phase.WAITING and state.seats == (0, 1)
    assert state.deadline == 10.0 + state.limits.return_s
    assert play(state, Tick(), now=12.9)[0].seats == (0, 1)
    back, actions = play(state, joined(1), Ready(1), now=12.9)
    assert actions == [Begin(2)] and back.seats == (0, 1)
    taken, actions = play(state, Tick(), now=13.0)
    assert taken.seats == (0, 2) and actions[-1] == Begin(2) and taken.phase is Phase.RUNNING


def test_a_machine_that_a_new_root_does_not_reach_is_replaced_at_once():
    names, options = ["h1", "h2", "h3", "h4", "h5"], {"generation": 4, "reached": 7, "cause": None, "now": 0.0}
    state = succeeding(names, range(3), 1, Limits(), root=2, lost=0, **options)
    state, _ = play(state, joined(2), Ready(2), joined(3), Ready(3), joined(4), Ready(4), now=0.1)
    assert state.seats == (3, 1, 2) and state.phase is Phase.WAITING, "h2 may only have lost its agent"
    assert state.deadline == state.limits.return_s
    assert play(state, Unreached(2), now=0.5)[0] == state, "it is here"
    state, actions = play(state, Unreached(1), now=0.5)
    assert state.seats == (3, 4, 2) and actions[-1] == Begin(5)


def test_of_two_standbys_the_first_one_takes_the_place():
    state = lost(running(2, 2), 1)
    assert state.seats == (0, 2)
    assert lost(running(2, 2), 0, 1).seats == (2, 3)


def test_two_losses_and_one_standby_wait_for_the_other_then_the_job_ends_with_words():
    state = lost(running(3, 1), 0, 2)
    assert state.seats == (3, 1, 2) and state.phase is Phase.WAITING
    assert state.deadline == 10.0 + state.limits.wait_s
    back, actions = play(state, joined(2), Ready(2), now=20.0)
    assert actions == [Begin(2)] and back.seats == (3, 1, 2)
    ended, actions = play(state, Tick(), now=70.0)
    outcome = finished(actions)
    assert (outcome.kind, outcome.keep) == ("failed", True) and ended.claimed, "it claims before it ends the job"
    assert "h3 (rank 2) did not come back within 60 s (recovery.wait_s)" in outcome.reason


def test_a_standby_that_becomes_ready_takes_a_seat_that_waits():
    state = lost(running(ready=False), 1)
    assert state.phase is Phase.WAITING and state.seats == (0, 1)
    state, actions = play(state, Ready(2), now=20.0)
    assert state.seats == (0, 2) and actions[-1] == Begin(2)


def test_a_machine_that_joins_later_is_a_standby_and_takes_a_seat_that_waits():
    state = lost(running(2, 0), 1)
    state, actions = play(state, joined(2), now=12.0)
    assert len(state.machines) == 3 and actions == [] and state.phase is Phase.WAITING
    assert play(state, Ready(2), now=12.0)[0].seats == (0, 2)
    state, actions = play(running(2, 0), joined(2), Ready(2))
    assert actions == [] and state.phase is Phase.RUNNING and state.seats == (0, 1)


def test_a_machine_that_comes_back_while_its_successor_trains_is_a_standby():
    state, _ = play(lost(running(), 1), Planned())
    assert state.phase is Phase.RUNNING and state.seats == (0, 2)
    back, actions = play(state, joined(1), now=30.0)
    assert actions == [Say("h2 is back: it stands by")]
    again, actions = play(back, Ready(1), now=30.0)
    assert actions == [] and again.phase is Phase.RUNNING and again.seats == (0, 2) and again.claimed
    third, actions = play(again, gone(2, "silent"), exited(0, generation=2), now=40.0)
    assert third.seats == (0, 1) and actions[-1] == Begin(3)


def replaced_in(phase: Phase) -> State:
    """A job with a standby, in every phase but the last."""
    state = running()
    match phase:
        case Phase.FORMING:
            return play(forming(3, 1, standbys=1), joined(2), Ready(2), joined(0), Ready(0))[0]
        case Phase.PLANNING:
            return decide(decide(lost(state, 1, kind="agent"), joined(1), 10.0)[0], Ready(1), 10.0)[0]
        case Phase.CLAIMING:
            return decide(lost(running(2, 2), 1), Planned(), 10.0)[0]
        case Phase.RUNNING:
            return state
        case Phase.STOPPING:
            return play(state, *(Listens(rank, 1) for rank in sorted(state.alive)), STOP)[0]
        case Phase.RECOVERING:
            return play(state, exited(0))[0]
        case Phase.WAITING:
            return lost(running(), 1, kind="agent")
        case Phase.ENDING:
            return play(state, STOP)[0]
    raise AssertionError(phase)


EACH = pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.ENDED])


@EACH
def test_a_standby_goes_in_any_phase_and_the_job_does_not_wait_for_it(phase):
    before = replaced_in(phase)
    assert before.phase is phase
    standby = len(before.machines) - 1
    state, actions = decide(before, gone(standby), 11.0)
    assert isinstance(actions[0], Say) and not state.machines[standby].here
    if phase in (Phase.PLANNING, Phase.CLAIMING):  # it was asked for its copies: it may not answer
        assert state.phase is Phase.PLANNING and actions[1:] == [Plan()]
        assert decide(state, Planned(), 11.0)[1] == [Claim(witness=True)]
    else:
        assert state.phase is phase and actions[1:] == []


@EACH
def test_a_standby_that_can_never_fork_or_reap_is_told_of_and_the_job_goes_on(phase):
    before = replaced_in(phase)
    machine = len(before.machines) - 1
    state, actions = decide(before, unable(machine), 11.0)
    assert not state.machines[machine].ready or before.outcome is not None
    assert state.phase is before.phase and state.outcome is before.outcome
    assert all(isinstance(one, Say) for one in actions) and (not actions or "cannot be a standby" in said(actions))
    state, actions = decide(before, Stuck(machine, "stuck in the kernel"), 11.0)
    assert actions == [Say("stuck in the kernel"), Dismiss(machine)] and state == before


def test_a_machine_that_cannot_reap_is_dismissed_if_a_standby_can_take_its_seat():
    state, _ = play(running(), exited(0), now=1.0)
    state, actions = decide(state, Stuck(1, "stuck in the kernel"), 40.0)
    assert actions == [Say("stuck in the kernel"), Dismiss(1)] and state.outcome is None
    state, actions = play(state, gone(1, "silent"), now=40.0)
    assert state.seats == (0, 2) and actions[-1] == Begin(2)
    alone, _ = play(running(2, 0), exited(0), now=1.0)
    assert finished(play(alone, Stuck(1, "stuck in the kernel"), now=40.0)[1]).kind == "lost"


@pytest.mark.parametrize("came", [True, False], ids=["a standby came", "none came"])
def test_a_machine_that_never_comes_is_replaced_when_the_others_have_waited_long_enough(came):
    state, _ = play(forming(3, 1, standbys=1), joined(0), Ready(0), *([joined(2), Ready(2)] if came else []), now=5.0)
    assert state.phase is Phase.FORMING and state.deadline == 305.0
    state, actions = play(state, Tick(), now=305.0)
    if came:
        assert state.seats == (0, 2) and actions[-1] == Begin(1) and state.claimed
    else:
        assert "(rank 1) did not come within 300 s (distributed.start_timeout_s)" in finished(actions).reason


# --- nothing to restore without a machine -----------------------------------------------------------------------------


def test_a_snapshot_that_is_not_found_is_waited_for_then_found_when_a_machine_is_back():
    state = lost(decide(running(), Reached(7), 5.0)[0], 1)
    state, actions = decide(state, Planned(found=False), 11.0)
    assert state.phase is Phase.WAITING and state.deadline == 70.0
    assert said(actions) == "no snapshot can be restored without h2; waiting for 59 s"
    state, actions = decide(state, joined(1), 20.0)  # a standby now, with the shards of its old seat
    assert actions == [Plan()] and state.seats == (0, 2)
    assert play(state, Planned(), now=20.0)[1] == [Begin(2)]


def test_a_snapshot_that_is_not_found_within_wait_s_is_given_up():
    state, _ = decide(lost(decide(running(), Reached(7), 5.0)[0], 1), Planned(found=False), 11.0)
    state, actions = decide(state, Tick(), 70.0)
    assert actions == [Plan()] and state.phase is Phase.PLANNING
    assert decide(state, Planned(found=False), 70.0)[1] == [Claim(witness=True)], "from the beginning"


# --- claims -----------------------------------------------------------------------------------------------------------


def claiming() -> State:
    state, actions = decide(lost(running(), 1), Planned(), 10.0)
    assert actions == [Claim(witness=True)]
    return state


def test_a_refused_claim_means_that_another_root_has_the_job():
    state, actions = decide(claiming(), Claimed(False), 11.0)
    assert actions == [Resign()] and state.phase is Phase.ENDED and state.outcome is None


def test_a_claim_without_an_answer_ends_the_job_in_the_end():
    state = claiming()
    assert state.deadline == 10.0 + state.limits.wait_s and decide(state, Tick(), 69.0)[1] == []
    state, actions = decide(state, Tick(), 70.0)
    assert "no term could be claimed within 60 s (recovery.wait_s)" in finished(actions).reason
    assert decide(state, Claimed(True), 71.0) == (state, [])


@pytest.mark.parametrize("event", [gone(2), gone(0), Ready(0, False), joined(0)], ids=str)
def test_a_claim_that_is_won_after_something_has_changed_begins_nothing(event):
    state, _ = decide(claiming(), event, 11.0)
    assert state.phase is not Phase.CLAIMING
    after, actions = decide(state, Claimed(True), 12.0)
    assert actions == [] and after == state and not after.claimed and after.trained == (0, 1)


def test_a_machine_that_joins_during_a_claim_is_asked_what_it_holds_and_the_claim_is_made_anew():
    state, actions = decide(claiming(), joined(1), 11.0)
    assert actions == [Plan()] and decide(state, Claimed(True), 12.0) == (state, [])
    assert decide(state, Planned(), 12.0)[1] == [Claim(witness=True)]


def test_whoever_was_away_may_have_been_a_witness_elsewhere():
    state, actions = play(lost(running(2, 0), 1), joined(1))
    assert not state.claimed and actions == []
    state, _ = decide(state, Ready(1), 12.0)
    assert decide(state, Planned(), 12.0)[1] == [Claim(witness=True)]
    standby, _ = play(running(), gone(2), joined(2), Ready(2))
    assert standby.claimed, "a standby is no witness"


def test_a_job_that_has_lost_all_its_seats_goes_on_without_a_witness():
    state, actions = decide(running(1, 1), gone(0, "silent"), 10.0)
    assert state.seats == (1,) and actions[-1] == Plan()
    assert decide(state, Planned(), 10.0)[1] == [Claim(witness=False)]


# --- a root that takes over ---------------------------------------------------------------------------------------------


def test_a_root_that_takes_over_waits_for_the_seats_and_claims_before_it_begins():
    assert decide(successor(), STOP, 0.0)[1] == [Claim(witness=False)], "it may not even end the job"
    state, actions = play(successor(), joined(1), Ready(1))
    assert actions == [] and state.phase is Phase.WAITING and state.seats == (0, 1)
    state, actions = decide(state, joined(2), 0.5)
    assert actions == []
    state, actions = decide(state, Ready(2), 0.5)
    assert state.seats == (2, 1) and actions[-1] == Plan()
    state, actions = decide(state, Planned(), 0.6)
    assert actions == [Claim(witness=True)]
    state, actions = decide(state, Claimed(True), 0.7)
    assert actions == [Begin(5)] and state.claimed


def test_a_root_that_died_has_an_heir_that_is_waited_for():
    state, _ = play(successor(silent=False), joined(1), Ready(1), joined(2), Ready(2), now=0.5)
    assert state.phase is Phase.WAITING and state.seats == (0, 1) and state.deadline == state.limits.return_s
    back, actions = play(state, joined(0), Ready(0), now=1.0)
    assert actions == [Begin(5)] and back.seats == (0, 1)
    assert play(state, Tick(), now=3.0)[0].seats == (2, 1)


def test_a_root_without_a_machine_of_the_last_seats_has_no_witness():
    state = successor(standbys=2, silent=True)  # the only seat was the last root's
    state, _ = decide(decide(state, joined(1), 0.0)[0], Ready(1), 0.0)
    assert state.seats == (1,)
    assert decide(state, Planned(), 0.0)[1] == [Claim(witness=False)]


def test_what_joins_knows_of_newer_generations_and_later_steps():
    state, _ = decide(successor(), joined(1, 6, 9), 0.0)
    assert (state.generation, state.reached) == (6, 9)
    trains, _ = play(running(), joined(2, 6, 9))
    assert trains.generation == 1, "else the news of its trainers would be nobody's"


def test_a_root_without_a_term_claims_before_it_ends_the_job():
    state, _ = play(successor(standbys=0), joined(1), Ready(1), joined(2), Ready(2))
    state, actions = decide(state, Tick(), 60.0)
    assert actions == [Claim(witness=True)] and state.phase is Phase.CLAIMING
    assert "h1 (rank 0) did not come back within 60 s" in state.outcome.reason
    assert decide(state, Claimed(False), 61.0)[1] == [Resign()]
    assert isinstance(decide(state, Claimed(True), 61.0)[1][-1], Finish)
    waits, actions = decide(state, joined(0), 61.0)
    assert actions == [] and waits.phase is Phase.CLAIMING, "it is about to end"
    assert waits.deadline == 60.0 + state.limits.stop_s
    assert finished(decide(waits, Tick(), 60.0 + state.limits.stop_s)[1]) == state.outcome


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.RECOVERING, Phase.PLANNING, Phase.CLAIMING])
def test_a_request_to_stop_reaches_a_root_without_a_term(phase, force):
    state, _ = decide(successor(), joined(1), 0.0)
    if phase is not Phase.WAITING:
        state, _ = play(state, joined(2), Ready(2))
    if phase in (Phase.PLANNING, Phase.CLAIMING):
        state, _ = decide(state, Ready(1), 0.0)
    if phase is Phase.CLAIMING:
        state, _ = decide(state, Planned(), 0.0)
    assert state.phase is phase
    state, actions = decide(state, StopAsked("Ctrl-C", 130, force=force), 1.0)
    if not force:
        assert actions == [Claim(witness=True)] and state.phase is Phase.CLAIMING
        assert decide(state, Planned(), 1.0)[1] == [], "nobody needs the planning any more"
        again, actions = decide(state, StopAsked("Ctrl-C", 130, force=True), 1.0)
        assert again.phase is Phase.ENDED
        state, actions = decide(state, Claimed(True), 1.0)
    assert finished(actions).code == 130
    assert Close() not in actions
