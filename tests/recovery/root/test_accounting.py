"""What a failure cost: its parts, whatever the order its moments become known in."""

import json
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gemini_gnn.recovery.root.accounting import PARTS, Observed, record, totals

KILLED = Observed("killed", "rank 2 was killed: signal 9", 1, 3, 1.7e9, step=50, failed_s=100.0, rank=2, machine="h1")
MOMENTS = ["seen_s", "decided_s", "reaped_s", "begun_s", "started_s", "joined_s", "restored_s", "stepped_s"]
TIMES = [100.01, 100.02, 100.05, 100.05, 100.08, 100.2, 100.29, 100.33]
RECOVERED = replace(KILLED, restored_step=45, **dict(zip(MOMENTS, TIMES, strict=True)))


def test_the_parts_of_a_recovery_by_hand():
    assert record(RECOVERED) == {
        "kind": "killed",
        "rank": 2,
        "machine": "h1",
        "step": 50,
        "steps_lost": 4,  # 46 to 49 are done again; 50 was not done
        "detect_s": 0.01,
        "recovery_s": 0.33,
        "parts": {
            "detect_s": 0.01,
            "decide_s": 0.01,
            "reap_s": 0.03,
            "ready_s": 0.0,
            "fork_s": 0.03,
            "rejoin_s": 0.12,
            "restore_s": 0.09,
            "first_step_s": 0.04,
        },
        "interrupted": False,
        "cause": "rank 2 was killed: signal 9",
        "term": 1,
        "generation": 3,
        "time": 1.7e9,
    }
    assert RECOVERED.is_over and record(RECOVERED, now=900.0) == record(RECOVERED)


moment = st.none() | st.floats(0, 1e5, allow_nan=False)


@given(st.fixed_dictionaries(dict.fromkeys(MOMENTS, moment)), moment, moment, st.floats(0, 1e5), moment)
def test_parts_are_never_negative_and_add_up_whatever_order_moments_have(moments, interrupted_s, now, failed_s, step):
    assume(interrupted_s is None or moments["stepped_s"] is None)
    restored = None if step is None else int(step)
    failure = replace(KILLED, **moments, interrupted_s=interrupted_s, failed_s=failed_s, restored_step=restored)
    kept = json.loads(json.dumps(record(failure, now)))
    parts = [Decimal(str(part)) for part in kept["parts"].values()]
    assert list(kept["parts"]) == [f"{name}_s" for name in PARTS] and min(parts) >= 0
    assert sum(parts) == Decimal(str(kept["recovery_s"])) and kept["steps_lost"] >= 0
    known = [at for at in moments.values() if at is not None]
    if interrupted_s is not None:
        until_s = interrupted_s
    elif moments["stepped_s"] is not None or now is None:
        until_s = max(known, default=failed_s)
    else:
        until_s = now
    assert kept["recovery_s"] == pytest.approx(max(0.0, until_s - failed_s), abs=1e-6)


@given(st.lists(st.floats(0, 1e5), min_size=9, max_size=9).map(sorted), st.sets(st.sampled_from(range(7))))
def test_each_moment_ends_its_part_and_one_that_nobody_saw_gives_its_time_to_the_next(times, unseen):
    failed_s, *later = times
    moments = {name: None if i in unseen else at for i, (name, at) in enumerate(zip(MOMENTS, later, strict=True))}
    parts = list(record(replace(KILLED, failed_s=failed_s, **moments))["parts"].values())
    before = failed_s
    for index, at in enumerate(moments.values()):
        assert parts[index] == pytest.approx(0.0 if at is None else at - before, abs=2e-6)
        before = before if at is None else at


def test_a_second_failure_ends_the_record_of_the_first_and_no_time_is_counted_twice():
    began = replace(RECOVERED, joined_s=None, restored_s=None, stepped_s=None, restored_step=None)
    first = record(replace(began, interrupted_s=100.5))
    assert first["interrupted"] and first["steps_lost"] == 0
    assert first["parts"] == record(RECOVERED)["parts"] | {"rejoin_s": 0.42, "restore_s": 0.0, "first_step_s": 0.0}
    second = record(replace(KILLED, generation=4, failed_s=100.5, seen_s=100.6, stepped_s=101.0, restored_step=45))
    assert first["recovery_s"] + second["recovery_s"] == pytest.approx(101.0 - 100.0)
    assert second["steps_lost"] == 4, "the steps of both are counted once"


def test_a_recovery_that_still_runs_counts_until_now():
    running = replace(KILLED, seen_s=100.5, decided_s=100.5)
    assert not running.is_over and record(running)["recovery_s"] == 0.5
    assert record(running, now=103.0)["parts"]["reap_s"] == 2.5 and record(running, now=103.0)["recovery_s"] == 3.0


def test_who_failed_is_said_only_where_it_is_one():
    assert "machine" not in record(replace(KILLED, machine="")) and "rank" not in record(replace(KILLED, rank=None))
    assert record(replace(KILLED, rank=0))["rank"] == 0


def test_totals_by_hand():
    one = record(RECOVERED)
    assert totals([one, one], began_s=10.0, now=20.0, step_s=0.1) == {
        "failure_count": 2,
        "recovery_total_s": 0.66,
        "lost_work_s": 0.8,
        "goodput": pytest.approx(1 - 1.46 / 10),
    }
    assert totals([], 10.0, 20.0, 0.1) == {"failure_count": 0, "recovery_total_s": 0, "lost_work_s": 0, "goodput": 1.0}
    assert totals([one], 10.0, 10.1, 0.1)["goodput"] == 0.0, "never below: lost work is an estimate"
    assert totals([], 10.0, 10.0, 0.1)["goodput"] is None
