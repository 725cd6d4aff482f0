"""Noticing a tensor that changes while it is copied in the background.

The training thread notes the versions when the capture begins, the copying thread when the bytes are copied and before the
fence opens: a difference means that the copy may be half old and half new.
"""

from __future__ import annotations

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.identity import Identity
from gemini_gnn.snapshot.shards import Shard

Versions = dict[str, tuple[int, int]]


def versions(shards: list[Shard]) -> Versions:
    """How often autograd saw each background-copied tensor change in place, and where it lies. What is changed in place
    through ``.data`` is not counted by torch.
    """
    return {
        e.spec.name: (0 if t.is_inference() else t._version, t.data_ptr())
        for s in shards
        for e in s.entries
        if not e.at_once and (t := e.get()) is not None
    }


def check_unchanged(before: Versions, after: Versions, identity: Identity) -> None:
    """
    Raises:
        SnapshotError: a tensor was changed while it was copied.
    """
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name):
            raise SnapshotError(
                f"{name} was changed while it was copied into snapshot {identity}, which is void therefore; call "
                "snapshots.before_step() before changing parameters between steps"
            )
