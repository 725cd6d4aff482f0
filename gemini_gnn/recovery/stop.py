"""Ask a job on this machine to end in order, from another process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from gemini_gnn.errors import RecoveryError
from gemini_gnn.observe import terms
from gemini_gnn.recovery import home, messages, processes
from gemini_gnn.recovery.root import decisions as root
from gemini_gnn.recovery.worker.decisions import Limits


def stop(run_dir: Path, *, keep: bool = True, arena_root: str | os.PathLike[str] | None = None) -> str:
    """Ask the job's worker agent to end, and wait until it has. Returns a report for people.

    Args:
        keep: leave the snapshots in host memory, so that the same command resumes from them. Otherwise remove them, also
            those of a job that no longer runs.
        arena_root: folder of the arenas; default the one in the job's newest term, else /dev/shm.

    Raises:
        RecoveryError: the job does not end in time, or its agent is of another version.
    """
    run_dir = Path(os.path.realpath(run_dir))
    newest = terms.newest_term(run_dir)
    arena = home.arena_of(run_dir, arena_root or newest.get("arena_root", "/dev/shm"))
    elsewhere = "" if keep else _elsewhere(newest)
    deadline = time.monotonic() + root.Limits().stop_s + Limits().reap_s + 15.0
    asked = None
    while time.monotonic() < deadline:
        agent = messages.connect(arena / home.AGENT_SOCKET)
        if agent is not None:
            asked = messages.peer(agent.sock)[0]
            outcome = _ask(agent, keep, deadline)
            agent.close()
            if outcome is not None and (keep or not outcome.kept_files):  # else it was ending already and kept them
                return _said(run_dir, outcome) + elsewhere
        elif not arena.exists():
            return _nothing_runs(run_dir) + elsewhere
        elif (lock := home.take_lock(arena)) is not None:
            try:
                return _nothing_runs(run_dir) + _clear(arena, keep) + elsewhere
            finally:
                os.close(lock)
        time.sleep(0.05)  # the agent is just starting, or ended before it read our request
    holder = "the process that holds its lock" if asked is None else f"process {asked} (its trainers die with it)"
    raise RecoveryError(f"the job of {run_dir} was asked to end and has not; see {run_dir}/events, or kill {holder}")


def drop_finished(run_dir: Path, arena_root: str | os.PathLike[str]) -> None:
    """Remove the snapshots of a complete run from host memory: its agent was killed before it could."""
    arena = home.arena_of(run_dir, os.path.realpath(arena_root))
    if not (run_dir / "result.json").exists() or not arena.exists():
        return
    lock = home.take_lock(arena)
    if lock is not None:  # else an agent lives and does so itself
        try:
            _clear(arena, keep=False)
        finally:
            os.close(lock)


def _ask(agent: messages.Channel, keep: bool, deadline: float) -> messages.Ended | None:
    """The outcome that the agent reports; None if it dies without one, or the deadline passes.

    Raises:
        RecoveryError: it refuses.
    """
    agent.send(messages.Stop("launch/stop.py", 128 + signal.SIGTERM, keep=keep), timeout_s=5.0)
    while not agent.closed and time.monotonic() < deadline:
        for message in agent.wait(0.1):
            if isinstance(message, messages.Refused):
                raise RecoveryError(message.text)
            if isinstance(message, messages.Ended):
                return message
    return None


def _nothing_runs(run_dir: Path) -> str:
    return f"no job of {run_dir} runs on {os.uname().nodename}"


def _clear(arena: Path, keep: bool) -> str:
    """Kill the processes a dead job left and clear its arena; returns a report. The caller holds the arena's lock."""
    killed, gone = processes.kill_marked(arena, Limits().reap_s)
    words = ""
    if killed:
        words += f"; killed {killed} processes it had left" + (
            "" if gone else ", of which some are stuck in the kernel"
        )
    files, size_bytes = (0, 0) if keep else home.remove_snapshots(arena)
    if keep and home.snapshot_files(arena):
        words += "; its snapshots stay in host memory: the same command resumes from them (keep=false removes them)"
    if files:
        words += f"; removed its snapshots from host memory ({size_bytes / 1e6:.1f} MB)"
    home.leave_arena(arena)
    return words


def _elsewhere(term: dict[str, Any]) -> str:
    """Advice to run this command on the job's other machines too; empty for a job on one machine."""
    if term.get("world_size", 1) <= term.get("local_world_size", 1):
        return ""
    return "\nthe other machines of this job keep their snapshots in host memory: run this command on each of them too"


def _said(run_dir: Path, outcome: messages.Ended) -> str:
    words = f"the job of {run_dir} has ended: {outcome.outcome}"
    if outcome.dropped_bytes:
        words += (
            f"; its snapshots in host memory ({outcome.dropped_bytes / 1e6:.1f} MB) are removed: "
            "what is not in a checkpoint is lost"
        )
    elif outcome.kept_files:
        words += "; the same command resumes from the snapshot in host memory"
    return words
