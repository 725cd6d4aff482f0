"""What failures cost, from what the root decides and the boards say: on a clock of the test's own."""

from __future__ import annotations

import pytest

from gemini_gnn.recovery.board import Board, Milestone, Phase
from gemini_gnn.recovery.root.ledger import Ledger
from gemini_gnn.recovery.root.state import Cause

KILLED = Cause("killed", "the trainer of rank 1 was killed by SIGKILL", rank=1)


def board(step: int, generation: int, *milestones: float, restored: int = 0) -> Board:
    reached = (*milestones, *(None,) * (len(Milestone) - len(milestones)))
    return Board(1, generation, step, 0, Phase.FORWARD, 0.0, 9, 0.1, milestones=reached, restored_step=restored)


def fail(ledger: Ledger, at: float, step: int, generation: int = 1):
    return ledger.failed(KILLED, "", generation, step, at, at + 0.01, at + 0.02, 0.0)


def test_the_parts_of_a_recovery_end_with_the_last_rank():
    ledger = Ledger(3, [], None)
    assert fail(ledger, 10.0, step=8) is None and ledger.current is not None
    ledger.reaped(10.05)
    ledger.begun(10.1)
    assert ledger.look({0: board(0, 2, 10.2, 10.3)}, 2, 10.4) is None, "rank 1 has not been heard of"
    slow = board(7, 2, 10.25, 10.4, 10.5, 10.6, restored=6)
    assert ledger.look({0: board(8, 2, 10.2, 10.3, 10.4, 10.5, 10.7, restored=6), 1: slow}, 2, 10.8) is None
    late = board(8, 2, 10.25, 10.4, 10.5, 10.6, 10.9, restored=6)
    kept = ledger.look({0: board(8, 2, 10.2, 10.3, 10.4, 10.5, 10.7, restored=6), 1: late}, 2, 11.0)
    assert kept is not None and ledger.failures == [kept] and ledger.current is None
    parts = {"detect": 0.01, "decide": 0.01, "reap": 0.03, "ready": 0.05, "fork": 0.15, "rejoin": 0.15}
    parts |= {"restore": 0.2, "first_step": 0.3}
    assert kept["parts"] == pytest.approx({f"{name}_s": seconds for name, seconds in parts.items()})
    assert kept["recovery_s"] == pytest.approx(0.9) and (kept["step"], kept["steps_lost"]) == (8, 1)
    assert (kept["term"], kept["generation"], kept["rank"]) == (3, 1, 1)


def test_a_failure_in_a_recovery_ends_the_record_before_it():
    ledger = Ledger(1, [], None)
    fail(ledger, 10.0, step=8)
    kept = fail(ledger, 10.5, step=0, generation=2)
    assert kept["interrupted"] and kept["recovery_s"] == pytest.approx(0.5) and kept["steps_lost"] == 0
    assert ledger.current.step == 8, "the steps that were lost are still to be done again"
    kept = ledger.end(11.0)
    assert kept["recovery_s"] == pytest.approx(0.5) and len(ledger.failures) == 2 and ledger.end(12.0) is None


def test_a_new_root_takes_up_the_failure_of_the_old_one():
    ledger = Ledger(2, [{"recovery_s": 1.0, "steps_lost": 0}], 0.0)
    ledger.root_died("h0", 9.0, 9.2, step=5, generation=1, now=9.5, time=0.0)
    ledger.reaped(9.6)
    ledger.begun(9.6)
    kept = ledger.look({0: board(8, 2, 9.7, 9.7, 9.7, 9.8, 10.0, restored=6)}, 1, 10.1)
    assert (kept["kind"], kept["machine"], kept["step"]) == ("root agent", "h0", 7), "its last status was of step 5"
    assert kept["recovery_s"] == pytest.approx(1.0)
    assert ledger.totals(20.0)["recovery_total_s"] == pytest.approx(2.0)
    assert ledger.totals(20.0)["goodput"] == pytest.approx(0.9)


def test_the_time_of_a_step_is_seen_on_the_boards():
    ledger = Ledger(1, [], None)
    assert ledger.step_s == 0.0 and ledger.totals(1.0)["goodput"] is None
    for at, step in ((1.0, 0), (2.0, 1), (2.5, 1), (3.0, 6), (4.0, 16)):
        ledger.look({0: board(step, 1)}, 1, at)
    assert ledger.began_s == 2.0
    assert ledger.step_s == pytest.approx((0.2 + 0.1) / 2), "5 steps in the second after step 1 began, then 10 in one"
