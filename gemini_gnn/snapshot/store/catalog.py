"""Choosing the snapshot that a job can be restored from, and the slot that may be written next. Pure.

Invariants kept here (each is a property test):

- Shards are combined only under one identity.
- A slot is overwritten only when a newer snapshot is recoverable for the whole job and no process pins the slot.
- Rolling back voids everything newer, so that a step computed again can never be mixed with its first computation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gemini_gnn.snapshot.store.format import SlotState
from gemini_gnn.snapshot.store.identity import Identity

OWN_SLOTS = 3  # one recoverable, one being written, one being sent or restored from
FOREIGN_SLOTS = 2  # of a shard kept for another machine: the recoverable one, and the one that arrives
MOST_LACKING = 8  # shards named in a message


@dataclass(frozen=True)
class SlotView:
    """One slot, as the catalog sees it.

    Attributes:
        shard, slot: name of the shard, and number of the slot.
        state: of its header; VOID where there is no valid header.
        identity: of the snapshot it holds or held.
        pinned: another process reads it (restoring, inspecting).
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


def restorable(ranks: Sequence[Collection[Identity]], refused: Collection[Identity] = ()) -> Identity | None:
    """The newest identity that every rank can be restored from, or None.

    Args:
        ranks: per rank of the job, :meth:`Holding.usable`.
        refused: identities whose bytes turned out damaged on some rank.
    """
    if not ranks:
        return None
    return max(set(ranks[0]).intersection(*ranks[1:]) - set(refused), default=None)


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
            s.state is not SlotState.COMMITTED  # empty, or a copy that was cut off
            or s.identity is None
            or (recoverable is not None and s.identity < recoverable)
        )
    ]
    if not free:
        return None
    # Empty slots first, then the oldest: an older snapshot is still a second chance if the newest is damaged.
    return min(free, key=lambda s: (s.state is SlotState.COMMITTED, s.identity or Identity(0, 0, 0), s.slot)).slot


def newer(slots: Iterable[SlotView], identity: Identity | None) -> list[SlotView]:
    """The slots that a roll-back to ``identity`` (None: to nothing) has to void: all but void, older and equal ones."""
    return [
        s
        for s in slots
        if s.state is not SlotState.VOID and (identity is None or s.identity is None or s.identity > identity)
    ]


@dataclass(frozen=True)
class Holding:
    """One rank's view before anything is restored.

    Attributes:
        machine: on which the rank runs; ranks of one machine say the same, ranks of two machines never.
        needed: shards the rank must be restored from.
        held: identities under which each shard is committed in that machine's memory, also those of other ranks.
    """

    machine: str
    needed: tuple[str, ...]
    held: Mapping[str, Collection[Identity]]

    def usable(self) -> set[Identity]:
        """Identities this rank could be restored from."""
        return set.intersection(*(set(self.held.get(shard, ())) for shard in self.needed))

    def lacks(self, identity: Identity) -> list[str]:
        """The needed shards that are not in this machine's memory under ``identity``."""
        return [shard for shard in self.needed if identity not in self.held.get(shard, ())]


def steps_in_memory(ranks: Sequence[Holding]) -> int:
    """The newest step of any snapshot on any machine."""
    return max((i.step for rank in ranks for found in rank.held.values() for i in found), default=0)


def explain(ranks: Sequence[Holding]) -> str:
    """Say which shards of the newest snapshot the ranks lack, and which machines hold these."""
    identity = max((i for rank in ranks for found in rank.held.values() for i in found), default=None)
    if identity is None:
        return "the memory of this job's machines holds no snapshot (it is lost when a machine restarts or is replaced)"
    lacking = [
        f"rank {r} on {rank.machine} lacks shard {shard}, which is on {_holders(ranks, shard, identity)}"
        for r, rank in enumerate(ranks)
        for shard in rank.lacks(identity)
    ]
    more = f"; and {len(lacking) - MOST_LACKING} more" if len(lacking) > MOST_LACKING else ""
    return f"of snapshot {identity} {'; '.join(lacking[:MOST_LACKING])}{more}"


def _holders(ranks: Sequence[Holding], shard: str, identity: Identity) -> str:
    machines = dict.fromkeys(rank.machine for rank in ranks if identity in rank.held.get(shard, ()))
    return " and ".join(machines) or "no machine of this job"
