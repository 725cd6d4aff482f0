"""The persister: writes snapshots from memory to checkpoints on storage, and reads them back, one order after the other.

It is a process of its own (``python -P -m gemini_gnn.recovery.worker.persister``). A file system that hangs hangs only this
process; its agent may kill it at any instant and start another one (snapshot/persist.py says what a kill leaves). What goes
wrong is an answer, never an end of this process: a full disk, a missing permission, a slot that was overwritten.

It dies with its agent. It writes into the arena only for an order to load. While it carries one out it holds the trainers'
lock: no other agent begins a membership before it is gone. Storage that hangs while a checkpoint is written stops no next
start: it pins one slot, the one it copies.

It runs at the lowest priority, for cores and for disks. What it has written leaves the page cache at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gemini_gnn.errors import SnapshotError
from gemini_gnn.recovery import messages, processes
from gemini_gnn.snapshot import persist
from gemini_gnn.snapshot.store import locks

BEAT_S = 1.0  # from one Alive to the next, while a checkpoint is loaded


@dataclass(frozen=True)
class Storage:
    """Where this job's snapshots and checkpoints are.

    Attributes:
        arena: of the snapshots. terms: of the job. folder: of the checkpoints. keep: so many complete ones.
        job: the name of the arena.
        inside: the folder is in the run directory. It is this job's, even if the directory had another path before, and
            so another job.
    """

    arena: Path
    terms: Path
    folder: Path
    keep: int
    job: str
    inside: bool


def storage_of(arena: Path, run_dir: Path, folder: Path, keep: int, job: str) -> Storage:
    inside = Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(run_dir))
    return Storage(arena, run_dir / "terms", folder, keep, job, inside)


def _nobody() -> None:
    pass


def obey(order: messages.Message, storage: Storage, moved: Callable[[], None] = _nobody) -> messages.Message:
    """Carry an order out; the answer to it. ``moved``: is called for each piece of a checkpoint that was loaded."""
    if isinstance(order, messages.Persist):
        problem = _problem(storage, lambda: persist.write(storage.arena, storage.folder, order.identity, order.shards))
        return messages.Persisted(order.identity, problem)
    if isinstance(order, messages.Complete):
        keep = storage.keep
        if order.term and (storage.terms / f"{order.term + 1}.json").exists():
            return messages.Completed(
                order.identity, f"refused: a newer root than that of term {order.term} has the job"
            )
        problem = _problem(storage, lambda: persist.complete(storage.folder, order.identity, order.shards, keep))
        return messages.Completed(order.identity, problem)
    if isinstance(order, messages.ListCheckpoints):
        return _list(storage)
    assert isinstance(order, messages.Load)
    return messages.Fetched(order.attempt, _load(order, storage, moved))


def _problem(storage: Storage, call: Callable[[], Any]) -> str:
    try:
        if not storage.inside:
            persist.check_ours(storage.folder, storage.job)
        call()
    except (SnapshotError, OSError) as error:
        return str(error)
    return ""


def _list(storage: Storage) -> messages.Checkpoints:
    found: list[tuple[persist.Mark, Path]] = []
    problem = _problem(storage, lambda: found.extend(persist.complete_checkpoints(storage.folder)))
    return messages.Checkpoints([mark.identity for mark, _ in found], [list(mark.shards) for mark, _ in found], problem)


def _load(order: messages.Load, storage: Storage, moved: Callable[[], None]) -> list[messages.Miss]:
    paths: dict[Any, Path] = {}
    problem = _problem(
        storage, lambda: paths.update({m.identity: p for m, p in persist.complete_checkpoints(storage.folder)})
    )
    path = paths.get(order.identity)
    misses = []
    for shard in order.shards:
        damaged, why = False, problem
        if path is None:
            why = why or f"expected a complete checkpoint {order.identity} in {storage.folder}; there is none"
        else:
            try:
                persist.load(path, storage.arena, order.identity, shard, storage.job, moved)
                continue
            except (SnapshotError, OSError) as error:
                damaged, why = isinstance(error, persist.DamagedError), str(error)
        misses.append(messages.Miss(shard, order.identity, os.fspath(path or storage.folder), damaged, why))
    return misses


def lower_priority() -> None:
    """Below all others for cores and, where the kernel's scheduler of disks knows priorities, for disks."""
    os.nice(19)
    with suppress(OSError, psutil.Error):  # not everywhere permitted
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arena", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoints")
    parser.add_argument("--keep", type=int, required=True, help="so many complete checkpoints")
    parser.add_argument("--job", required=True)
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socket to the agent")
    options = parser.parse_args()
    processes.die_with_parent(os.getppid())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the agent decides
    processes.name_this("gnn-persister")
    lower_priority()
    storage = storage_of(options.arena, options.run_dir, options.folder, options.keep, options.job)
    agent = messages.Channel(socket.socket(fileno=options.channel), messages.TO_PERSISTER)
    beat_s = time.monotonic()

    def moved() -> None:
        nonlocal beat_s
        if time.monotonic() - beat_s > BEAT_S:
            beat_s = time.monotonic()
            agent.send(messages.Alive(), timeout_s=10.0)

    while not agent.closed:
        for order in agent.wait(3600.0):
            lock = locks.hold_trainers_lock(options.arena) if isinstance(order, messages.Load) else None
            answer = obey(order, storage, moved)
            if lock is not None:
                os.close(lock)
            agent.send(answer, timeout_s=10.0)


if __name__ == "__main__":
    main()
