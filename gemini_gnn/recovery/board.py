"""The board: what each trainer of this machine is doing, as its worker agent sees it without asking. No torch.

Who owns what. The agent makes ``<arena>/board`` anew before every fork, one page per local rank, and removes it with the
arena. A trainer writes its own page, from its training thread, but for two places: the thread that prepares batches writes
``doing``, and the thread that copies snapshots writes the newest one. Both sides map the file: no system call, so a trainer
marks in microseconds and a stopped or dead file system harms neither. All times are on the monotonic clock, which the
processes of one machine share.

What may be interrupted where. A page holds two records. Mark n is written into record n % 2, and then the word 0 becomes n,
in one aligned store of 8 bytes. So a trainer that is stopped or killed in the middle of a mark leaves the mark before it
whole. A reader believes record n % 2 when word 0 says n before and after it was read, and the record itself, which carries
its number, says n too. The newest snapshot has a number and two records of its own, used in the same way. All other words
are each written alone: two words of the table may be of two marks.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from gemini_gnn.faults import injection

FILE = "board"
BELL = "bell"  # the FIFO beside it: a trainer writes a byte for each committed snapshot
PAGE_BYTES = 4096
FADES = 6  # the longest time loses 1 / 2**FADES with each observation: one slow step is forgotten after some hundred

# In words of 8 bytes: number of the mark, what the other thread does, two records, then two words for each phase; number of
# the newest snapshot, steps in all, the step that was restored, a time for each milestone, two records of snapshots.
_MARKS, _DOING, _RECORDS, _RECORD_WORDS, _TABLE = 0, 1, 8, 8, 32
_SNAPSHOTS, _TOTAL_STEPS, _RESTORED_STEP, _MILESTONES, _SNAPSHOT_RECORDS = 64, 65, 66, 72, 80
_RECORD = struct.Struct("@6Q")


class Phase(IntEnum):
    START_UP = 0
    PARTITIONING = 1
    SAMPLING = 2
    EXCHANGE = 3
    FORWARD = 4
    BACKWARD = 5
    AGREEMENT = 6
    REDUCTION = 7
    STEP = 8
    CAPTURE = 9
    EVALUATION = 10
    WRITING = 11

    @property
    def word(self) -> str:
        return "start-up" if self is Phase.START_UP else self.name.lower()


class Milestone(IntEnum):
    """The way of a trainer to its first step."""

    STARTED = 0  # forked, and on the board
    JOINED = 1  # all ranks have met: the process groups are made
    BUILT = 2  # the engine is built
    RESTORED = 3  # a snapshot or checkpoint is restored, or the first one taken
    STEPPED = 4  # a step is done


class Newest(NamedTuple):
    """The newest snapshot of a trainer; ``when_s``: when it was committed or restored."""

    term: int
    generation: int
    step: int
    when_s: float


@dataclass(frozen=True)
class Board:
    """One trainer's page.

    Attributes:
        marks: how many it has made, the progress count.
        generation: of the trainer.
        step: the optimizer step it is in, 1 for the first, as in losses.csv.
        place: marks since that step began; the same on all ranks at the same point of the step.
        phase: since ``since_s``. Waiting for a batch is SAMPLING or, once its rows are on their way, EXCHANGE.
        seen: how often ``phase`` was completed. longest_s: how long it has taken at most, lately.
        milestones: by :class:`Milestone`, when it was reached; None: not yet.
        restored_step: steps done that it began with.
        total_steps: of the run; 0: unknown.
        snapshot: its newest committed one.
    """

    marks: int
    generation: int
    step: int
    place: int
    phase: Phase
    since_s: float
    seen: int
    longest_s: float
    milestones: tuple[float | None, ...] = (None,) * len(Milestone)
    restored_step: int = 0
    total_steps: int = 0
    snapshot: Newest | None = None


def make(arena: Path, pages: int) -> None:
    """A new, empty board. A trainer of an earlier one that is not quite dead keeps writing into a file without a name.

    Raises:
        OSError: there is no room.
    """
    path = arena / FILE
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, pages * PAGE_BYTES)  # a store without room behind it would be SIGBUS
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def open_board(arena: Path) -> mmap.mmap | None:
    """The board of this arena; None where there is none."""
    try:
        descriptor = os.open(arena / FILE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)


def read(board: mmap.mmap, page: int) -> Board | None:
    """What stands on ``page``; None before the first mark, or while marks come faster than they can be read."""
    words = memoryview(board)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES].cast("Q")
    if (record := _read_record(words, _MARKS, _RECORDS)) is None:
        return None
    marks, generation, step, place, phase, since_ns = record
    entry = _TABLE + 2 * phase
    waits = phase == Phase.SAMPLING and words[_DOING] == Phase.EXCHANGE
    reached = words[_MILESTONES : _MILESTONES + len(Milestone)].tolist()
    newest = _read_record(words, _SNAPSHOTS, _SNAPSHOT_RECORDS)
    return Board(
        marks=marks,
        generation=generation,
        step=step,
        place=place,
        phase=Phase.EXCHANGE if waits else Phase(phase),
        since_s=since_ns / 1e9,
        seen=words[entry],
        longest_s=words[entry + 1] / 1e9,
        milestones=tuple(ns / 1e9 if ns else None for ns in reached),
        restored_step=words[_RESTORED_STEP],
        total_steps=words[_TOTAL_STEPS],
        snapshot=Newest(newest[1], newest[2], newest[3], newest[4] / 1e9) if newest else None,
    )


def talks(board: mmap.mmap, page: int) -> bool:
    """Whether the trainer of ``page`` is in a burst of traffic with other machines, as far as it says so.

    One that marks no reduction (a script) says only STEP, all the time; of the others STEP may gather parameters (ZeRO).
    """
    words = memoryview(board)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES].cast("Q")
    if words[_DOING] == Phase.EXCHANGE:  # in the other thread
        return True
    phase = words[_RECORDS + _RECORD_WORDS * (words[_MARKS] % 2) + 4]
    return phase in (Phase.AGREEMENT, Phase.REDUCTION) or (
        phase == Phase.STEP and words[_TABLE + 2 * Phase.REDUCTION] > 0
    )


def _read_record(words: memoryview, number: int, records: int) -> list[int] | None:
    """The record that the word ``number`` counts; None where there is none, or none that stays while it is read."""
    for _ in range(3):
        count = words[number]
        at = records + _RECORD_WORDS * (count % 2)
        record = words[at : at + 6].tolist()
        if count and words[number] == count == record[0]:
            return record
    return None


def aged(board: Board, now: float) -> Board:
    """With an age in place of each time, for a machine with another clock."""
    return replace(
        board,
        since_s=now - board.since_s,
        milestones=tuple(None if one is None else now - one for one in board.milestones),
        snapshot=None if board.snapshot is None else board.snapshot._replace(when_s=now - board.snapshot.when_s),
    )


def dated(board: Board, now: float) -> Board:
    """The inverse of :func:`aged`, on the clock of the reader."""
    return aged(board, now)  # now - (now - t)


class Page:
    """The writer of a page. The training thread calls all but :meth:`doing` and :meth:`committed`, one thread each."""

    def __init__(self, board: mmap.mmap, page: int, generation: int):
        self._board, self._offset, self._generation = board, page * PAGE_BYTES, generation
        self._words = memoryview(board)[self._offset : self._offset + PAGE_BYTES].cast("Q")
        self._marks, self._place, self._since_ns = 0, 0, 0
        self.step = self._phase = -1

    def mark(self, phase: Phase, step: int | None = None) -> None:
        """From now on this trainer is in ``phase`` of ``step`` (None: of the same). Nothing new is no mark."""
        words, step = self._words, self.step if step is None else step
        if phase == self._phase and step == self.step:
            return
        now = time.monotonic_ns()
        if self._marks:
            entry = _TABLE + 2 * self._phase
            longest = words[entry + 1]
            words[entry + 1] = max(now - self._since_ns, longest - (longest >> FADES))
            words[entry] += 1
        self._place = self._place + 1 if step == self.step else 0
        self._phase, self.step, self._since_ns = phase, step, now
        marks = self._marks = self._marks + 1
        at = self._offset + 8 * (_RECORDS + _RECORD_WORDS * (marks % 2))
        _RECORD.pack_into(self._board, at, marks, self._generation, step, self._place, phase, now)
        words[_MARKS] = marks

    def doing(self, phase: Phase) -> None:
        """The thread that prepares batches is in ``phase``: what a trainer that waits for a batch waits for."""
        self._words[_DOING] = phase

    def milestone(self, milestone: Milestone) -> None:
        """It is reached now, unless it was before."""
        if not self._words[_MILESTONES + milestone]:
            self._words[_MILESTONES + milestone] = time.monotonic_ns()

    def restored(self, step: int) -> None:
        """Training begins with ``step`` steps done."""
        self._words[_RESTORED_STEP] = step
        self.milestone(Milestone.RESTORED)

    def total_steps(self, steps: int) -> None:
        self._words[_TOTAL_STEPS] = steps

    def committed(self, term: int, generation: int, step: int) -> None:
        """This rank's snapshot of ``step`` is committed: the newest one."""
        count = self._words[_SNAPSHOTS] + 1
        at = self._offset + 8 * (_SNAPSHOT_RECORDS + _RECORD_WORDS * (count % 2))
        _RECORD.pack_into(self._board, at, count, term, generation, step, time.monotonic_ns(), 0)
        self._words[_SNAPSHOTS] = count


_page: Page | None = None  # of this process; None where no agent looks


def attach(arena: Path, page: int, generation: int) -> None:
    """Let the functions below write to ``page`` of the board in ``arena``, if there is one; without it they do nothing."""
    global _page
    board = open_board(arena)
    if board is not None and len(board) >= (page + 1) * PAGE_BYTES:
        _page = Page(board, page, generation)
        _page.milestone(Milestone.STARTED)
        _page.mark(Phase.START_UP, 0)


def mark(phase: Phase, step: int | None = None) -> None:
    """See :meth:`Page.mark`. Then come the faults that are due here."""
    if _page is not None:
        _page.mark(phase, step)
    if injection.armed:
        injection.at(phase.word, step if _page is None else _page.step)


def doing(phase: Phase) -> None:
    """See :meth:`Page.doing`."""
    if _page is not None:
        _page.doing(phase)
    # Of the exchange alone: the faults of any other phase are the training thread's, so that no two threads see one fault.
    if injection.armed and phase is Phase.EXCHANGE:
        injection.at(phase.word)


def milestone(milestone: Milestone) -> None:
    """See :meth:`Page.milestone`."""
    if _page is not None:
        _page.milestone(milestone)


def restored(step: int) -> None:
    """See :meth:`Page.restored`."""
    if _page is not None:
        _page.restored(step)


def total_steps(steps: int) -> None:
    """See :meth:`Page.total_steps`."""
    if _page is not None:
        _page.total_steps(steps)


def committed(term: int, generation: int, step: int) -> None:
    """See :meth:`Page.committed`."""
    if _page is not None:
        _page.committed(term, generation, step)


def attaching() -> None:
    """A script has built all it trains with; when its ranks met it does not say."""
    milestone(Milestone.JOINED)
    milestone(Milestone.BUILT)


def stepped(step: int) -> None:
    """A script has done ``step``, and that is all it says: the next one has begun."""
    if step:
        milestone(Milestone.STEPPED)
    mark(Phase.STEP, step + 1)
