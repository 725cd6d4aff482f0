"""News of a job, read in its run directory on any machine: the newest status, and whether its writer still lives.

Clocks of two machines are never compared. If the holder of the newest term is a process of this machine, the kernel knows
whether it lives, and the age of the status is known. Otherwise the reader looks whether the status or the beat of the
term changes, and measures on its own clock for how long it does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini_gnn.errors import RunDirError
from gemini_gnn.observe.status import ENDED, read_status
from gemini_gnn.observe.terms import OVER, newest_holder

SILENT_S = 2.5  # a root writes every second, and beats every two
LOOK_S = 0.25


@dataclass(frozen=True)
class Seen:
    """What stands in the run directory.

    Attributes:
        status: see ``observe.status``; empty: none is written yet.
        term: the record of the newest one; empty: none. beat: of its holder.
        lives: the holder; None: another machine's, so this one cannot know.
        age_s: of the status; None if this machine did not write it.
    """

    status: dict[str, Any]
    term: dict[str, Any]
    beat: str
    lives: bool | None
    age_s: float | None

    @property
    def is_of_newest_term(self) -> bool:
        return self.status.get("term", self.term.get("term")) == self.term.get("term")


@dataclass(frozen=True)
class News:
    """What was seen, and for how long.

    Attributes:
        unchanged_s: for how long the reader has seen the same. changed: it saw something else before.
    """

    seen: Seen
    unchanged_s: float
    changed: bool

    @property
    def root(self) -> str:
        """How things stand with the root of the job, without an agent rank 0's process.

        "ended": in order, its status is the last one. "gone": it is dead, or left no last status. "lives": it writes.
        "silent": it has not written for SILENT_S. "unknown": the reader has not looked that long.
        """
        seen = self.seen
        if seen.status.get("state") in ENDED and seen.is_of_newest_term:
            return "ended"
        if seen.beat == OVER or seen.lives is False:
            return "gone"
        fresh = seen.lives and seen.age_s is not None and 0 <= seen.age_s <= SILENT_S
        if fresh or (self.changed and self.unchanged_s <= SILENT_S):
            return "lives"
        return "silent" if self.unchanged_s > SILENT_S else "unknown"

    @property
    def document(self) -> dict[str, Any]:
        """For scripts: the status, and what the reader adds: ``newest_term``, ``root``, ``unchanged_s``, ``age_s``."""
        age_s = None if self.seen.age_s is None else round(self.seen.age_s, 3)
        news = {"root": self.root, "unchanged_s": round(self.unchanged_s, 3), "age_s": age_s}
        return {**self.seen.status, "newest_term": self.seen.term.get("term"), **news}


def look(run_dir: Path) -> Seen:
    """
    Raises:
        RunDirError: there is no job, or the folder cannot be read.
    """
    try:
        status, (term, beat, lives) = read_status(run_dir), newest_holder(run_dir)
    except PermissionError:
        raise
    except OSError as error:
        raise RunDirError(f"cannot read {run_dir}: {error.strerror}; look from a machine that sees it") from None
    if not run_dir.is_dir():
        raise RunDirError(f"there is no folder {run_dir}; give the run_dir=... of a job")
    if not status and not term:
        raise RunDirError(
            f"no job has begun in {run_dir}: expected a status or a term there, found neither; give the run_dir=... of a job"
        )
    here = lives is not None and status.get("machine") == term.get("machine")
    age_s = time.time() - status["time"] if here and "time" in status else None
    return Seen(status, term, beat, lives, age_s)


def follow(run_dir: Path) -> Iterator[News]:
    """The news, every LOOK_S. Looks are counted, not time: a file system that does not answer is nobody's silence.

    Raises:
        RunDirError: as :func:`look`.
    """
    seen, unchanged_s, changed = look(run_dir), 0.0, False
    while True:
        yield News(seen, unchanged_s, changed)
        time.sleep(LOOK_S)
        before, seen, unchanged_s = seen, look(run_dir), unchanged_s + LOOK_S
        if (seen.status, seen.term, seen.beat) != (before.status, before.term, before.beat):
            unchanged_s, changed = 0.0, True
