"""How far apart captures are: the interval, and when it is said."""

import pytest

from gemini_gnn.snapshot.capture.pace import ENOUGH, Pace, interval_s, is_news
from gemini_gnn.snapshot.store.identity import Identity


def test_the_interval_loses_the_least_time():
    """Beside the sum it is the minimum of, at a hundred other intervals."""
    assert interval_s(0.4e-3, 86400) == pytest.approx(8.31, abs=0.01)
    for cost_s, mtbf_s in [(0.4e-3, 86400), (0.09, 3600), (2.0, 600)]:
        best = interval_s(cost_s, mtbf_s)
        lost = [cost_s / t + t / (2 * mtbf_s) for t in (best, *(best * (0.5 + i / 100) for i in range(100)))]
        assert min(lost) == pytest.approx(lost[0])
    assert interval_s(0.4e-3, 86400, round_s=30) == 30, "one snapshot per round of copies"


def test_only_what_has_changed_much_is_news():
    assert is_news(1, 0) and is_news(1.6, 1) and is_news(1, 1.6)
    assert not is_news(1.5, 1) and not is_news(1, 1.5) and not is_news(0, 0)


class Run:
    """Twenty captures at a time, at steps that take a second each; ``go`` returns everything that was said."""

    def __init__(self, every, mtbf_s=86400.0):
        self.pace, self.step, self.stall_s = Pace(every, mtbf_s), 0, 0.0

    def go(self, apart, stall_s=0.0, captures=20):
        said = []
        for _ in range(captures):
            said.append(self.pace.begun(Identity(1, 1, self.step), float(self.step), self.stall_s))
            self.step, self.stall_s = self.step + apart, self.stall_s + stall_s
        return [words for words in said if words]


def test_auto_measures_first_then_says_its_interval_and_why_once():
    run = Run("auto", mtbf_s=7200.0)
    assert run.pace.due(0.0) and run.go(1, 0.01, captures=ENOUGH - 1) == []
    assert run.pace.due(run.step), "still measuring: each step"
    why = "one costs 10.00 ms, a failure is expected every 7200 s"
    assert run.go(12, 0.01) == [f"snapshots: one every 12.00 s: {why}"]
    assert run.pace.interval_s == pytest.approx(12)
    last = run.step - 12
    assert not run.pace.due(last + 11.9) and run.pace.due(last + 12.1)
    assert run.go(12, 0.02) == [], "1.4 times as much is no news"
    assert len(run.go(12, 0.04)) == 1


def test_one_slow_capture_does_not_count():
    pace = Pace("auto", 7200.0)
    stalls = [0.0, 5.0, 5.01, 5.02, 5.03, 5.04]  # the first one has paid for page faults
    for number, stall in enumerate(stalls):
        pace.begun(Identity(1, 1, number), number, stall)
    assert pace.interval_s == pytest.approx(12)


def test_a_stretched_interval_is_said_when_it_begins_and_when_it_ends():
    run = Run(every=1)
    assert run.go(1) == []
    run.pace.recoverable(Identity(1, 1, 0), 0.5)
    begun = run.go(4)
    assert begun == [
        "snapshots: one every 1.8 steps; it is on its peers after 0.50 s",
        "snapshots: one every 2.9 steps; it is on its peers after 0.50 s",
    ]
    assert run.go(4) == [] and run.pace.due(run.step)
    assert len(run.go(1)) == 2 and run.go(1) == [] and run.pace.interval_s == 0


def test_a_round_is_timed_from_its_capture_to_its_copies_one_at_a_time():
    pace = Pace("auto", 1e-9)
    pace.begun(Identity(1, 1, 0), 10.0, 0.0)
    pace.begun(Identity(1, 1, 1), 11.0, 0.0)
    pace.recoverable(None, 12.0)
    pace.recoverable(Identity(1, 1, 0), 13.0)
    pace.recoverable(Identity(1, 1, 1), 19.0)  # was not timed
    for number in range(2, 5):
        pace.begun(Identity(1, 1, number), 20.0, 0.0)
    assert pace.interval_s == 3
