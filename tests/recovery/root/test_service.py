"""What the root says of the job, in each phase."""

import selectors
from dataclasses import replace
from types import SimpleNamespace

import pytest

from gemini_gnn.config import FaultsConfig, RecoveryConfig, SnapshotConfig
from gemini_gnn.observe import terms
from gemini_gnn.observe.status import read_status
from gemini_gnn.recovery import messages
from gemini_gnn.recovery.outcome import Outcome
from gemini_gnn.recovery.root import decisions
from gemini_gnn.recovery.root import state as job
from gemini_gnn.recovery.root.claiming import Result, Won
from gemini_gnn.recovery.root.faults import Faults
from gemini_gnn.recovery.root.ledger import Ledger
from gemini_gnn.recovery.root.restoring import Storage
from gemini_gnn.recovery.root.service import Link, Root
from gemini_gnn.recovery.worker.journal import Journal


@pytest.fixture
def root(tmp_path):
    terms.make_run_dir(tmp_path)
    journal, selector = Journal(tmp_path, "h0"), selectors.DefaultSelector()
    yield Root(
        term=2,
        start="start",
        beats=None,
        state=job.forming(2, 2, generation=1),
        settings=RecoveryConfig(),
        resume="auto",
        launched=(4, 2),
        record={},
        address="127.0.0.1",
        token=b"",
        listener=None,
        ledger=Ledger(2, [], None),
        journal=journal,
        faults=Faults(FaultsConfig(), 4, tmp_path, journal),
        snapshot=SnapshotConfig(),
        storage=Storage.NEVER,
        selector=selector,
        now=100.0,
    )
    selector.close()
    assert journal.close(5.0)


@pytest.mark.parametrize(
    ("phase", "word"),
    [
        (
            phase,
            {
                "forming": "starting",
                "ending": "stopping",
                "ended": "stopping",
                "planning": "recovering",
                "claiming": "recovering",
            }.get(phase, phase),
        )
        for phase in job.Phase
    ],
)
def test_each_phase_has_its_word(root, phase, word):
    outcome = Outcome("failed", 1, "the cause") if phase is job.Phase.ENDING else None
    root.state = replace(root.state, phase=phase, outcome=outcome)
    status = root.status(102.5)
    assert (status["state"], status["state_s"], status["reason"]) == (word, 2.5, outcome and "the cause")


def test_a_root_that_replaces_a_dead_one_recovers_from_the_step_that_was_reached(root):
    root.ledger.root_died("h0", died_s=99.0, seen_s=99.5, step=7, generation=1, now=100.0, time=0.0)
    status = root.status(101.0)
    assert (status["state"], status["step"]) == ("recovering", 7)
    assert status["recovers_from"] == "the root agent on h0 is gone"


def test_that_the_work_is_done_is_written_before_any_machine_is_told(root, tmp_path):
    root.journal.speaks_for_job, seen = True, []
    here, there = messages.pair(messages.TO_ROOT)
    root.links.append(Link(here, 100.0, machine=1))
    here.send = lambda message: seen.append((type(message), read_status(tmp_path)["state"]))
    root._act(job.Finish(Outcome("done", 0, "done", keep=False)), 101.0)
    assert seen == [(messages.Finish, "done")] and read_status(tmp_path)["exit_code"] == 0
    here.close()
    there.close()


def test_machines_and_ranks_that_never_came_are_shown(root):
    status = root.status(101.0)
    assert [(one["machine"], one["ranks"], one["here"], one["here_s"]) for one in status["machines"]] == [
        (None, [0, 1], False, None),
        (None, [2, 3], False, None),
    ]
    assert status["ranks"][3] == {"rank": 3, "machine": "machine 2", "alive": False}


def test_reaping_is_not_taken_for_waiting_until_all_are_ready():
    """Where all machines are ready, the next generation begins as soon as the last trainer is reaped."""
    ledger, state = Ledger(1, [], 0.0), job.forming(1, 2)
    now = 10.0

    def see(event):
        nonlocal state
        before = state
        state, actions = decisions.decide(state, event, now)
        if state.cause is not before.cause:
            ledger.failed(state.cause, "", before.generation, 5, now, now, now, 0.0)
        if job.Plan() in actions:
            see(job.Planned())
        if any(isinstance(action, job.Begin) for action in actions):
            ledger.begun(now)

    for event in (job.Joined(0, "h0"), job.Ready(0), job.Exited(1, 1, -9, "")):
        see(event)
    now = 10.25
    see(job.Exited(0, 1, -9, ""))
    assert (state.phase, state.generation) == (job.Phase.RUNNING, 2)
    parts = ledger.end(11.0)["parts"]
    assert (parts["reap_s"], parts["ready_s"]) == (0.25, 0.0)


def test_a_late_answer_to_the_last_root_is_nobodys(root):
    """Else the plan would be made without what a machine holds: an older snapshot, or none."""
    assert not root.copies.plan([0, 1])
    for machine in range(2):
        for number in range(3):
            assert not root.copies.hear(machine, messages.Holds(number, []), 101.0)
            assert not root.copies.hear(machine, messages.Fetched(number, []), 101.0)
    first, second = (ask.number for ask in root.copies._restoring.open)
    assert not root.copies.hear(0, messages.Holds(first, []), 101.0)
    assert root.copies.hear(1, messages.Holds(second, []), 101.0)


@pytest.mark.parametrize("force", [False, True])
def test_a_second_request_to_stop_does_not_wait_for_storage(root, force):
    outcome = Outcome("stopped", 130, "Ctrl-C")
    root.state = replace(root.state, phase=job.Phase.ENDED, outcome=outcome)
    root.copies.ending, root._until_s = True, 120.0
    here, there = messages.pair(messages.TO_ROOT)
    root._hear(Link(here, 100.0), messages.Stop("Ctrl-C", 130, force=force), 101.0)
    root.tick(101.0)
    assert root.finished is force
    here.close()
    there.close()


# --- another root ---------------------------------------------------------------------------------------------------------


class Answered:
    """A claim that has come to its end."""

    def __init__(self, result):
        self.result = result

    def give_up(self):
        pass


def worker_of(root, machine):
    here, there = messages.pair(messages.TO_ROOT)
    root._adopt(here, 100.0)
    root.links[-1].machine = machine
    return messages.Channel(there, messages.TO_WORKER)


@pytest.mark.parametrize("known", [True, False])
def test_a_root_whose_claim_is_refused_sends_its_workers_to_the_other_one_and_does_no_more(root, known):
    worker = worker_of(root, 1)
    root.state = replace(root.state, phase=job.Phase.CLAIMING, claimed=False, deadline=160.0)
    holder = {"start": "start", "address": "h1", "port": 7} if known else {}
    root._claim = Answered(Result(None, holder))
    root.tick(101.0)
    assert root.resigned and not root.finished and not root.journal.speaks_for_job
    assert worker.receive() == [messages.Moved("h1", 7) if known else messages.Moved("", 0)]
    root.tick(102.0)
    assert worker.receive() == [], "not even a beat"
    worker.close()


def test_a_root_whose_claim_is_refused_for_another_start_ends(root):
    root.state = replace(root.state, phase=job.Phase.CLAIMING, claimed=False, deadline=160.0)
    root._claim = Answered(Result(None, {"start": "another"}))
    root.tick(101.0)
    assert not root.resigned and root.state.outcome.reason == "another start took run_dir"


@pytest.mark.parametrize("start", ["start", "another"])
def test_a_root_that_sees_a_newer_term_in_its_beats_does_no_more(root, start):
    worker = worker_of(root, 1)
    root.beats = SimpleNamespace(lost=True, successor={"start": start, "address": "h1", "port": 7}, stop=lambda _: None)
    root.tick(101.0)
    assert root.resigned is (start == "start") and root.lost_to_another_start is (start == "another")
    assert (messages.Moved("h1", 7) in worker.receive()) is root.resigned
    worker.close()


def test_the_roster_has_the_seats_of_the_term_not_those_that_are_planned(root):
    """Who takes over needs a witness: a machine that has trained."""
    root.state = replace(root.state, seats=(0, 2), machines=(*root.state.machines, job.Machine()), claimed=False)
    worker = worker_of(root, 1)
    root._tell_roster()
    assert not worker.receive()
    root.state = replace(root.state, claimed=True, trained=(0, 2))
    root._tell_roster()
    (roster,) = worker.receive()
    assert (roster.term, roster.seats) == (2, [0, 2])
    worker.close()


def test_a_claim_that_is_won_late_gives_the_root_its_term_and_begins_nothing(root):
    root.journal.speaks_for_job = False
    root.state = replace(root.state, phase=job.Phase.WAITING, claimed=False, deadline=160.0)
    beats = SimpleNamespace(lost=False, stop=lambda _: None)
    root._claim = Answered(Result(Won(3, beats, [{"recovery_s": 1.0, "steps_lost": 0}], {})))
    root.tick(101.0)
    assert (root.term, root.copies.term, root.journal.term, root.beats) == (3, 3, 3, beats)
    assert not root.state.claimed and root.state.phase is job.Phase.WAITING and root.ledger.failures
    root.beats = None
