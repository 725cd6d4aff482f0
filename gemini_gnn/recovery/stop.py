"""Ask a job to end in order, from another process, on any machine that sees its run directory."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from gemini_gnn.errors import RecoveryError
from gemini_gnn.observe import terms
from gemini_gnn.observe.status import ENDED, read_status
from gemini_gnn.recovery import home, messages, processes, visits
from gemini_gnn.recovery.root import state as root
from gemini_gnn.recovery.worker.decisions import Limits

KEEP = "keep their snapshots in host memory"


def stop(run_dir: Path, *, keep: bool = True, arena_root: str | os.PathLike[str] | None = None) -> str:
    """Ask the job to end on all its machines, and wait until it has. Returns a report for people.

    The worker agent of this machine is asked, which asks the root. Without one here the root is asked itself, if the job has
    several machines.

    Args:
        keep: leave the snapshots in host memory, so that the same command resumes from them. Otherwise remove them, also
            those of a job that no longer runs.
        arena_root: folder of the arenas; default the one in the job's newest term, else /dev/shm.

    Raises:
        RecoveryError: the job does not end in time, runs where this machine cannot reach it, or is another user's; or its
            agent is of another version.
    """
    run_dir = Path(os.path.realpath(run_dir))
    term = terms.newest_term(run_dir)
    arena = home.arena_of(run_dir, arena_root or term.get("arena_root", "/dev/shm"))
    deadline = time.monotonic() + root.Limits().stop_s + root.Limits().end_s + Limits().reap_s + 15.0
    request = messages.Stop("launch/stop.py", 128 + signal.SIGTERM, keep=keep)
    asked, root_asked, silent = None, False, ""
    while time.monotonic() < deadline:
        agent = messages.connect(arena / home.AGENT_SOCKET)
        if agent is not None:
            asked = messages.peer(agent.sock)[0]
            agent.send(request, timeout_s=5.0)
            outcome = visits.wait_for(agent, messages.Ended, deadline)
            agent.close()
            if outcome is not None and (keep or not outcome.kept_files):  # else it was ending already and kept them
                return _said(run_dir, outcome, keep)
        elif "port" in term and not root_asked:
            answer, root_asked = visits.ask_root(run_dir, term, request, messages.Ended, deadline), True
            if isinstance(answer, messages.Ended):
                return _said(run_dir, answer, keep)
            silent = answer
        elif not arena.exists():
            return _nothing_runs(run_dir, term, keep, silent)
        elif (lock := home.take_lock(arena)) is not None:
            try:
                return _nothing_runs(run_dir, term, keep, silent, _clear(arena, keep))
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


def _nothing_runs(run_dir: Path, term: dict[str, Any], keep: bool, silent: str, cleared: str | None = None) -> str:
    """
    Args:
        silent: why the root agent, on another machine, did not answer; empty if it was not asked.
        cleared: what was done here; None: this machine has nothing of the job.

    Raises:
        RecoveryError: it seems to run elsewhere, and this command has changed nothing.
    """
    machine = os.uname().nodename
    words = f"no job of {run_dir} runs on {machine}{cleared or ''}"
    runs = read_status(run_dir).get("state", "done") not in ENDED
    if runs and (silent or visits.is_away(term)):
        elsewhere = f"{visits.news(run_dir)}. If it runs, type this command on {term['machine']}"
        if silent:
            words += f"\nits root agent, on {term['machine']}, does not answer: {silent}"
        if cleared is None:
            raise RecoveryError(f"{words}; {elsewhere}")
        words += f"\n{elsewhere}"
    if not keep and term.get("world_size", 1) > term.get("local_world_size", 1):
        words += f"\nthe other machines of this job {KEEP}: run this command on each of them too"
    elif not keep and visits.is_away(term):
        words += f"\n{term['machine']}, where the job was, may hold its snapshots: run this command there"
    return words


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


def _said(run_dir: Path, outcome: messages.Ended, keep: bool) -> str:
    words = f"the job of {run_dir} has ended: {outcome.outcome}"
    if outcome.dropped_bytes:
        words += (
            f"; its snapshots in host memory ({outcome.dropped_bytes / 1e6:.1f} MB) are removed: "
            "what is not in a checkpoint is lost"
        )
    elif outcome.kept_files:
        words += "; the same command resumes from the snapshot in host memory"
    if outcome.away and not keep:
        words += f"\n{', '.join(outcome.away)} did not hear of it and {KEEP}: run this command there too"
    return words
