"""What a failure cost, in parts that add up. Pure: from what the root observed of one failure to a record of it.

    failed   seen   decided   reaped   begun   started   joined   restored   stepped
       | detect | decide | reap  | ready  | fork    | rejoin | restore | first_step |

Each moment is that of the last trainer or machine: a part ends when all are through with it. Moments come from several
machines, late and in any order, but parts are never negative: a moment before one that precedes it counts as equal to it. Of
a moment that nobody observed, the time goes to the part after it. Parts are whole microseconds, so that they add up exactly.

A failure during a recovery ends the one before: the parts of that one end there, and its lost steps are counted with the new
one, which does them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PARTS = ("detect", "decide", "reap", "ready", "fork", "rejoin", "restore", "first_step")


@dataclass(frozen=True)
class Observed:
    """One failure, as far as it is known. All ``_s`` are on the root's monotonic clock; None: not yet.

    Attributes:
        kind: "killed", "out of memory", "hang", "network", "agent", "machine silent", "root agent", ...
        cause: in words.
        term, generation: of the trainers that it struck.
        time: on the wall clock, for people.
        step: the step the job was in; for a failure during a recovery, that of the failure before.
        failed_s: it happened. seen_s: the root heard of it. decided_s: the root gave up the generation.
        reaped_s: all its trainers are. begun_s: the next generation begins, all machines and warm parents being ready.
        started_s: its trainers are forked. joined_s: they have met. restored_s: engines are built and restored.
        stepped_s: a step is done.
        interrupted_s: another failure happened before that; never together with stepped_s.
        rank, machine: that failed; None and "": no single one.
        restored_step: steps done that the next generation began with.
    """

    kind: str
    cause: str
    term: int
    generation: int
    time: float
    step: int
    failed_s: float
    seen_s: float | None = None
    decided_s: float | None = None
    reaped_s: float | None = None
    begun_s: float | None = None
    started_s: float | None = None
    joined_s: float | None = None
    restored_s: float | None = None
    stepped_s: float | None = None
    interrupted_s: float | None = None
    rank: int | None = None
    machine: str = ""
    restored_step: int | None = None

    @property
    def is_over(self) -> bool:
        return self.stepped_s is not None or self.interrupted_s is not None


def record(failure: Observed, now: float | None = None) -> dict[str, Any]:
    """What is kept of ``failure``, as JSON.

    Args:
        now: of a recovery that still runs, count the time until now.
    """
    until_s = failure.interrupted_s if failure.is_over else now
    moments_us = _moments_us(failure, until_s)
    parts_us = [end - begin for begin, end in zip([0, *moments_us], moments_us, strict=False)]
    parts = {f"{name}_s": part / 1e6 for name, part in zip(PARTS, parts_us, strict=True)}
    again = failure.interrupted_s is None and failure.restored_step is not None
    return {
        "kind": failure.kind,
        **({} if failure.rank is None else {"rank": failure.rank}),
        **({"machine": failure.machine} if failure.machine else {}),
        "step": failure.step,
        "steps_lost": max(0, failure.step - 1 - (failure.restored_step or 0)) if again else 0,
        "detect_s": parts["detect_s"],
        "recovery_s": moments_us[-1] / 1e6,
        "parts": parts,
        "interrupted": failure.interrupted_s is not None,
        "cause": failure.cause,
        "term": failure.term,
        "generation": failure.generation,
        "time": failure.time,
    }


def _moments_us(failure: Observed, until_s: float | None) -> list[int]:
    """Microseconds from the failure to the end of each part, none before the one it follows and none after ``until_s``."""
    observed = [failure.seen_s, failure.decided_s, failure.reaped_s, failure.begun_s, failure.started_s]
    observed += [failure.joined_s, failure.restored_s, failure.stepped_s]
    last = max((index for index, moment_s in enumerate(observed) if moment_s is not None), default=-1)
    moments_us, reached_us = [], 0
    for index, moment_s in enumerate(observed):
        if until_s is not None:
            moment_s = min(moment_s, until_s) if moment_s is not None else until_s if index > last else None
        if moment_s is not None:
            reached_us = max(reached_us, round((moment_s - failure.failed_s) * 1e6))
        moments_us.append(reached_us)
    return moments_us


def totals(failures: Iterable[Mapping[str, Any]], began_s: float, now: float, step_s: float) -> dict[str, Any]:
    """What all ``failures`` (records) of a run cost together.

    Args:
        began_s: when its first step began, on the clock of ``now``.
        step_s: the median time of a step; lost work is the steps that were done again, at that rate.

    Returns:
        ``goodput`` is the share of the time since ``began_s`` in which the run neither recovered nor did steps again, right
        to about a step for each failure. None if no time has passed.
    """
    failures = list(failures)
    recovery_s = sum(failure["recovery_s"] for failure in failures)
    lost_work_s = sum(failure["steps_lost"] for failure in failures) * step_s
    passed_s = now - began_s
    return {
        "failure_count": len(failures),
        "recovery_total_s": round(recovery_s, 6),
        "lost_work_s": round(lost_work_s, 6),
        "goodput": max(0.0, 1.0 - (recovery_s + lost_work_s) / passed_s) if passed_s > 0 else None,
    }
