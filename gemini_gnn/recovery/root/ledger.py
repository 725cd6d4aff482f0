"""What the failures of a job cost, kept while it runs. No I/O; ``accounting.py`` turns each failure into its parts.

The root tells the ledger what it decides and what the trainers' boards say. All times are on the root's monotonic clock.
When a failure happened is what is known of it: a hang began with its phase, a silence with the last word, a lost peer with
the first error that told of it; an exit is seen when it happens.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemini_gnn.recovery.board import Board, Milestone
from gemini_gnn.recovery.root.accounting import Observed, record, totals
from gemini_gnn.recovery.root.state import Cause

MOMENTS = {  # of the new trainers: the last one to reach it counts
    "started_s": Milestone.STARTED,
    "joined_s": Milestone.JOINED,
    "restored_s": Milestone.RESTORED,
    "stepped_s": Milestone.STEPPED,
}


class Ledger:
    """
    Attributes:
        failures: records of this run's failures that are over, those of earlier terms first.
        began_s: when the first step began; None before.
    """

    def __init__(self, term: int, failures: list[dict[str, Any]], began_s: float | None):
        self.term, self.failures, self.began_s = term, failures, began_s
        self._current: Observed | None = None
        self._step_s: deque[float] = deque(maxlen=1000)  # of each look
        self._looked: tuple[int, int, float] | None = None  # generation, step and time of the last look

    @property
    def current(self) -> Observed | None:
        """The failure that the job recovers from; None while it trains."""
        return self._current

    def root_died(
        self, machine: str, died_s: float, seen_s: float, step: int, generation: int, now: float, time: float
    ) -> None:
        """This root takes the place of one that died on ``machine``, or was lost with it."""
        words = f"the root agent on {machine} is gone"
        self._current = Observed("root agent", words, self.term, generation, time, step, died_s, seen_s, now)
        self._current = replace(self._current, machine=machine)

    def follow(self, failures: list[dict[str, Any]], status: Mapping[str, Any], now: float, time: float) -> None:
        """The run directory tells of the job before this root."""
        self.failures = failures + self.failures
        if self.began_s is None and status.get("began_s") is not None:
            # How long ago the first step began, as the last root said, and how long ago that was.
            self.began_s = now - status["began_s"] - (time - status["time"])
        if self._current is not None:
            self._current = replace(
                self._current, term=self.term, step=max(self._current.step, status.get("step") or 0)
            )

    def failed(
        self,
        cause: Cause,
        machine: str,
        generation: int,
        step: int,
        failed_s: float,
        seen_s: float,
        now: float,
        time: float,
    ) -> dict[str, Any] | None:
        """The root gives up a generation. Returns the record of the failure before, if this one interrupts its recovery."""
        interrupted, before = None, self._current
        if before is not None:
            interrupted = self._over(replace(before, interrupted_s=max(failed_s, before.failed_s)))
            step = before.step
        self._current = Observed(
            cause.kind,
            cause.text,
            self.term,
            generation,
            time,
            step,
            failed_s,
            seen_s,
            now,
            rank=cause.rank,
            machine=machine,
        )
        return interrupted

    def reaped(self, now: float) -> None:
        if self._current is not None and self._current.reaped_s is None:
            self._current = replace(self._current, reaped_s=now)

    def begun(self, now: float) -> None:
        self.reaped(now)  # where all machines are ready, nothing lies in between
        if self._current is not None:
            self._current = replace(self._current, begun_s=now)

    def look(self, boards: Mapping[int, Board], world: int, now: float) -> dict[str, Any] | None:
        """Read the boards of the newest generation. Returns the record of a failure that is now over."""
        if len(boards) < world:
            return None
        self._time_steps(boards, now)
        if self._current is None or self._current.begun_s is None:
            return None
        reached: dict[str, Any] = {}
        for name, milestone in MOMENTS.items():
            moments = [moment for board in boards.values() if (moment := board.milestones[milestone]) is not None]
            if len(moments) == world:
                reached[name] = max(moments)
        if "restored_s" in reached:
            reached["restored_step"] = min(board.restored_step for board in boards.values())
        self._current = replace(self._current, **reached)
        if self._current.kind == "root agent" and self._current.restored_step is not None:
            # Its last status may be a second old.
            self._current = replace(self._current, step=max(self._current.step, self._current.restored_step + 1))
        return self._over(self._current) if self._current.is_over else None

    def _time_steps(self, boards: Mapping[int, Board], now: float) -> None:
        step, generation = min(board.step for board in boards.values()), next(iter(boards.values())).generation
        if step > 0 and self.began_s is None:
            self.began_s = now
        if self._looked is not None and self._looked[0] == generation and step > self._looked[1] > 0:
            self._step_s.append((now - self._looked[2]) / (step - self._looked[1]))
        if self._looked is None or (generation, step) != self._looked[:2]:
            self._looked = (generation, step, now)

    def _over(self, failure: Observed) -> dict[str, Any]:
        self._current = None
        self.failures.append(record(failure))
        return self.failures[-1]

    def end(self, now: float) -> dict[str, Any] | None:
        """The job ends. Returns the record of a failure whose recovery was not over."""
        if self._current is None:
            return None
        kept, self._current = record(self._current, now), None
        self.failures.append(kept)
        return kept

    @property
    def step_s(self) -> float:
        """The median time of a step; 0 before one was seen."""
        return statistics.median(self._step_s) if self._step_s else 0.0

    def totals(self, now: float) -> dict[str, Any]:
        return totals(self.failures, now if self.began_s is None else self.began_s, now, self.step_s)
