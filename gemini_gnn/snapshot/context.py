"""A trainer's rank, arena and membership: the process that starts it installs them, ``attach`` reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.store.identity import Identity


def _nobody_looks(*_: int) -> None:
    pass


def _none() -> Identity | None:
    return None


def _never() -> int:
    return 0


@dataclass(frozen=True)
class Context:
    """The trainer's side of its job.

    Attributes:
        job: short id of the job (a hash of its run directory), the name of its arena folder.
        arena: ``/dev/shm/gemini-gnn-<uid>/<job>``, mode 0700, made by the worker agent.
        rank, world_size, local_rank, local_world_size: as in ``cluster.Place``.
        term, generation: of the membership this trainer was started for.
        resume: "auto" | "never" | "must".
        attaching, restored, stepped, committed: what ``attach`` and its snapshots tell the process that started this one,
            so that it sees a script go on: it attaches; it begins with so many steps done; it has done a step; its snapshot
            of a term, generation and step is committed (said in another thread) or restored.
        replicas: copies of each shard in the job, this rank's own included.
        kept: ranks whose shards this machine keeps for other machines.
        recoverable: with several replicas, the newest snapshot of which every shard has its copies; None: not yet one.
        persist_at: the first snapshot of this step or a later one is to be held until this is 0 again.
        hold: tells which snapshot is held.
    """

    job: str
    arena: Path
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    term: int
    generation: int
    resume: str = "auto"
    attaching: Callable[[], None] = _nobody_looks
    restored: Callable[[int], None] = _nobody_looks
    stepped: Callable[[int], None] = _nobody_looks
    committed: Callable[[int, int, int], None] = _nobody_looks
    replicas: int = 1
    kept: tuple[int, ...] = ()
    recoverable: Callable[[], Identity | None] = _none
    persist_at: Callable[[], int] = _never
    hold: Callable[[int, int, int], None] = _nobody_looks


_installed: Context | None = None


def install(context: Context | None) -> None:
    global _installed
    _installed = context


def installed() -> Context | None:
    """The installed context; None in a process that no worker agent started."""
    return _installed


def current() -> Context:
    """The installed context.

    Raises:
        SnapshotError: this process was not started by a worker agent.
    """
    if _installed is None:
        raise SnapshotError(
            "expected a worker agent; this process has none, and snapshots in host memory would die with it. "
            "Start the script with `python -m gemini_gnn.run SCRIPT ...` (under any launcher), or use snapshot=none"
        )
    return _installed
