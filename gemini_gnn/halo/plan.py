"""Which rows are asked of which rank, and in which rounds. Pure: no torch, no communication, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """Node ids by where their rows are: here or at another rank.

    Attributes:
        own: int64 ``[own]`` positions (in the ids that were split) of the nodes whose rows are here, ascending.
        own_local: int64 ``[own]`` their row within the range that is here (id - its begin).
        remote: int64 ``[remote]`` positions of all others, by owner, ascending within one owner.
        remote_ids: int64 ``[remote]`` their new ids, in that order.
        counts: int64 ``[world]`` remote ids per owner; 0 at this rank.
    """

    own: np.ndarray
    own_local: np.ndarray
    remote: np.ndarray
    remote_ids: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.own) + len(self.remote)


def check_bounds(bounds: np.ndarray) -> np.ndarray:
    """``bounds`` as int64 ``[world + 1]``.

    Raises:
        ValueError: they do not start at 0, or decrease.
    """
    bounds = np.ascontiguousarray(bounds, dtype=np.int64)
    if bounds.ndim != 1 or len(bounds) < 2 or bounds[0] != 0 or np.any(np.diff(bounds) < 0):
        raise ValueError(f"bounds: expected [world + 1] node ids that start at 0 and do not decrease; got {bounds}")
    return bounds


def owners(ids: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The rank that owns each node: int64 ``[ids]``.

    Raises:
        ValueError: an id lies outside ``0..bounds[-1]-1``.
    """
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= bounds[-1]):
        raise ValueError(f"node ids must lie in 0..{bounds[-1] - 1}; got {int(ids.min())}..{int(ids.max())}")
    # side="right" skips ranks that own nothing: of equal bounds the last one is the owner's.
    return np.searchsorted(bounds[1:], ids, side="right")


def by_owner(ids: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(order, counts)``: ``ids[order]`` is grouped by owner, in the given order within one; ids per owner [world]."""
    owner = owners(ids, bounds)
    counts = np.bincount(owner, minlength=len(bounds) - 1)
    # Sixteen bits: numpy then sorts by radix, in linear time. More ranks than that only cost time.
    narrow = owner.astype(np.uint16) if len(bounds) <= 1 << 16 else owner
    return np.argsort(narrow, kind="stable"), counts


def split(ids: np.ndarray, bounds: np.ndarray, rank: int, here: tuple[int, int] | None = None) -> Split:
    """Own and remote rows of ``ids`` (new ids, any order).

    Args:
        here: begin and end of the ids whose rows this rank reads itself; None: those that it owns.

    Raises:
        ValueError: an id outside the graph.
    """
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    begin, end = here or (int(bounds[rank]), int(bounds[rank + 1]))
    is_own = (ids >= begin) & (ids < end)
    own, remote = np.flatnonzero(is_own), np.flatnonzero(~is_own)
    far = ids[remote]
    order, counts = by_owner(far, bounds)
    return Split(own, ids[own] - begin, remote[order], far[order], counts)


@dataclass(frozen=True)
class Round:
    """One collective of an exchange.

    Attributes:
        send, receive: which entries of the buffers move (buffers are grouped by peer).
        send_counts, receive_counts: of them per peer, ``[world]``.
    """

    send: slice | np.ndarray
    receive: slice | np.ndarray
    send_counts: list[int]
    receive_counts: list[int]


def rounds(matrix: np.ndarray, rank: int, limit: int) -> Iterator[Round]:
    """The collectives that move ``matrix[i, j]`` entries from rank i to rank j, at most ``limit`` per pair in each.

    Their number is a function of the whole matrix, which every rank knows, so all ranks agree on it; a rank with
    nothing left takes part with nothing. No entries anywhere: no round.

    Args:
        matrix: int64 ``[world, world]``.
    """
    assert limit >= 1
    send, receive = matrix[rank], matrix[:, rank]
    needed = -(-int(matrix.max(initial=0)) // limit)
    if needed == 1:  # nearly always: no index arrays, no copies
        yield Round(slice(None), slice(None), send.tolist(), receive.tolist())
        return
    for index in range(needed):
        sent, send_counts = _piece(send, index * limit, limit)
        received, receive_counts = _piece(receive, index * limit, limit)
        yield Round(sent, received, send_counts, receive_counts)


def _piece(counts: np.ndarray, begin: int, limit: int) -> tuple[np.ndarray, list[int]]:
    """Entries ``begin..begin+limit-1`` of every group of a buffer grouped by ``counts``, and how many per group."""
    taken = np.clip(counts - begin, 0, limit)
    starts = np.cumsum(counts) - counts + begin
    return ranges(starts, taken), taken.tolist()


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``concatenate([arange(s, s + n) for s, n in zip(starts, lengths)])`` without a loop; int64."""
    lengths = np.asarray(lengths, dtype=np.int64)
    offsets = np.asarray(starts, dtype=np.int64) - (np.cumsum(lengths) - lengths)
    return np.repeat(offsets, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def group_sums(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Sum of ``values`` over consecutive groups of ``sizes`` (which may be 0); int64 ``[groups]``."""
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.diff(sums[np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])])


def segment_order(order: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Undo a grouping of variable-length segments.

    Args:
        order: the grouping: segment ``k`` of the received columns answers id number ``order[k]``.
        counts: int64, length of each received segment.

    Returns:
        ``(counts by id, positions)``: ``column[positions]`` holds the segments in the order of the ids.
    """
    starts = np.cumsum(counts) - counts
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    by_id = counts[inverse]
    return by_id, ranges(starts[inverse], by_id)


def limit(entry_bytes: int, chunk_bytes: int) -> int:
    """Entries of ``entry_bytes`` that one message of ``chunk_bytes`` holds; never less than one."""
    return max(1, chunk_bytes // max(1, entry_bytes))
