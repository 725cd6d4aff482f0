"""The board: what each trainer of this machine is doing, as its worker agent sees it without asking. No torch.

Who owns what. The agent makes ``<arena>/board`` anew before every fork, one page per local rank, and removes it with the
arena. A trainer writes its own page, from its training thread; ``doing`` is the exception, one word that the thread that
prepares batches writes. Both sides map the file: no system call, so a trainer marks in microseconds and a stopped or dead
file system harms neither. ``since_s`` is on the monotonic clock, which the processes of one machine share.

What may be interrupted where. A page holds two records. Mark n is written into record n % 2, and then the word 0 becomes n,
in one aligned store of 8 bytes. So a trainer that is stopped or killed in the middle of a mark leaves the mark before it
whole. A reader believes record n % 2 when word 0 says n before and after it was read, and the record itself, which carries
its number, says n too. The words of the table are each written alone: two of them may be of two marks.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

from gemini_gnn.faults import injection

FILE = "board"
PAGE_BYTES = 4096
FADES = 6  # the longest time loses 1 / 2**FADES with each observation: one slow step is forgotten after some hundred

# In words of 8 bytes: number of the mark, what the other thread does, two records, then two words for each phase.
_DOING, _RECORDS, _RECORD_WORDS, _TABLE = 1, 8, 8, 32
_RECORD = struct.Struct("@6Q")


class Phase(IntEnum):
    START_UP = 0
    PARTITIONING = 1
    SAMPLING = 2
    EXCHANGE = 3
    FORWARD = 4
    BACKWARD = 5
    AGREEMENT = 6
    STEP = 7
    CAPTURE = 8
    EVALUATION = 9
    WRITING = 10

    @property
    def word(self) -> str:
        return "start-up" if self is Phase.START_UP else self.name.lower()


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
    """

    marks: int
    generation: int
    step: int
    place: int
    phase: Phase
    since_s: float
    seen: int
    longest_s: float


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
    for _ in range(3):
        marks = words[0]
        at = _RECORDS + _RECORD_WORDS * (marks % 2)
        number, generation, step, place, phase, since_ns = words[at : at + 6].tolist()
        entry = _TABLE + 2 * min(phase, max(Phase))
        seen, longest_ns, doing = words[entry], words[entry + 1], words[_DOING]
        if marks and words[0] == marks == number:
            shown = Phase.EXCHANGE if phase == Phase.SAMPLING and doing == Phase.EXCHANGE else Phase(phase)
            return Board(marks, generation, step, place, shown, since_ns / 1e9, seen, longest_ns / 1e9)
    return None


def aged(board: Board, now: float) -> Board:
    """With an age in place of each time, for a machine with another clock."""
    return replace(board, since_s=now - board.since_s)


def dated(board: Board, now: float) -> Board:
    """The inverse of :func:`aged`, on the clock of the reader."""
    return replace(board, since_s=now - board.since_s)


class Page:
    """The writer of a page. One thread calls :meth:`mark`, one :meth:`doing`."""

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
        words[0] = marks

    def doing(self, phase: Phase) -> None:
        """The thread that prepares batches is in ``phase``: what a trainer that waits for a batch waits for."""
        self._words[_DOING] = phase


_page: Page | None = None  # of this process; None where no agent looks


def attach(arena: Path, page: int, generation: int) -> None:
    """Let :func:`mark` and :func:`doing` of this process write to ``page`` of the board in ``arena``, if there is one."""
    global _page
    board = open_board(arena)
    if board is not None and len(board) >= (page + 1) * PAGE_BYTES:
        _page = Page(board, page, generation)
        _page.mark(Phase.START_UP, 0)


def mark(phase: Phase, step: int | None = None) -> None:
    """See :meth:`Page.mark`; nothing where no agent looks. Then come the faults that are due here."""
    if _page is not None:
        _page.mark(phase, step)
    if injection.armed:
        injection.at(phase.word, step if _page is None else _page.step)


def doing(phase: Phase) -> None:
    if _page is not None:
        _page.doing(phase)
    # Of the exchange alone: the faults of any other phase are the training thread's, so that no two threads see one fault.
    if injection.armed and phase is Phase.EXCHANGE:
        injection.at(phase.word)


def stepped(step: int) -> None:
    """A script has done ``step``, and that is all it says: the next one has begun."""
    mark(Phase.STEP, step + 1)
