"""The cost of snapshots, counted as they are taken."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """The cost of snapshots since ``attach``.

    Attributes:
        captures, skipped: agreed captures, and steps at which some rank was not ready.
        stall_s: time that the training thread lost: taking values and buffers, and waiting at the fence.
        fence_s: the latter alone.
        copy_s, seal_s: background time of copying, and of checksums and commit.
        bytes: copied by this rank.
    """

    captures: int = 0
    skipped: int = 0
    stall_s: float = 0.0
    fence_s: float = 0.0
    copy_s: float = 0.0
    seal_s: float = 0.0
    bytes: int = 0
