"""What the root says of the job, in each phase."""

import selectors
from dataclasses import replace

import pytest

from gemini_gnn.config import RecoveryConfig
from gemini_gnn.recovery.outcome import Outcome
from gemini_gnn.recovery.root import decisions
from gemini_gnn.recovery.root.decisions import Phase
from gemini_gnn.recovery.root.ledger import Ledger
from gemini_gnn.recovery.root.service import Root
from gemini_gnn.recovery.worker.journal import Journal


@pytest.fixture
def root(tmp_path):
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
        selector=selector,
        now=100.0,
    )
    selector.close()
    assert journal.close(5.0)


@pytest.mark.parametrize(
    ("phase", "word"),
    [(phase, {"forming": "starting", "ending": "stopping", "ended": "stopping"}.get(phase, phase)) for phase in Phase],
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


def test_machines_and_ranks_that_never_came_are_shown(root):
    status = root.status(101.0)
    assert [(one["machine"], one["ranks"], one["here"], one["here_s"]) for one in status["machines"]] == [
        (None, [0, 1], False, None),
        (None, [2, 3], False, None),
    ]
    assert status["ranks"][3] == {"rank": 3, "machine": "machine 2", "alive": False}
