"""Which trainer hangs, if one does. Pure: from the boards at several looks, and the time of each, to a rank and words.

Training is synchronous, so when one rank hangs all others soon wait for it, each in a phase that takes longer than usual.
The one that is least far hangs, by (step, place in the step, phase); the others are its consequences. So the boards of
all ranks must be seen, and only that one's time counts: a hang is more than ``factor`` times what its phase has taken at
most lately, and never less than ``floor_s``. Where several are equally far, each of them must have taken so long.

Never a hang: start-up, partitioning, writing (a file system that does not answer does not answer a new trainer either), and a
phase that was completed fewer than ``MIN_SEEN`` times in this generation, because a new process compiles kernels
again. That holds for the rank that is least far; while it is in such a phase nobody hangs.

A trainer that a signal or a debugger has stopped for ``floor_s`` hangs in any phase: no kernel compiles there.

Time is what this agent has seen pass. Between two looks at most ``2 * tick_s`` count: an agent that was stopped, or a
machine that slept, gives everybody as much more time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gemini_gnn.recovery.board import Board, Phase

MIN_SEEN = 5
NEVER = frozenset({Phase.START_UP, Phase.PARTITIONING, Phase.WRITING})


@dataclass(frozen=True)
class Limits:
    """``factor`` 0: nothing is ever a hang."""

    factor: float = 0.0
    floor_s: float = 30.0

    @property
    def tick_s(self) -> float:
        """How long the agent may wait between two looks."""
        return min(1.0, self.floor_s / 4) if self.factor else 1.0


@dataclass(frozen=True)
class Watch:
    """What is kept from one look to the next: its time, by rank the number of its mark and how long it has stood, and of
    the stopped ranks for how long."""

    at_s: float
    stood: Mapping[int, tuple[int, float]]
    stopped_s: Mapping[int, float]


@dataclass(frozen=True)
class Hang:
    """``ranks``: those that are least far. All of one collective may be; boards cannot say which of them is to blame."""

    ranks: tuple[int, ...]
    words: str


def look(
    watch: Watch | None, boards: Mapping[int, Board | None], stopped: Collection[int], now: float, limits: Limits
) -> tuple[Watch, Hang | None]:
    """
    Args:
        watch: of the last look; None at the first one of a generation.
        boards: of every trainer of the job that lives; None where nothing can be read: as long as that is so, nobody hangs
            who is not stopped.
        stopped: ranks that a signal or a debugger has stopped.
    """
    passed_s = min(now - watch.at_s, 2 * limits.tick_s) if watch else 0.0
    earlier = watch.stopped_s if watch else {}
    stopped_s = {rank: earlier[rank] + passed_s if rank in earlier else 0.0 for rank in stopped}
    before, stood = watch.stood if watch else {}, dict[int, tuple[int, float]]()
    for rank, board in boards.items():
        if board is not None:
            marks, seconds = before.get(rank, (0, 0.0))
            new = marks != board.marks
            stood[rank] = (board.marks, min(passed_s, max(0.0, now - board.since_s)) if new else seconds + passed_s)
    found = _hang(boards, {rank: seconds for rank, (_, seconds) in stood.items()}, limits)
    return Watch(now, stood, stopped_s), found or _stopped(stopped_s, limits)


def _hang(boards: Mapping[int, Board | None], stood_s: Mapping[int, float], limits: Limits) -> Hang | None:
    known = {rank: board for rank, board in boards.items() if board is not None}
    if limits.factor <= 0 or not known or len(known) < len(boards):
        return None
    least = min(map(_how_far, known.values()))
    there = {rank: board for rank, board in sorted(known.items()) if _how_far(board) == least}
    for rank, board in there.items():
        if board.phase in NEVER or board.seen < MIN_SEEN:
            return None
        if stood_s[rank] <= max(limits.floor_s, limits.factor * board.longest_s):
            return None
    phase, step = board.phase, board.step
    where = f"step {step}" if phase is Phase.STEP else f"{phase.word} of step {step}"
    names = f"rank {rank} hangs" if len(there) == 1 else f"ranks {', '.join(map(str, there))} hang"
    took, usual = min(stood_s[rank] for rank in there), max(board.longest_s for board in there.values())
    return Hang(tuple(there), f"{names} in {where} for {_seconds(took)} (usually at most {_seconds(usual)})")


def _stopped(stopped_s: Mapping[int, float], limits: Limits) -> Hang | None:
    ranks = tuple(sorted(rank for rank, seconds in stopped_s.items() if seconds > limits.floor_s))
    if limits.factor <= 0 or not ranks:
        return None
    names = f"rank {ranks[0]} hangs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} hang"
    return Hang(ranks, f"{names}: standing still for {_seconds(min(stopped_s[rank] for rank in ranks))}")


def _how_far(board: Board) -> tuple[int, int, int]:
    return board.step, board.place, board.phase


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
