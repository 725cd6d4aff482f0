"""Commit a fault in a living job now, from another process."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from gemini_gnn.errors import RecoveryError
from gemini_gnn.faults import schedule
from gemini_gnn.observe import terms
from gemini_gnn.recovery import home, messages, visits

ANSWER_S = 15.0


def inject(run_dir: Path, words: Sequence[str], *, arena_root: str | os.PathLike[str] | None = None) -> str:
    """Have the fault of ``words`` (``kill-rank 2``) committed; returns what was done to which process.

    Raises:
        ConfigError: there is no such fault.
        RecoveryError: it was not committed: the message says why.
    """
    fault = schedule.parse_command(words)
    run_dir = Path(os.path.realpath(run_dir))
    term, machine = terms.newest_term(run_dir), os.uname().nodename
    request, deadline = messages.Inject(str(fault)), time.monotonic() + ANSWER_S
    answer: messages.Committed | str | None
    if "port" in term:
        answer = visits.ask_root(run_dir, term, request, messages.Committed, deadline)
    elif visits.is_away(term):
        raise RecoveryError(f"the job of {run_dir} is on {term['machine']}, not on {machine}: type the command there")
    else:
        arena = home.arena_of(run_dir, arena_root or term.get("arena_root", "/dev/shm"))
        agent = messages.connect(arena / home.AGENT_SOCKET)
        if agent is None:
            raise RecoveryError(f"no job of {run_dir} runs on {machine} for this user; {visits.news(run_dir)}")
        try:
            agent.send(request, timeout_s=5.0)
            answer = visits.wait_for(agent, messages.Committed, deadline)
        finally:
            agent.close()
    if not isinstance(answer, messages.Committed):
        raise RecoveryError(
            f"the root agent of {run_dir} does not answer ({answer or 'it went, or is stopped'}); {visits.news(run_dir)}"
        )
    if not answer.done:
        raise RecoveryError(answer.text)
    return answer.text
