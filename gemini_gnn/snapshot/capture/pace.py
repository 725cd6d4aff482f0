"""How far apart captures are, and when that is news for people. Time is an argument; no I/O."""

from __future__ import annotations

import math
import statistics
from collections import deque
from itertools import pairwise

from gemini_gnn.snapshot.store.identity import Identity

SAMPLES = 9  # captures that are looked at
ENOUGH = 4  # of them: with fewer, "auto" captures each step in order to measure, and nothing is said
NEWS = 1.5  # a figure that has changed by this factor is said again


def interval_s(cost_s: float, mtbf_s: float, round_s: float = 0.0) -> float:
    """The seconds between snapshots that lose the least time (Young 1974; Daly 2006, first order).

    One snapshot every t seconds costs training the share ``cost_s / t`` of its time, and each failure throws away t / 2 on
    average: the share ``t / (2 mtbf_s)``. The sum is least where t is sqrt(2 cost_s mtbf_s). One of 0.4 ms and a failure a
    day: 8.3 s.

    Args:
        cost_s: what a snapshot holds training up. mtbf_s: from one failure of the job to the next, on average.
        round_s: from a capture to its copies on the peers. They cost training nothing, but more than one snapshot per
            round cannot be copied.
    """
    return max(round_s, math.sqrt(2 * cost_s * mtbf_s))


def is_news(value: float, said: float) -> bool:
    """Whether ``value`` is far from the one that was ``said`` last."""
    return max(value, said) > NEWS * min(value, said)


class Pace:
    """The distance of one rank's captures: decided if ``every`` is "auto", watched in any case.

    Attributes:
        interval_s: from one capture to the next at least; 0: nothing to wait for.
    """

    def __init__(self, every: int | str, mtbf_s: float):
        self._every, self._mtbf_s = every, mtbf_s
        self.interval_s = self._round_s = 0.0
        self._begun: deque[tuple[int, float, float]] = deque(maxlen=SAMPLES)  # step, when, stall until then
        self._travelling: tuple[Identity, float] | None = None  # a snapshot whose copies are awaited, and since when
        self._said = 0.0 if every == "auto" else float(every)

    def due(self, now: float) -> bool:
        """Whether the interval is over."""
        return not self._begun or now - self._begun[-1][1] >= self.interval_s

    def recoverable(self, identity: Identity | None, now: float) -> None:
        """Copies of ``identity``, and of all before it, are on their peers."""
        if self._travelling is not None and identity is not None and identity >= self._travelling[0]:
            self._round_s, self._travelling = now - self._travelling[1], None

    def begun(self, identity: Identity, now: float, stall_s: float) -> str:
        """A capture begins, and until now all have cost ``stall_s``; returns the news, or ""."""
        self._begun.append((identity.step, now, stall_s))
        if self._travelling is None:
            self._travelling = identity, now
        if len(self._begun) < ENOUGH:
            return ""
        if self._every == "auto":
            cost_s = statistics.median(b - a for (_, _, a), (_, _, b) in pairwise(self._begun))
            value = self.interval_s = interval_s(cost_s, self._mtbf_s, self._round_s)
            why = f"one costs {cost_s * 1e3:.2f} ms, a failure is expected every {self._mtbf_s:.0f} s"
            words = f"snapshots: one every {value:.2f} s: {why}"
        else:
            value = (self._begun[-1][0] - self._begun[0][0]) / (len(self._begun) - 1)
            words = f"snapshots: one every {value:.1f} steps"
        if not is_news(value, self._said):
            return ""
        self._said = value
        return words + (f"; it is on its peers after {self._round_s:.2f} s" if self._round_s else "")
