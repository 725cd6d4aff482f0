"""The cost of failures in a job of many machines: by formula, and event by event with a seed. Pure.

Failures come at random (a Poisson process). In some only a process dies: every machine keeps its memory. In the others a
machine is lost, or two at once, and the memory of both with it. Until `again_s` later a lost machine holds no copies: a
further loss meets fewer. Memory survives while each shard has a copy (placement.py). Else the job goes back to storage.

A job works, and every `interval_s` of work begins a snapshot that can be restored `ready_s` later. A failure throws it back
to the newest such snapshot; after the time of a recovery it works again. A failure during a recovery begins another one;
but what has come from storage into a memory that survives need not come again.

- GEMINI (SOSP'23) calls `ready_s + interval_s / 2 + retrieve_s` the wasted time of a failure: here `rollback_s`.
- `wasted_s` is all that is no progress, by failure: also detection, restart, and pauses for snapshots.

The baseline writes checkpoints to storage, and training waits for each. Its interval is the best there is for exponential
failures: with c seconds per checkpoint and M between failures, x = interval / M solves (1 - x) e^x = e^(-c/M). Young's
sqrt(2 c M) (1974) and Daly's formula (2006) approximate it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil, comb, exp, expm1, floor

from scipy.special import lambertw

from gemini_gnn.snapshot.replicas.placement import Placement, survival, survives

DAY_S = 86_400.0
UNLIKELY = 1e-15  # so many lost machines at a time are left out
MOST = 700.0  # an exponent that a float still holds


@dataclass(frozen=True)
class Failures:
    """How machines fail.

    Attributes:
        per_machine_day: failures of one machine in a day.
        lost: the share of failures in which a machine is lost, and not only a process.
        together: the share of these in which a second machine is lost at the same moment.
        source: of the first two.
    """

    per_machine_day: float
    lost: float
    together: float
    source: str

    def rate(self, machines: int) -> float:
        """Failures of ``machines`` machines per second."""
        return machines * self.per_machine_day / DAY_S


@dataclass(frozen=True)
class Costs:
    """Bytes and seconds of a job, whatever the number of its machines.

    Attributes:
        state_bytes: masters and moments, per machine.
        step_s: a training step.
        slowdown: the share of throughput that snapshots in memory cost.
        process_s: from the death of a process to the first new step, without reading the state.
        machine_s: the same for a lost machine.
        replace_s: until another machine is there; 0: a standby waits.
        relaunch_s: as `process_s`, of a job without agents whose command is typed again.
        memory_bytes_s: to read the state from the own memory.
        link_bytes_s: from another machine.
        storage_bytes_s: storage gives and takes so much, all machines together.
        persist_s: from one checkpoint of snapshots to the next.
    """

    state_bytes: float
    step_s: float
    slowdown: float
    process_s: float
    machine_s: float
    replace_s: float
    relaunch_s: float
    memory_bytes_s: float
    link_bytes_s: float
    storage_bytes_s: float
    persist_s: float


@dataclass(frozen=True)
class Scheme:
    """How a job of ``machines`` machines goes on after failures. ``holders``: (): it has checkpoints in storage only."""

    machines: int
    holders: Placement
    interval_s: float
    pause_s: float  # that a snapshot takes from training
    ready_s: float
    process_s: float  # from a failure to the first new step, with reading the state
    machine_s: float
    retrieve_s: tuple[float, float, float]  # of these, where a process died, a machine is lost, memory did not survive
    again_s: float = 0.0
    storage_every_s: float = 0.0  # if memory does not survive: the checkpoints,
    storage_ready_s: float = 0.0  # the time to write one,
    storage_s: float = 0.0  # and from the failure to the first new step

    @property
    def share(self) -> float:
        """Of the time between failures that is work."""
        return self.interval_s / (self.interval_s + self.pause_s)


@dataclass(frozen=True)
class Outcome:
    """``memory_lost``: the share of failures that memory did not survive."""

    goodput: float
    wasted_s: float
    memory_lost: float


def in_memory(costs: Costs, holders: Placement) -> Scheme:
    """Snapshots in the memory of the machines ``holders``, now and then in storage too."""
    machines, replicas = len(holders), len(holders[0])
    read_s, fetch_s = costs.state_bytes / costs.memory_bytes_s, costs.state_bytes / costs.link_bytes_s
    copy_s = (replicas - 1) * fetch_s
    interval_s = costs.step_s * max(1, ceil(copy_s / costs.step_s))  # copies of one at a time
    write_s = machines * costs.state_bytes / costs.storage_bytes_s
    lost_s = costs.machine_s + costs.replace_s
    return Scheme(
        machines=machines,
        holders=holders,
        interval_s=interval_s,
        pause_s=interval_s * costs.slowdown,
        ready_s=copy_s or read_s,
        process_s=costs.process_s + read_s,
        machine_s=lost_s + fetch_s + read_s,
        retrieve_s=(read_s, fetch_s + read_s, write_s),
        again_s=lost_s + fetch_s + copy_s,
        storage_every_s=max(costs.persist_s, write_s),
        storage_ready_s=write_s,
        storage_s=lost_s + write_s,
    )


def on_storage(costs: Costs, machines: int, failures: Failures) -> Scheme:
    """The baseline: checkpoints as often as is best; after each failure all machines read the newest one."""
    write_s = machines * costs.state_bytes / costs.storage_bytes_s
    again_s = costs.relaunch_s + write_s
    seen_s = costs.machine_s - costs.process_s
    return Scheme(
        machines=machines,
        holders=(),
        interval_s=best_interval_s(write_s, 1 / failures.rate(machines)),
        pause_s=write_s,
        ready_s=write_s,
        process_s=again_s,
        machine_s=again_s + seen_s + costs.replace_s,
        retrieve_s=(write_s, write_s, write_s),
    )


def best_interval_s(pause_s: float, mtbf_s: float) -> float:
    """The work between two checkpoints that loses least time, for exponential failures."""
    return mtbf_s * (1 + float(lambertw(-exp(-1 - pause_s / mtbf_s)).real))


# --- by formula -------------------------------------------------------------------------------------------------------


def memory_lost(scheme: Scheme, failures: Failures) -> float:
    """The probability that memory does not survive a failure.

    Before a machine is lost, j others are away, and memory has survived that. Then one or two are lost, of which i were
    there: it may not survive j + i. That all copies are there again after a return to storage is left out: it is rare.
    """
    if not scheme.holders:
        return 0.0
    machines = scheme.machines
    survived = cache(lambda lost: survival(scheme.holders, lost))
    second = failures.together if machines > 1 else 0.0
    losses_s = failures.per_machine_day / DAY_S * failures.lost * (1 + second)  # per machine and second
    before = after = 0.0
    for j, chance in _away(machines, -expm1(-losses_s * scheme.again_s)):
        if not survived(j):
            break
        before += chance * survived(j)
        for many, share in ((1, 1 - second), *([(2, second)] if second else [])):
            for i in range(min(many, machines - j) + 1):
                ways = comb(machines - j, i) * comb(j, many - i) / comb(machines, many)
                after += chance * share * ways * survived(j + i)
    return failures.lost * (before - after) / before


def _away(machines: int, each: float) -> Iterator[tuple[int, float]]:
    """How likely j of ``machines`` are away (binomial), until it is too unlikely to count."""
    chance = (1 - each) ** machines
    for j in range(machines + 1):
        yield j, chance
        chance *= (machines - j) / (j + 1) * each / (1 - each)
        if j > each * machines and chance < UNLIKELY:
            return


def rollback_s(scheme: Scheme, failures: Failures, fatal: float) -> float:
    """GEMINI's wasted time per failure, on average: since the snapshot that is restored, and until it is read.

    Args:
        fatal: the result of :func:`memory_lost`.
    """
    read, fetched, stored = scheme.retrieve_s
    snapshot = scheme.ready_s + scheme.interval_s / 2
    storage = scheme.storage_ready_s + scheme.storage_every_s / 2 + stored
    return (1 - failures.lost) * (snapshot + read) + (failures.lost - fatal) * (snapshot + fetched) + fatal * storage


def expected(scheme: Scheme, failures: Failures) -> Outcome:
    rate, fatal = failures.rate(scheme.machines), memory_lost(scheme, failures)
    others = rate * (1 - fatal)
    ready_s = scheme.ready_s if scheme.holders else 0.0  # training waits for a checkpoint: the pause is its time
    goodput = scheme.share
    if others > 0:
        goodput *= _progress(others, scheme.interval_s + scheme.pause_s, ready_s)
        goodput *= _not_recovering(scheme, failures, fatal, others)
    if fatal > 0 and goodput > 0:
        since_s = scheme.storage_ready_s / goodput + scheme.storage_s
        goodput *= _progress(rate * fatal, scheme.storage_every_s / goodput, since_s)
    return Outcome(goodput, (1 - goodput) / rate, fatal)


def _progress(rate: float, every_s: float, ready_s: float) -> float:
    """The share of work that is kept, if failures throw it back to the last multiple of ``every_s``, ``ready_s`` ago.

    The expectation of every_s * floor((X - ready_s) / every_s), for X exponential, times the rate.
    """
    return rate * every_s * exp(-rate * (ready_s + every_s)) / -expm1(-rate * every_s)


def _not_recovering(scheme: Scheme, failures: Failures, fatal: float, rate: float) -> float:
    """The share of time without recoveries. A failure during one makes it begin again, as that of a machine if it is one."""
    lost = (failures.lost - fatal) / (1 - fatal)
    machine_s = expm1(min(rate * scheme.machine_s, MOST)) / rate
    again = -expm1(-rate * scheme.process_s)
    process_s = again * (1 / rate + lost * machine_s) / (1 - again * (1 - lost))
    return 1 / (1 + rate * ((1 - lost) * process_s + lost * machine_s))


# --- event by event ---------------------------------------------------------------------------------------------------


def simulate(scheme: Scheme, failures: Failures, many: int, seed: int = 0) -> Outcome:
    """The same, over ``many`` failures that are drawn."""
    draw, rate, machines = random.Random(seed), failures.rate(scheme.machines), scheme.machines
    period_s, ready_s = scheme.interval_s + scheme.pause_s, scheme.ready_s if scheme.holders else 0.0
    clock = work = stored = 0.0
    begun = read = recovery_s = 0.0  # begun: when it began to work again; read: until when it reads from storage
    away: dict[int, float] = {}  # lost machine -> until when it holds no copies
    losses = 0
    for _ in range(many):
        clock += draw.expovariate(rate)
        ran = clock - begun
        if ran > 0:
            if scheme.holders:
                written = work + ran * scheme.share - scheme.storage_ready_s
                stored = max(stored, scheme.storage_every_s * floor(written / scheme.storage_every_s))
            work += scheme.interval_s * max(0, floor((ran - ready_s) / period_s))
            recovery_s = 0.0
        recovery_s = max(recovery_s, scheme.process_s)
        if draw.random() < failures.lost:
            recovery_s = max(recovery_s, scheme.machine_s)
            away = {machine: until for machine, until in away.items() if until > clock}
            also = machines > 1 and draw.random() < failures.together
            away |= dict.fromkeys(draw.sample(range(machines), 1 + also), clock + scheme.again_s)
            if scheme.holders and not survives(scheme.holders, away):
                work, read, away = min(work, stored), clock + scheme.storage_s, {}
                losses += 1
        begun = max(read, clock + recovery_s)
    goodput = work / clock
    return Outcome(goodput, (1 - goodput) * clock / many, losses / many)
