"""How visitors (stop.py, inject.py, inspect_snapshots.py) reach a job's root agent from any machine of it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, TypeVar

from gemini_gnn.errors import RecoveryError
from gemini_gnn.observe import terms
from gemini_gnn.observe.status import ENDED, read_status
from gemini_gnn.recovery import home, messages, wire

PATIENCE_S = 5.0  # a root agent that was killed comes back sooner
PAUSE_S = 0.2

Answer = TypeVar("Answer")


def is_away(term: dict[str, Any]) -> bool:
    """Whether ``term`` is of a job on one machine, and not this one."""
    return "port" not in term and term.get("machine", os.uname().nodename) != os.uname().nodename


def ask(
    run_dir: Path,
    request: messages.Message,
    answer: type[Answer],
    timeout_s: float,
    arena_root: str | os.PathLike[str] | None = None,
) -> Answer:
    """The answer of the root agent of ``run_dir``'s job to ``request``.

    Raises:
        RecoveryError: it refuses or does not answer, no job runs, or it cannot be reached from here.
    """
    run_dir = Path(os.path.realpath(run_dir))
    term, machine, deadline = terms.newest_term(run_dir), os.uname().nodename, time.monotonic() + timeout_s
    found: Answer | str | None
    if "port" in term:
        found = ask_root(run_dir, term, request, answer, deadline)
    elif is_away(term):
        raise RecoveryError(f"the job of {run_dir} is on {term['machine']}, not on {machine}: type the command there")
    else:
        arena = home.arena_of(run_dir, arena_root or term.get("arena_root", "/dev/shm"))
        agent = messages.connect(arena / home.AGENT_SOCKET)
        if agent is None:
            raise RecoveryError(f"no job of {run_dir} runs on {machine} for this user; {news(run_dir)}")
        try:
            agent.send(request, timeout_s=5.0)
            found = wait_for(agent, answer, deadline)
        finally:
            agent.close()
    if not isinstance(found, answer):
        raise RecoveryError(
            f"the root agent of {run_dir} does not answer ({found or 'it went, or is stopped'}); {news(run_dir)}"
        )
    return found


def ask_root(
    run_dir: Path, term: dict[str, Any], request: messages.Message, answer: type[Answer], deadline: float
) -> Answer | str:
    """The root agent's answer to ``request``, or why there is none. ``term``: of a job on several machines.

    Raises:
        RecoveryError: it refuses; or the job is another user's.
    """
    try:
        token = terms.token(run_dir)
    except PermissionError:
        raise RecoveryError(of_another_user(run_dir)) from None
    until = min(deadline, time.monotonic() + PATIENCE_S)
    while True:
        root = wire.connect(term["address"], term["port"], messages.TO_SLOT, token)
        root.send(request)
        try:
            found = wait_for(root, answer, deadline)
        finally:
            root.close()
        if found is not None:
            return found
        once = root.authenticated and not isinstance(request, messages.Stop)  # a fault that was asked for twice is two
        if once or time.monotonic() > until or read_status(run_dir).get("state", "done") in ENDED:
            return str(root.complaint or "it went without an answer")
        time.sleep(PAUSE_S)
        term = terms.newest_term(run_dir)  # another machine may be root by now


def of_another_user(run_dir: Path) -> str:
    return (
        f"{run_dir} is a job of another user: only its owner may read {run_dir / 'terms' / 'token'}; "
        "type the command as that user"
    )


def wait_for(agent: messages.Channel, answer: type[Answer], deadline: float) -> Answer | None:
    """The next ``answer`` on this connection; None if it closes, or the deadline passes.

    Raises:
        RecoveryError: the agent refuses.
    """
    while not agent.closed and time.monotonic() < deadline:
        for message in agent.wait(0.1):
            if isinstance(message, messages.Refused):
                raise RecoveryError(message.text)
            if isinstance(message, answer):
                return message
            if isinstance(message, messages.Ended):
                raise RecoveryError(f"the job has just ended: {message.outcome}")
    return None


def news(run_dir: Path) -> str:
    """For an error message: from when the newest news of the job is."""
    status = read_status(run_dir)
    if not status:
        return f"there is no news of it: {run_dir} has no status.json"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.get("time")))
    step = f", step {status['step']}" if "step" in status else ""
    return f"its last news is of {when}, from {status.get('machine', '?')}: {status.get('state', '?')}{step}"
