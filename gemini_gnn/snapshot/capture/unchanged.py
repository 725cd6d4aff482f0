"""Noticing a tensor that changes while it is copied in the background.

The training thread reads the versions when the capture begins. The copying thread reads them when it has copied the bytes,
before the fence opens; a difference means that the copy may be half old and half new. Training pays for the first reading,
for every tensor at every capture: no names, no copies.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.state.collect import Entry
from gemini_gnn.snapshot.store.identity import Identity

Version = tuple[int, int] | None


def version(entry: Entry) -> Version:
    """How often autograd saw the tensor change in place, and its address; None while it does not exist. Torch does not
    count writes through ``.data``.
    """
    tensor = entry.get()
    if tensor is None:
        return None
    try:
        return tensor._version, tensor.data_ptr()
    except RuntimeError:  # an inference tensor: it has no version
        return 0, tensor.data_ptr()


def versions(entries: Sequence[Entry]) -> list[Version]:
    return [version(e) for e in entries]


def check_unchanged(
    entries: Sequence[Entry], before: Sequence[Version], after: Sequence[Version], identity: Identity
) -> None:
    """
    Raises:
        SnapshotError: a tensor was changed while it was copied.
    """
    for entry, then, now in zip(entries, before, after, strict=True):
        if then != now:
            raise SnapshotError(
                f"{entry.spec.name} was changed while it was copied into snapshot {identity}, so that one is void; "
                "call snapshots.before_step() before changing parameters between steps"
            )
