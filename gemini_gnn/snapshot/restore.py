"""Going on from a snapshot: which one is a decision of all ranks, and nothing is touched before every checksum fits.

1. Every rank says under which identities all the shards it needs are committed here; the newest common one is chosen
   (pure: ``catalog.restorable``).
2. Every rank pins and verifies its slots of that identity: topology, then checksums. If one rank's bytes are damaged, all
   refuse the identity together and go back to 1.
3. Newer slots are voided, on all ranks, before anything is computed from the chosen one.
4. The state is put back in the proved order: masters and moments, what is derived from them (collective under ZeRO), buffers,
   scheduler, parameter groups, counters, the user's extra state, random generators last.

A kill between 2 and 3, or within 3, leaves the chosen snapshot committed on all ranks.
"""

from __future__ import annotations

import logging
from typing import Any

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.agree import Ranks
from gemini_gnn.snapshot.capture.shards import Shard, tensor_in
from gemini_gnn.snapshot.state import generators, tree
from gemini_gnn.snapshot.state.collect import State
from gemini_gnn.snapshot.store import arena, catalog
from gemini_gnn.snapshot.store.format import Header, Manifest, SlotState, difference
from gemini_gnn.snapshot.store.identity import Identity, from_json

log = logging.getLogger(__name__)

Opened = dict[str, tuple[Manifest, memoryview]]


def choose(ranks: Ranks, shards: list[Shard], job: str) -> tuple[Identity | None, Opened, str]:
    """The snapshot to go on from, verified. Collective.

    Returns:
        The identity (None: there is none), the manifests and bytes of this rank's shards, and in words what was found.

    Raises:
        SnapshotError: what is there was made for another job, topology or format.
    """
    names = [s.name for s in shards]
    ranks.together(lambda: _check_owner(shards, job))
    mine = catalog.usable([v for s in shards for v in s.views()], names)
    said = ranks.exchange([list(i) for i in sorted(mine)])
    found = [{from_json(i) for i in identities} for identities in said]
    refused: set[Identity] = set()
    notes: list[str] = []
    while (identity := catalog.restorable(found, refused)) is not None:
        opened, damage = _open(shards, identity)
        complaints = ranks.exchange(damage)
        if not any(complaints):
            return identity, opened, "; ".join([*notes, f"restored {identity} from host memory"])
        _unpin(shards)
        refused.add(identity)
        notes += [f"{identity} is damaged on rank {r}: {c}" for r, c in enumerate(complaints) if c]
        log.warning("%s", notes[-1])
    reason = catalog.explain(dict(enumerate(found)))
    if any(found) and not notes and ranks.rank == 0:
        log.warning("there are snapshots in host memory, but none that all ranks can go on from: %s", reason)
    return None, {}, "; ".join(notes) if notes else reason


def _check_owner(shards: list[Shard], job: str) -> None:
    """Refuse what cannot be this job's, with the difference named."""
    for shard in shards:
        for file in shard.files:
            h = file.header()
            if h is None or h.state is not SlotState.COMMITTED:
                continue
            if h.job != job or h.shard != shard.name:
                raise SnapshotError(
                    f"{file.path}: expected shard {shard.name} of job {job}; got shard {h.shard} of job {h.job}: "
                    "files of another job were copied here; remove them or start afresh with resume=never"
                )
            if h.topology != shard.fingerprint:
                raise SnapshotError(
                    f"snapshot {h.identity} in {file.path} does not fit this run: {_difference(file, h, shard)}; "
                    "go on with the settings it was taken with, or start afresh with resume=never"
                )


def _difference(file: arena.SlotFile, header: Header, shard: Shard) -> str:
    try:
        manifest, _ = file.manifest(header)
    except SnapshotError as error:
        return f"its topology is another one, and it cannot be read either ({error})"
    return difference(manifest.topology, shard.topology)


def _open(shards: list[Shard], identity: Identity) -> tuple[Opened, str]:
    """Pin and verify this rank's slots of ``identity``; what is wrong with them, or ""."""
    opened: Opened = {}
    for shard in shards:
        for file in shard.files:
            h = file.header()
            if h is None or h.state is not SlotState.COMMITTED or h.identity != identity:
                continue
            if not file.lock(exclusive=False):
                return {}, f"{file.path} is being written"
            try:
                opened[shard.name] = file.manifest(h)
            except SnapshotError as error:
                return {}, str(error)
            break
        else:
            return {}, f"shard {shard.name} is not there any more"
    return opened, ""


def _unpin(shards: list[Shard]) -> None:
    for shard in shards:
        for file in shard.files:
            file.unlock()


def void_newer(shards: list[Shard], identity: Identity | None) -> None:
    """Roll this rank's own slots back to ``identity`` (None: to nothing)."""
    for shard in shards:
        if shard.owned:
            for file in shard.files:
                if identity is None or catalog.newer([file.view()], identity):
                    file.void()


def apply(state: State, shards: list[Shard], opened: Opened, extra_state: Any) -> None:
    """Put the state back and let go of the slots. Collective under ZeRO.

    Raises:
        SnapshotError: the engine has already stepped, or the snapshot holds state that this run has no place for.
    """
    if not state.fresh():
        raise SnapshotError(
            "expected a fresh engine to restore into; this one has already taken a step: call attach() before training"
        )
    numbers: dict[str, Any] = {}
    for late in (False, True):
        for shard in shards:
            manifest, raw = opened[shard.name]
            where = {s.name: o for s, o in zip(manifest.layout.specs, manifest.layout.offsets, strict=True)}
            for entry in shard.entries:
                if entry.at_once is late:
                    offset = where.get(entry.spec.name)
                    entry.put(None if offset is None else tensor_in(raw, offset, entry.spec))
            if manifest.tree is not None:
                numbers = tree.unpack(manifest.tree, manifest.arrays)
        if not late:
            state.derive()
    state.load_numbers(numbers)
    if extra_state is not None:
        if "extra_state" not in numbers:
            raise SnapshotError("the snapshot was taken without extra_state; start afresh with resume=never")
        extra_state.load_state_dict(numbers["extra_state"])
    generators.load(numbers["rng"])
    opened.clear()
    _unpin(shards)
