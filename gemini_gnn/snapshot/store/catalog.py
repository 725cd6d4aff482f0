"""Which snapshots there are, which one a job can go on from, and which slot may be written next. Pure.

Invariants kept here (each is a property test):

- Shards are combined only under one identity.
- A slot is overwritten only when a newer snapshot is recoverable for the whole job and nobody pins the slot.
- Rolling back voids everything newer, so that a step computed again can never be mixed with its first computation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gemini_gnn.snapshot.store.format import SlotState
from gemini_gnn.snapshot.store.identity import Identity

OWN_SLOTS = 3  # one recoverable, one being written, one being sent or restored from


@dataclass(frozen=True)
class SlotView:
    """What the catalog must know of one slot.

    Attributes:
        shard, slot: which.
        state: as its header says; VOID where there is no believable header.
        identity: of the snapshot it holds or held.
        pinned: somebody reads it (replication until the peer's acknowledgement, persisting, restoring).
    """

    shard: str
    slot: int
    state: SlotState = SlotState.VOID
    identity: Identity | None = None
    pinned: bool = False


def committed(slots: Iterable[SlotView]) -> dict[str, set[Identity]]:
    """Identities each shard is committed under."""
    found: dict[str, set[Identity]] = {}
    for s in slots:
        found.setdefault(s.shard, set())
        if s.state is SlotState.COMMITTED and s.identity is not None:
            found[s.shard].add(s.identity)
    return found


def usable(slots: Iterable[SlotView], needed: Collection[str]) -> set[Identity]:
    """Identities under which every shard in ``needed`` is committed: what a rank could be restored from."""
    found = committed(slots)
    sets = [found.get(shard, set()) for shard in needed]
    return set.intersection(*sets) if sets else set()


def restorable(ranks: Sequence[Collection[Identity]], refused: Collection[Identity] = ()) -> Identity | None:
    """The newest identity that every rank can be restored from, or None.

    Args:
        ranks: per rank of the job, :func:`usable`.
        refused: identities whose bytes turned out damaged on some rank.
    """
    if not ranks:
        return None
    common = set(ranks[0]).intersection(*ranks[1:]) - set(refused)
    return max(common, default=None)


def writable(slots: Sequence[SlotView], recoverable: Identity | None) -> int | None:
    """The slot of one shard that the next snapshot may be written to, or None: then it is skipped.

    Args:
        slots: all slots of that shard.
        recoverable: newest snapshot known to be committed by every shard of the job.
    """
    free = [
        s
        for s in slots
        if not s.pinned
        and (
            s.state is not SlotState.COMMITTED  # nothing, or a copy that was cut off
            or s.identity is None
            or (recoverable is not None and s.identity < recoverable)
        )
    ]
    if not free:
        return None
    # What holds nothing first, then the oldest: an older snapshot is still a second chance if the newest is damaged.
    return min(free, key=lambda s: (s.state is SlotState.COMMITTED, s.identity or Identity(0, 0, 0), s.slot)).slot


def newer(slots: Iterable[SlotView], identity: Identity | None) -> list[SlotView]:
    """What a roll-back to ``identity`` (None: to nothing) has to void: everything that could still be believed and is
    not it or older.
    """
    return [
        s
        for s in slots
        if s.state is not SlotState.VOID and (identity is None or s.identity is None or s.identity > identity)
    ]


def explain(ranks: Mapping[int, Collection[Identity]]) -> str:
    """Why nothing is restorable, for a log line."""
    without = [rank for rank, found in sorted(ranks.items()) if not found]
    has = "; ".join(
        f"rank {rank}: {', '.join(str(i) for i in sorted(found))}" for rank, found in sorted(ranks.items()) if found
    )
    if without:
        return f"no committed snapshot in memory for ranks {without}" + (f"; there is {has}" if has else "")
    return f"the ranks hold no snapshot in common: {has}"
