"""Campaigns on hosts: one job, many failures of all kinds, and the run that was never disturbed, bit for bit.

    bash launch/test.sh --long -k hosts_campaign                      # a new seed, which is printed
    bash launch/test.sh --long -k hosts_campaign --seed 7 --kills 100

A seed decides what fails, where, and how long after the last failure. A third comes without waiting for a new step: those
hit recoveries.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import pytest

from tests.cluster.test_hosts_lost import SMALL, Run
from tests.cluster.test_hosts_train import terminal
from tests.trainers import trained

HOSTS = ["h0", "h1", "h2", "h3", "h4"]
STANDBYS = 2
SEATS = len(HOSTS) - STANDBYS
VICTIMS = {"trainer": "gnn-rank", "agent": "gnn-agent", "warm parent": "gnn-warm", "replicator": "gnn-replicator"}
KINDS = [*VICTIMS, "everything here", "stopped trainer", "cut", "split", "power"]
WEIGHTS = [4, 4, 1, 1, 1, 1, 4, 2, 1]
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Failure:
    """``waits``: until the job goes on. ``delay_s``: then. ``hosts``: that fail. ``for_s``: how long, of a cut or a split."""

    kind: str
    hosts: tuple[str, ...]
    waits: bool
    delay_s: float
    for_s: float


def plan(seed: int, count: int, hosts: list[str], standbys: int) -> list[Failure]:
    """As many machines lose their power for good as there are standbys."""
    draw, alive, found = random.Random(seed), list(hosts), []
    for _ in range(count):
        kind = draw.choices(KINDS, WEIGHTS)[0]
        if kind == "power" and len(hosts) - len(alive) == standbys:
            kind = "cut"
        some = draw.sample(alive, draw.randint(1, len(alive) - 1) if kind == "split" else 1)
        if kind == "power":
            alive.remove(some[0])
        found.append(Failure(kind, tuple(some), draw.random() < 0.67, draw.uniform(0, 1), draw.uniform(0.2, 5.0)))
    return found


def test_a_seed_is_a_plan():
    one = plan(7, 100, HOSTS, STANDBYS)
    assert one == plan(7, 100, HOSTS, STANDBYS) != plan(8, 100, HOSTS, STANDBYS)
    assert {failure.kind for failure in one} == set(KINDS)
    assert sum(failure.kind == "power" for failure in one) == STANDBYS


def strike(run: Run, failure: Failure) -> None:
    lab, hosts = run.lab, failure.hosts
    match failure.kind:
        case "power":
            lab.power_off(hosts[0])
        case "cut":
            lab.link(hosts[0], False)
            time.sleep(failure.for_s)  # not waiting for an event: so long it is cut
            lab.link(hosts[0], True)
        case "split":
            lab.split(hosts)
            time.sleep(failure.for_s)
            lab.heal()
        case "stopped trainer":
            lab.run(hosts[0], ["pkill", "-STOP", VICTIMS["trainer"]])
        case "everything here":  # but for the slot processes
            lab.run(hosts[0], ["pkill", "-KILL", "gnn-"])
        case kind:
            lab.run(hosts[0], ["pkill", "-KILL", VICTIMS[kind]])


@pytest.mark.long
@pytest.mark.lab
@pytest.mark.timeout(7200)
def test_a_hundred_failures_of_one_job(lab, tmp_path, request, seed):
    count = request.config.getoption("kills")
    settings = [*SMALL, f"dataset.cache={tmp_path / 'cache'}", f"training.epochs={30 * count}"]
    settings += ["snapshot.persist_every=50 steps", "evaluation.every=100"]
    trained(SEATS, tmp_path / "calm", *settings, timeout_s=3000)
    limits = ["recovery.same_step_failures=10000", "recovery.hang_factor=5", "recovery.hang_floor_s=3"]
    run, begin = Run(lab, [*settings, *limits], tmp_path / "run", HOSTS, STANDBYS), time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.0f} s] seed {seed}: {text}", flush=True)

    run.until(lambda: run.status.get("checkpoint"))
    for number, failure in enumerate(plan(seed, count, HOSTS, STANDBYS), 1):
        if failure.waits:
            step = len(run.steps)
            run.until(lambda step=step: len(run.steps) > step, PATIENCE_S)
        time.sleep(failure.delay_s)  # not waiting for an event: the instant is the test
        assert run.lives(), f"seed {seed}\n{terminal(run.run_dir)[-8000:]}"
        say(f"failure {number} of {count}, step {len(run.steps)}: {failure.kind} {' '.join(failure.hosts)}")
        strike(run, failure)
    step = len(run.steps)
    run.until(lambda: len(run.steps) > step + 3, PATIENCE_S)
    run.ends(1800)
    run.is_as(tmp_path / "calm")
    say(f"the same losses, metrics and weights, bit for bit, after {count} failures in {len(run.steps)} steps")
