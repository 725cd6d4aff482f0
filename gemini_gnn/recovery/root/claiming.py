"""The claim of a term, in a thread: the file system may take its time, and the root's loop may not.

Ownership. The root has at most one claim under way, and looks for its ``result`` in its loop. The thread owns the beats of the
term until it hands them over, and ends those of the term before.

Interruptions. The process may be killed at any instruction: a term that was claimed then shows no life, and the next root
claims the one after it. A file system that refuses is asked again until the root gives up. One that hangs holds the thread: it
is a daemon, and its term, if the file system made it in the end, is used by nobody. An error that is no OSError reaches
the root as the end of the claim, and people through the agent's log.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini_gnn.errors import RunDirError
from gemini_gnn.observe import terms
from gemini_gnn.observe.failures import read_failures
from gemini_gnn.observe.status import read_status

AGAIN_S = 0.2


@dataclass(frozen=True)
class Won:
    """A term that is ours, its beats, and what the run directory says of the job so far."""

    term: int
    beats: terms.Beats
    failures: list[dict[str, Any]]
    status: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """``won`` None: another process has the term."""

    won: Won | None


class Claim:
    """
    Attributes:
        result: None while the claim is under way.
    """

    def __init__(self, run_dir: Path, term: int, record: dict[str, Any], witness: bool, before: terms.Beats | None):
        """
        Args:
            term: the newest that the root knows of; the next one is claimed.
            witness: the last membership can step no more. Else its holder is watched for beats first.
            before: of the term that this root holds.
        """
        self.result: Result | None = None
        self._run_dir, self._term, self._record, self._witness = run_dir, term, record, witness
        self._before, self._over = before, threading.Event()
        threading.Thread(target=self._run, name="claim", daemon=True).start()

    def give_up(self) -> None:
        """Without waiting. A term that comes now is left again."""
        self._over.set()
        if self.result is not None and self.result.won is not None:
            self.result.won.beats.stop(0.0)

    def _run(self) -> None:
        result = Result(None)
        try:
            result = Result(self._claim())
        finally:
            self.result = result
            if self._over.is_set() and result.won is not None:
                result.won.beats.stop(0.0)

    def _claim(self) -> Won | None:
        while True:
            try:
                if not self._witness and self._before is None:
                    term = terms.claim_term(self._run_dir, self._record)
                elif terms.succeed(self._run_dir, self._term, self._record):
                    term = self._term + 1
                else:
                    return None
                failures, status = read_failures(self._run_dir), read_status(self._run_dir)
                break
            except RunDirError:  # its holder lives
                return None
            except OSError:
                if self._over.wait(AGAIN_S):
                    return None
        beats = terms.Beats(self._run_dir, term)
        if self._before is not None:
            self._before.stop()
        return Won(term, beats, failures, status)
