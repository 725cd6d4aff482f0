"""The cost of failures: the formulas beside the simulation, beside others' formulas, and beside published figures."""

import random
from dataclasses import replace
from math import exp, sqrt
from statistics import fmean, stdev

import pytest

from gemini_gnn.snapshot.replicas.placement import placement, survival, survives
from gemini_gnn.snapshot.replicas.simulation import (
    Costs,
    Failures,
    best_interval_s,
    expected,
    in_memory,
    memory_lost,
    on_storage,
    rollback_s,
    simulate,
)

COSTS = Costs(
    state_bytes=1e9,
    step_s=1.0,
    slowdown=0.01,
    process_s=1.0,
    machine_s=2.5,
    replace_s=0.0,
    relaunch_s=15.0,
    memory_bytes_s=2e9,
    link_bytes_s=1e9,
    storage_bytes_s=2.5e9,
    persist_s=600.0,
)
OFTEN = Failures(per_machine_day=2.0, lost=0.5, together=0.1, source="")


def ring(machines, replicas):
    return tuple(tuple((machine + i) % machines for i in range(replicas)) for machine in range(machines))


def agrees(one, many, name):
    """The mean of simulations is the expectation, within 4 of its errors; the errors are small enough to tell."""
    values = [getattr(outcome, name) for outcome in many]
    error = stdev(values) / sqrt(len(values))
    assert error < 0.02 * fmean(values), "too few failures were drawn"
    assert abs(fmean(values) - getattr(one, name)) < 4 * error


# By formula


@pytest.mark.parametrize("pause_s", [1.0, 30.0, 1000.0, 30_000.0])
def test_no_other_interval_of_checkpoints_loses_less(pause_s):
    failures = replace(OFTEN, per_machine_day=1.0)
    best = replace(on_storage(COSTS, 24, failures), pause_s=pause_s, interval_s=best_interval_s(pause_s, 3600.0))
    goodput = expected(best, failures).goodput
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert expected(replace(best, interval_s=factor * best.interval_s), failures).goodput < goodput


def test_for_short_checkpoints_the_interval_is_that_of_young_and_daly():
    assert best_interval_s(1.0, 1e6) == pytest.approx(sqrt(2e6) - 1, rel=1e-3)
    assert best_interval_s(1e6, 1.0) == pytest.approx(1.0)  # Daly: not more than once between two failures


def test_storage_costs_what_daly_says():
    scheme = replace(on_storage(COSTS, 16, OFTEN), process_s=100.0, machine_s=100.0)
    mtbf, work, pause = 1 / OFTEN.rate(16), scheme.interval_s, scheme.pause_s
    assert expected(scheme, OFTEN).goodput == pytest.approx(
        work / (mtbf * exp(100.0 / mtbf) * (exp((work + pause) / mtbf) - 1))
    )


def test_where_nothing_fails_only_the_slowdown_is_left():
    found = expected(in_memory(COSTS, placement(16, 2)), replace(OFTEN, per_machine_day=1e-9))
    assert found.goodput == pytest.approx(1 / 1.01, abs=1e-6)


def test_geminis_wasted_time_by_hand():
    scheme, failures = in_memory(COSTS, placement(16, 3)), replace(OFTEN, lost=0.25)
    # a copy takes 2 s to its peers, so does the interval; half a second to read; one to fetch
    assert rollback_s(scheme, failures, 0.0) == pytest.approx(2 + 2 / 2 + 0.5 + 0.25 * 1)
    # a checkpoint takes 6.4 s to write and to read, one every 600 s
    assert rollback_s(scheme, failures, 0.25) == pytest.approx(0.75 * 3.5 + 0.25 * (6.4 + 600 / 2 + 6.4))
    storage = on_storage(COSTS, 16, failures)
    assert rollback_s(storage, failures, 0.0) == pytest.approx(6.4 + storage.interval_s / 2 + 6.4)


def test_storage_that_is_slower_than_failures_come_makes_no_progress():
    failures = replace(OFTEN, per_machine_day=100.0)
    for scheme in (on_storage(COSTS, 10_000, failures), in_memory(COSTS, placement(10_000, 1))):
        assert expected(scheme, failures).goodput == pytest.approx(0.0, abs=1e-9)
        assert simulate(scheme, failures, 500).goodput == 0.0


# How often memory does not survive

PAIRS = Failures(per_machine_day=0.01, lost=1.0, together=1.0, source="")


@pytest.mark.parametrize(("holders", "survived"), [(placement(16, 2), 0.933), (ring(16, 2), 0.867)])
def test_two_of_sixteen_machines_lost_at_once_as_gemini_has_published(holders, survived):
    scheme = replace(in_memory(COSTS, holders), again_s=0.0)
    assert 1 - memory_lost(scheme, PAIRS) == pytest.approx(survived, abs=5e-4)
    assert 1 - simulate(scheme, PAIRS, 20_000).memory_lost == pytest.approx(survived, abs=0.01)


@pytest.mark.parametrize(("holders", "survived"), [(placement(16, 2), 0.800), (ring(16, 2), 0.629)])
def test_three_of_sixteen_machines_lost_as_gemini_has_published(holders, survived):
    draw = random.Random(0)
    drawn = fmean(survives(holders, draw.sample(range(16), 3)) for _ in range(20_000))
    assert survival(holders, 3) == pytest.approx(survived, abs=5e-4)
    assert drawn == pytest.approx(survived, abs=0.01)


@pytest.mark.parametrize(
    ("holders", "away"),  # machines at a time, about
    [
        (placement(16, 1), 0.2),
        (placement(16, 2), 0.2),
        (placement(17, 2), 0.2),
        (ring(17, 3), 1),
        (placement(18, 3), 1),
    ],
)
def test_losses_while_copies_are_missing(holders, away):
    failures = Failures(per_machine_day=1.0, lost=0.5, together=0.1, source="")
    scheme = replace(in_memory(COSTS, holders), again_s=away / (failures.rate(len(holders)) * failures.lost))
    runs = [simulate(scheme, failures, 20_000, seed) for seed in range(5)]
    assert fmean(run.memory_lost for run in runs) == pytest.approx(memory_lost(scheme, failures), rel=0.1)


def test_without_replicas_each_lost_machine_is_one_too_many():
    scheme = in_memory(COSTS, placement(1000, 1))
    assert memory_lost(scheme, OFTEN) == pytest.approx(OFTEN.lost)
    assert memory_lost(in_memory(COSTS, placement(1, 1)), OFTEN) == pytest.approx(OFTEN.lost)


# The simulation beside the formula


ALL_LOST = replace(OFTEN, lost=1.0)


@pytest.mark.parametrize(
    ("scheme", "failures"),
    [
        (on_storage(COSTS, 16, OFTEN), OFTEN),
        (on_storage(COSTS, 300, OFTEN), OFTEN),
        (in_memory(COSTS, placement(16, 1)), OFTEN),
        (in_memory(COSTS, placement(16, 1)), ALL_LOST),
        (in_memory(COSTS, placement(16, 2)), OFTEN),
        (in_memory(COSTS, ring(60, 2)), OFTEN),
        (in_memory(COSTS, placement(100, 3)), OFTEN),
        (in_memory(replace(COSTS, replace_s=60.0), placement(50, 2)), OFTEN),
    ],
)
def test_the_simulation_agrees_with_the_formula(scheme, failures):
    runs = [simulate(scheme, failures, 4_000, seed) for seed in range(12)]
    agrees(expected(scheme, failures), runs, "wasted_s")


def test_a_simulation_is_a_function_of_its_seed():
    scheme = in_memory(COSTS, placement(16, 2))
    assert simulate(scheme, OFTEN, 500, 1) == simulate(scheme, OFTEN, 500, 1) != simulate(scheme, OFTEN, 500, 2)
