"""What the root says of the job, in each phase."""

import selectors
from dataclasses import replace

import pytest

from gemini_gnn.config import FaultsConfig, RecoveryConfig, SnapshotConfig
from gemini_gnn.observe import terms
from gemini_gnn.observe.status import read_status
from gemini_gnn.recovery import messages
from gemini_gnn.recovery.outcome import Outcome
from gemini_gnn.recovery.root import decisions
from gemini_gnn.recovery.root.decisions import Phase
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
        state=decisions.forming(2, 2, generation=1),
        settings=RecoveryConfig(),
        resume="auto",
        master_addr="127.0.0.1",
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
            {"forming": "starting", "ending": "stopping", "ended": "stopping", "planning": "recovering"}.get(
                phase, phase
            ),
        )
        for phase in Phase
    ],
)
def test_each_phase_has_its_word(root, phase, word):
    outcome = Outcome("failed", 1, "the cause") if phase is Phase.ENDING else None
    root.state = replace(root.state, phase=phase, outcome=outcome)
    status = root.status(102.5)
    assert (status["state"], status["state_s"], status["reason"]) == (word, 2.5, outcome and "the cause")


def test_a_root_that_replaces_a_dead_one_recovers_from_the_step_that_was_reached(root):
    root.ledger.root_died("h0", died_s=99.0, step=7, generation=1, now=100.0, time=0.0)
    status = root.status(101.0)
    assert (status["state"], status["step"]) == ("recovering", 7)
    assert status["recovers_from"] == "the root agent on h0 died"


def test_that_the_work_is_done_is_written_before_any_machine_is_told(root, tmp_path):
    root.journal.speaks_for_job, seen = True, []
    here, there = messages.pair(messages.TO_ROOT)
    root.links.append(Link(here, 100.0, machine=1))
    here.send = lambda message: seen.append((type(message), read_status(tmp_path)["state"]))
    root._act(decisions.Finish(Outcome("done", 0, "done", keep=False)), 101.0)
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
    ledger, state = Ledger(1, [], 0.0), decisions.forming(1, 2)
    now = 10.0

    def see(event):
        nonlocal state
        before = state
        state, actions = decisions.decide(state, event, now)
        if state.cause is not before.cause:
            ledger.failed(state.cause, "", before.generation, 5, now, now, now, 0.0)
        if decisions.Plan() in actions:
            see(decisions.Planned())
        if any(isinstance(action, decisions.Begin) for action in actions):
            ledger.begun(now)

    for event in (decisions.Joined(0, "h0"), decisions.Ready(0), decisions.Exited(1, 1, -9, "")):
        see(event)
    now = 10.25
    see(decisions.Exited(0, 1, -9, ""))
    assert (state.phase, state.generation) == (Phase.RUNNING, 2)
    parts = ledger.end(11.0)["parts"]
    assert (parts["reap_s"], parts["ready_s"]) == (0.25, 0.0)


def test_a_late_answer_to_the_last_root_is_nobodys(root):
    """Else the plan would be made without what a machine holds: an older snapshot, or none."""
    assert not root.copies.plan()
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
    root.state = replace(root.state, phase=Phase.ENDED, outcome=outcome)
    root.copies.ending, root._until_s = True, 120.0
    here, there = messages.pair(messages.TO_ROOT)
    root._hear(Link(here, 100.0), messages.Stop("Ctrl-C", 130, force=force), 101.0)
    root.tick(101.0)
    assert root.finished is force
    here.close()
    there.close()
