"""The board: what each trainer of this machine is doing, as its worker agent sees it without asking. No torch.

Who owns what. The agent makes ``<arena>/board`` anew before every fork, one page per local rank, and removes it with the
arena. A trainer writes its own page, from its training thread, but for two places: the thread that prepares batches writes
``doing``, and the thread that copies snapshots writes the newest one and the held one. The agent writes back which snapshot
is recoverable, and from which step on one is to be held. Both sides map the file: no system call, so a trainer marks in
microseconds and a stopped or dead file system harms neither. All times are on the monotonic clock, which the processes of
one machine share.

``<arena>/bell`` is a FIFO: a trainer that has committed a snapshot puts a byte into it, and whoever copies snapshots need not
look at the board all the time. It outlives the boards, as its reader does. A full one is as good as a byte more.

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
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from gemini_gnn.faults import injection
from gemini_gnn.snapshot.store.identity import Identity

FILE = "board"
BELL = "bell"  # the FIFO beside it: a trainer writes a byte for each committed snapshot
PAGE_BYTES = 4096
FADES = 6  # the longest time loses 1 / 2**FADES with each observation: one slow step is forgotten after some hundred

# In words of 8 bytes: number of the mark, what the other thread does, two records, then two words for each phase; number of
# the newest snapshot, steps in all, the step that was restored, a time for each milestone, two records of snapshots; number of
# the recoverable snapshot, the step to persist, number of the held snapshot, two records of each.
_MARKS, _DOING, _RECORDS, _RECORD_WORDS, _TABLE = 0, 1, 8, 8, 32
_SNAPSHOTS, _TOTAL_STEPS, _RESTORED_STEP, _MILESTONES, _SNAPSHOT_RECORDS = 64, 65, 66, 72, 80
_RECOVERABLE, _PERSIST_AT, _HELD, _RECOVERABLE_RECORDS, _HELD_RECORDS = 96, 97, 98, 104, 120
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
        held: the last one that it held to be persisted.
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
    held: Identity | None = None


def make(arena: Path, pages: int) -> None:
    """A new, empty board, and the bell where there is none.

    A trainer of an earlier board that is not quite dead keeps writing into a file without a name.

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
    with suppress(FileExistsError):
        os.mkfifo(arena / BELL, 0o600)


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


def open_bell(arena: Path) -> int | None:
    """The bell of this arena, for either side: neither waits for the other. None where there is none."""
    try:
        return os.open(arena / BELL, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None


def _words(board: mmap.mmap, page: int) -> memoryview:
    return memoryview(board)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES].cast("Q")


def read(board: mmap.mmap, page: int) -> Board | None:
    """What stands on ``page``; None before the first mark, or while marks come faster than they can be read."""
    words = _words(board, page)
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
        held=_read_identity(words, _HELD, _HELD_RECORDS),
    )


def tell_recoverable(board: mmap.mmap, page: int, identity: Identity) -> None:
    """The agent tells a trainer: every shard of this snapshot has its copies."""
    _write_record(_words(board, page), _RECOVERABLE, _RECOVERABLE_RECORDS, *identity)


def ask_to_persist(board: mmap.mmap, page: int, step: int) -> None:
    """The agent asks a trainer to hold its first snapshot of ``step`` or a later one; 0: to hold none any more."""
    _words(board, page)[_PERSIST_AT] = step


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


def _read_identity(words: memoryview, number: int, records: int) -> Identity | None:
    record = _read_record(words, number, records)
    return None if record is None else Identity(*record[1:4])


def _write_record(
    words: memoryview, number: int, records: int, term: int, generation: int, step: int, when_ns: int = 0
) -> None:
    """The next record that the word ``number`` counts; whole before it counts."""
    count = words[number] + 1
    _RECORD.pack_into(words, 8 * (records + _RECORD_WORDS * (count % 2)), count, term, generation, step, when_ns, 0)
    words[number] = count


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
    """A trainer's side of a page. The training thread calls all but :meth:`doing`, and :meth:`committed` and :meth:`hold`.

    These belong to the thread that prepares batches, and to the one that copies snapshots. ``bell``: to ring, if any.
    """

    def __init__(self, board: mmap.mmap, page: int, generation: int, bell: int | None = None):
        self._board, self._offset, self._generation, self._bell = board, page * PAGE_BYTES, generation, bell
        self._words = _words(board, page)
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
        _write_record(self._words, _SNAPSHOTS, _SNAPSHOT_RECORDS, term, generation, step, time.monotonic_ns())
        if self._bell is not None:
            with suppress(BlockingIOError):  # it is full: its reader has enough to wake up for
                os.write(self._bell, b"\0")

    def recoverable(self) -> Identity | None:
        """The newest snapshot of which every shard has its copies; None: not yet one."""
        return _read_identity(self._words, _RECOVERABLE, _RECOVERABLE_RECORDS)

    def persist_at(self) -> int:
        """The first snapshot of this step or a later one is to be held; 0: none."""
        return self._words[_PERSIST_AT]

    def hold(self, term: int, generation: int, step: int) -> None:
        """This rank's snapshot of ``step`` is committed, and stays until :meth:`persist_at` says something else."""
        _write_record(self._words, _HELD, _HELD_RECORDS, term, generation, step)


_page: Page | None = None  # of this process; None where no agent looks


def attach(arena: Path, page: int, generation: int) -> None:
    """Let the functions below write to ``page`` of the board in ``arena``, if there is one; without it they do nothing."""
    global _page
    board = open_board(arena)
    if board is not None and len(board) >= (page + 1) * PAGE_BYTES:
        _page = Page(board, page, generation, open_bell(arena))
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


def recoverable() -> Identity | None:
    """See :meth:`Page.recoverable`."""
    return None if _page is None else _page.recoverable()


def persist_at() -> int:
    """See :meth:`Page.persist_at`."""
    return 0 if _page is None else _page.persist_at()


def hold(term: int, generation: int, step: int) -> None:
    """See :meth:`Page.hold`."""
    if _page is not None:
        _page.hold(term, generation, step)


def attaching() -> None:
    """A script has built all it trains with; when its ranks met it does not say."""
    milestone(Milestone.JOINED)
    milestone(Milestone.BUILT)


def stepped(step: int) -> None:
    """A script has done ``step``, and that is all it says: the next one has begun."""
    if step:
        milestone(Milestone.STEPPED)
    mark(Phase.STEP, step + 1)
