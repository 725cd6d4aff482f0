"""Commit a fault in a living job now, from another process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gemini_gnn.errors import RecoveryError
from gemini_gnn.faults import schedule
from gemini_gnn.recovery import messages, visits

ANSWER_S = 15.0


def inject(run_dir: Path, words: Sequence[str], *, arena_root: str | os.PathLike[str] | None = None) -> str:
    """Have the fault of ``words`` (``kill-rank 2``) committed; returns what was done to which process.

    Raises:
        ConfigError: there is no such fault.
        RecoveryError: it was not committed: the message says why.
    """
    request = messages.Inject(str(schedule.parse_command(words)))
    answer = visits.ask(run_dir, request, messages.Committed, ANSWER_S, arena_root)
    if not answer.done:
        raise RecoveryError(answer.text)
    return answer.text
