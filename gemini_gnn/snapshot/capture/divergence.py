"""Comparing what all ranks ought to hold identically, from time to time.

One rank of the machine writes the replicated shard; every other one computes, in its copying thread, the checksum of its own
tensors at the same step, and compares it with the header that the writer commits. Nothing is sent: the header is the message.
The writer may commit later than the others look, so an expectation is kept until a header of that identity or of a newer one
appears; a slot that was already overwritten by a newer one is not compared (the next comparison is at most ``VERIFY_EVERY``
captures away).
"""

from __future__ import annotations

from typing import NamedTuple

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.capture.shards import Shard, live_pieces
from gemini_gnn.snapshot.store import arena
from gemini_gnn.snapshot.store.format import SlotState
from gemini_gnn.snapshot.store.identity import Identity

VERIFY_EVERY = 64  # captures between two comparisons


class Expected(NamedTuple):
    """What the writer's header under ``identity`` must say."""

    identity: Identity
    data_checksum: bytes


def expect(shard: Shard, identity: Identity) -> Expected:
    """The checksum of this rank's live tensors, as the writer of ``shard`` will compute it from the slot."""
    return Expected(identity, arena.checksum(live_pieces(shard.entries)))


def compare(shard: Shard, expected: Expected, rank: int) -> bool:
    """Whether the writer has spoken; False: ask again later.

    Raises:
        SnapshotError: this rank holds something else than the writer.
    """
    headers = [h for f in shard.files if (h := f.header()) is not None and h.state is SlotState.COMMITTED]
    for h in headers:
        if h.identity == expected.identity and h.data_checksum != expected.data_checksum:
            raise SnapshotError(
                f"expected rank {rank} and rank {h.owner} to hold the same parameters and moments after step "
                f"{h.identity.step}, as data-parallel ranks do; they differ. A rank has skipped an update or computes "
                "nondeterministically: fix that, or the job cannot be restored"
            )
    return any(h.identity >= expected.identity for h in headers)
