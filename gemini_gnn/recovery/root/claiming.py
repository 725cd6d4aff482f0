"""The claim of a term, in a thread: the file system may take its time, and the root's loop may not.

Ownership. The root has at most one claim under way, and looks for its ``result`` in its loop. The thread owns the beats of the
term until it hands them over, and ends those of the term before.

Interruptions. The process may be killed at any instruction: a term that was claimed then shows no life, and the next root
claims the one after it. A file system that refuses is asked again until the root gives up. One that hangs holds the thread: it
is a daemon, and its term, if the file system made it in the end, is used by nobody. An error that is no OSError reaches
the root as the end of the claim, and people through the agent's log.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemini_gnn.errors import RunDirError, RunDirInUse
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
    """``won`` None: another process has the term, and ``holder`` is the record of the newest one."""

    won: Won | None
    holder: dict[str, Any] = field(default_factory=dict)


class Claim:
    """
    Attributes:
        result: None while the claim is under way.
    """

    def __init__(
        self,
        run_dir: Path,
        term: int,
        record: dict[str, Any],
        witness: bool,
        before: terms.Beats | None,
        fence_s: float,
    ):
        """
        Args:
            term: the newest that the root knows of; the next one is claimed.
            witness: the last term's seats can step no more. Else its holder is watched for beats first.
            before: of the term that this root holds. Without a witness it waits ``fence_s``: then its trainers are killed.
        """
        self.result: Result | None = None
        self._run_dir, self._term, self._record, self._witness = run_dir, term, record, witness
        self._before, self._fence_s, self._over = before, fence_s, threading.Event()
        threading.Thread(target=self._run, name="claim", daemon=True).start()

    def give_up(self) -> None:
        """Without waiting. A term that comes now is left again."""
        self._over.set()
        if self.result is not None and self.result.won is not None:
            self.result.won.beats.stop(0.0)

    def _run(self) -> None:
        result = Result(None)
        try:
            result = self._claim()
        finally:
            self.result = result
            if self._over.is_set() and result.won is not None:
                result.won.beats.stop(0.0)

    def _claim(self) -> Result:
        nonce = secrets.token_hex(8)
        if not self._witness and self._before is not None:
            self._over.wait(self._fence_s)
        while not self._over.is_set():
            try:
                failures, status = read_failures(self._run_dir), read_status(self._run_dir)
                if not self._witness and self._before is None:
                    term = terms.claim_term(self._run_dir, self._record)
                elif terms.succeed(self._run_dir, self._term, self._record, nonce):
                    term = self._term + 1
                else:
                    return Result(None, terms.newest_term(self._run_dir))
            except RunDirInUse:  # its holder lives
                return Result(None, terms.newest_term(self._run_dir))
            except (OSError, RunDirError):
                self._over.wait(AGAIN_S)
                continue
            beats = terms.Beats(self._run_dir, term)
            if self._before is not None:
                self._before.stop()
            return Result(Won(term, beats, failures, status))
        return Result(None)
