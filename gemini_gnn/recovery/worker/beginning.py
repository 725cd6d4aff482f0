"""How an agent begins a job, once its first slot process has described it: what a dead agent left, the term, the root.

All of it happens before the agent joins a root, so nobody waits for its beats. It may take a while: processes that a dead
agent left are killed first, and a start on another machine than the last one watches whether that one still lives.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemini_gnn.config import seats_of
from gemini_gnn.errors import RunDirError
from gemini_gnn.files import local_file_system
from gemini_gnn.observe import terms, votes
from gemini_gnn.observe.failures import read_failures
from gemini_gnn.observe.status import ENDED, read_status
from gemini_gnn.recovery import home, messages, processes
from gemini_gnn.recovery.outcome import Outcome
from gemini_gnn.recovery.root import state as job
from gemini_gnn.recovery.root.faults import Faults
from gemini_gnn.recovery.root.ledger import Ledger
from gemini_gnn.recovery.root.restoring import Storage
from gemini_gnn.recovery.root.service import Root
from gemini_gnn.recovery.worker import persister
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.recovery.worker.uplink import Lost
from gemini_gnn.snapshot import persist
from gemini_gnn.snapshot.store import locks

ROOT_LIMITS = job.Limits()


def record_of(arena: Path, request: messages.Register) -> dict[str, Any]:
    """Of this process, kept with the terms that it claims."""
    place, machine = request.place, os.uname().nodename
    owner = f"the worker agent on {machine}, pid {os.getpid()}, with its snapshots in {arena.parent}"
    claim: dict[str, Any] = {"owner": owner, "launch": request.launch, "world_size": place.world_size}
    claim |= {"local_world_size": place.local_world_size, "arena_root": os.fspath(arena.parent.parent)}
    return claim | {"code": request.code}


def take_run_dir(
    run_dir: Path, arena: Path, request: messages.Register, start: str, journal: Journal, say: Callable[[str], None]
) -> terms.Beats | None:
    """Claim the job's next term for this agent; its number goes into the journal. None if the work is done already: the agent
    before us died while it cleaned up, and a script must not begin again.

    Raises:
        RunDirError: another start has the run directory.
    """
    place, before, status = request.place, terms.newest_term(run_dir), read_status(run_dir)
    if request.deaths > 0 and status.get("state") == "done" and status.get("term") == before.get("term"):
        journal.term = before.get("term", 0)  # claim none: the next agent must also see that the work is done
        return None
    claim = record_of(arena, request) | {"start": start}
    if place.machines > 1:
        private = votes.private(run_dir)
        if private is not None:
            voters = len(private.voters)
            say(
                f"each machine has a run directory of its own: while {voters // 2 + 1} of {voters} live, the job survives the "
                "others; results are on every machine that trains, checkpoints on none (or give snapshot.folder)"
            )
            claim |= {"voters": list(private.voters)}
        elif kind := local_file_system(run_dir, Path("/proc/self/mountinfo").read_text()):
            here = os.uname().nodename
            say(
                f"run_dir is on {kind} of {here}: if {here} is lost, so are losses and checkpoints, and the job cannot go on. "
                "Give a run_dir=... on a file system that all machines share, or make one on each: `python "
                "launch/hosts.py private HOSTFILE run_dir=...`"
            )
        claim |= {"address": place.master_addr, "port": place.master_port, "root": 0}
        claim |= {"seats": list(range(seats_of(request.recovery, request.place.machines)))}
    journal.term = terms.claim_term(run_dir, claim, say=say)
    beats = terms.Beats(run_dir, journal.term)
    journal.speaks_for_job = True
    journal.log("started", pid=os.getpid(), arena=os.fspath(arena), command=request.command)
    return beats


def limits_of(request: messages.Register) -> job.Limits:
    settings = request.recovery
    return replace(
        ROOT_LIMITS,
        join_s=settings.wait_s if request.deaths else request.start_timeout_s,
        wait_s=settings.wait_s,
        return_s=settings.return_s,
        same_step_failures=settings.same_step_failures,
    )


def make_root(
    run_dir: Path,
    arena: Path,
    request: messages.Register,
    start: str,
    beats: terms.Beats | None,
    address: str,
    token: bytes,
    listener: socket.socket | None,
    journal: Journal,
    selector: selectors.BaseSelector,
    private: votes.Private | None,
) -> Root:
    """The first root agent of a start, with the term that the journal names.

    Args:
        private: of this machine's run directory, if it shares none.
        beats: of that term; None: the work is done, and the root only tells the other machines so.

    Raises:
        ConfigError: the faults of the settings do not fit the job.
    """
    place, now = request.place, time.monotonic()
    standbys = request.recovery.standby_machines
    state = job.forming(place.machines, place.local_world_size, limits_of(request), request.deaths, standbys=standbys)
    state = replace(state, root=place.rank // place.local_world_size)
    if beats is None:
        state = replace(state, phase=job.Phase.ENDED, outcome=Outcome("done", 0, "done", keep=False))
    root = Root(
        term=journal.term,
        start=start,
        beats=beats,
        state=state,
        settings=request.recovery,
        resume=request.resume,
        launched=(place.world_size, place.local_world_size),
        record=record_of(arena, request),
        address=address,
        token=token,
        listener=listener,
        ledger=_ledger(run_dir, request, journal.term, now),
        journal=journal,
        faults=Faults(request.faults, state.world, run_dir, journal),
        snapshot=request.snapshot,
        storage=_storage(run_dir, request),
        selector=selector,
        now=now,
        voters=private.voters if private else (),
    )
    if beats is not None:
        journal.status(**root.status(now))
    return root


def succeed_root(
    run_dir: Path,
    arena: Path,
    request: messages.Register,
    start: str,
    roster: messages.Roster,
    machine: int,
    reached: int,
    lost: Lost,
    token: bytes,
    listener: socket.socket,
    journal: Journal,
    selector: selectors.BaseSelector,
) -> Root:
    """A root agent that takes over from the one that the roster names. It holds no term yet.

    Args:
        roster: of the newest term that this machine knows of.
        machine: number of this one. reached: the step that its trainers were in.
    """
    place, now = request.place, time.monotonic()
    name = roster.members[roster.root].name or f"machine {roster.root + 1}"
    words = f"the root agent on {name} is gone ({lost.why})"
    cause = job.Cause("silent" if lost.silent else "agent", words, machine=roster.root)
    state = job.succeeding(
        [one.name for one in roster.members],
        roster.seats,
        place.local_world_size,
        limits_of(request),
        root=machine,
        lost=roster.root if lost.silent and roster.root != machine else None,
        generation=roster.generation,
        reached=reached,
        cause=cause,
        now=now,
    )
    ledger = Ledger(roster.term, [], None)
    ledger.root_died(name, lost.heard_s, now, reached, roster.generation, now, time.time())
    return Root(
        term=roster.term,
        start=start,
        beats=None,
        state=state,
        settings=request.recovery,
        resume=request.resume if roster.generation == 0 else "auto",
        launched=(place.world_size, place.local_world_size),
        record=record_of(arena, request),
        address=roster.members[machine].address,
        token=token,
        listener=listener,
        ledger=ledger,
        journal=journal,
        faults=Faults(request.faults, state.world, run_dir, journal),
        snapshot=request.snapshot,
        storage=Storage.AT_ONCE,  # what memory still has may be older than the last checkpoint
        selector=selector,
        now=now,
        members=roster.members,
        voters=roster.record.get("voters", ()),
    )


def ended_elsewhere(record: dict[str, Any], status: dict[str, Any], start: str) -> Outcome | None:
    """How this start of the job has ended without this machine, as the run directory says; None: it has not.

    Args:
        record: of the newest term. status: the newest.
    """
    ended = start and record.get("start") == start and status.get("term") == record.get("term")
    if not ended or status.get("state") not in ENDED:
        return None
    state, done = status["state"], status["state"] == "done"
    return Outcome(state, status.get("exit_code", 1), status.get("reason") or state, keep=not done)


def roster_of(run_dir: Path, request: messages.Register) -> tuple[messages.Roster, dict[str, Any]]:
    """For an agent that takes the place of a dead one: what the last root knew, and the record of its term."""
    record, status = terms.newest_term(run_dir), read_status(run_dir)
    seats = record.get("seats") or list(range(seats_of(request.recovery, request.place.machines)))
    members = [
        messages.Member(one.get("machine") or "", one.get("address") or "", one.get("port") or 0)
        for one in status.get("machines", [])
    ]
    nobody = messages.Member("", "", 0)
    members += [nobody] * (request.place.machines - len(members))
    return messages.Roster(record.get("term", 0), members, seats, record.get("root", 0), request.deaths, record), record


def newest_roster(roster: messages.Roster, record: dict[str, Any]) -> messages.Roster:
    """``roster``, or that of a newer term, whose ``record`` says the seats. Who trained last is known only for the newest term:
    machines of an older one prove nothing about it."""
    if record.get("term", 0) <= roster.term or "seats" not in record:
        return roster
    names, unknown = record.get("names", []), messages.Member("", "", 0)
    added = [replace(unknown, name=name) for name in names[len(roster.members) :]]
    return replace(
        roster,
        term=record["term"],
        members=[*roster.members, *added],
        seats=record["seats"],
        root=record["root"],
        record=record,
    )


def checkpoint_folder(run_dir: Path, request: messages.Register) -> Path:
    folder = request.snapshot.folder
    return Path(request.folder, folder) if folder else run_dir / "checkpoints"


def _storage(run_dir: Path, request: messages.Register) -> Storage:
    """When the root looks at checkpoints before its first generation."""
    there = checkpoint_folder(run_dir, request).is_dir()
    if request.deaths:
        return Storage.IF_NEEDED if there else Storage.NEVER
    return Storage.AT_ONCE if there and request.resume != "never" else Storage.NEVER


def _ledger(run_dir: Path, request: messages.Register, term: int, now: float) -> Ledger:
    """With the failures of earlier terms, unless this start begins at step 0."""
    if request.deaths == 0 and request.resume == "never":
        return Ledger(term, [], None)
    failures, status, began_s = read_failures(run_dir), read_status(run_dir), None
    if status.get("began_s") is not None and (failures or request.deaths):
        # How long ago the first step began, as the last root said, and how long ago that was.
        began_s = now - status["began_s"] - (time.time() - status["time"])
    ledger = Ledger(term, failures, began_s)
    if request.deaths:
        step = status.get("step") or 0
        died_s = request.died_s
        ledger.root_died(os.uname().nodename, died_s, died_s, step, request.deaths, now, time.time())
    return ledger


def kill_leftovers(arena: Path, journal: Journal, patience_s: float, spare: Collection[int]) -> int | None:
    """Kill the processes of the last term, which may not write any more. Returns the pid of a trainer that stays.

    Args:
        spare: pids of this agent's own.
    """
    deadline = time.monotonic() + patience_s
    killed, gone = processes.kill_marked(arena, patience_s, spare)
    if killed:
        journal.log("leftovers_killed", processes=killed, gone=gone)
    while (pid := locks.living_trainer(arena)) is not None and time.monotonic() < deadline:
        time.sleep(0.005)
    return pid


def clear(run_dir: Path, arena: Path, request: messages.Register, journal: Journal) -> None:
    """Remove snapshots, in memory and in storage, that this job must not resume from. No trainer of an earlier term lives.

    Raises:
        RecoveryError, RunDirError, SnapshotError: the snapshots are another run's; the arena, the run directory or the folder
            of the checkpoints refuses.
    """
    run, place = terms.run_id(run_dir), request.place
    if request.resume == "never" and place.rank < place.local_world_size:  # one machine does it for all
        _forget_checkpoints(run_dir, arena, request)
    several = place.local_world_size < place.world_size
    reason = home.why_forget(arena, run, request.resume, several)
    if reason and home.snapshot_files(arena):
        _, size_bytes = home.remove_snapshots(arena)
        journal.log("snapshots_removed", bytes=size_bytes, reason=reason)
    home.assign(arena, run)


def _forget_checkpoints(run_dir: Path, arena: Path, request: messages.Register) -> None:
    """Before anything begins: later a failure might go back to one of them, or a late helper forget a new one."""
    folder = checkpoint_folder(run_dir, request)
    storage = persister.storage_of(arena, run_dir, folder, request.snapshot.persist_keep, home.job_id(run_dir))
    try:
        if not storage.inside:
            persist.check_ours(folder, storage.job)
        persist.forget(folder)
    except OSError as error:
        raise RunDirError(
            f"resume=never: cannot forget the checkpoints in {folder}: {error.strerror} ({error.filename}). Remove them, or "
            "give another folder (snapshot.folder)"
        ) from error
