"""Comparing the common state of all ranks from time to time.

Common state is what all data-parallel ranks hold identically: parameters and moments, where ZeRO does not shard them.

At every ``VERIFY_EVERY``-th capture each rank has the checksum of its common tensors. The rank that writes them for its
machine has it for the header; the others compute it from their own tensors, in the copying thread. When all ranks agree on
the next capture, every rank has committed that one, so they exchange the checksums then. All ranks count the same captures,
so they agree whether this small collective takes place.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemini_gnn.errors import SnapshotError

VERIFY_EVERY = 64  # captures between two comparisons


def check(checksums: Sequence[str], step: int) -> None:
    """``checksums``: of the common tensors after ``step``, by rank. Pure.

    Raises:
        SnapshotError: a rank differs from most ranks, or if there is no majority from the first.
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
