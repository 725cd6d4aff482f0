"""Comparing what all ranks ought to hold identically, from time to time.

At every ``VERIFY_EVERY``-th capture each rank has the checksum of its replicated tensors: who writes them for its machine has
it for the header, the others compute it from their own tensors, in the copying thread. When the next capture is agreed upon,
every rank has committed that one, so all of them exchange the checksums then. How many captures there were is the same on
all ranks, and with it whether this small collective takes place.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemini_gnn.errors import SnapshotError

VERIFY_EVERY = 64  # captures between two comparisons


def check(checksums: Sequence[str], step: int) -> None:
    """``checksums``: of the replicated tensors after ``step``, by rank. Pure.

    Raises:
        SnapshotError: a rank holds something else than most ranks; among equally many, than the first.
    """
    usual = max(checksums, key=lambda c: (checksums.count(c), -checksums.index(c)))
    same = [rank for rank, checksum in enumerate(checksums) if checksum == usual]
    others = [rank for rank, checksum in enumerate(checksums) if checksum != usual]
    if others:
        raise SnapshotError(
            f"expected all ranks to hold the same parameters and moments after step {step}, as data-parallel ranks do; "
            f"{_ranks(others)} and {_ranks(same)} differ. A rank has skipped an update or computes nondeterministically: "
            "fix that, or the job cannot be restored"
        )


def _ranks(ranks: list[int], most: int = 8) -> str:
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:most]))}{more}"
