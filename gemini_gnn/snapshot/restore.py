"""Restoring a snapshot: all ranks choose it together, and change nothing before every checksum fits.

0. Every rank lists the snapshots in its machine's memory. If steps were done and no snapshot fits, the job ends here, with
   nothing made or changed and the reason in words (pure: ``catalog.explain``).
1. The ranks choose the newest identity under which every rank finds all the shards it needs (pure: ``catalog.restorable``).
2. Every rank pins and verifies its slots of that identity: structure, then checksums. If one rank's bytes are damaged, all
   refuse the identity together and go back to 1. Where shards have copies on other machines, the rank voids its slot instead
   and all end with ``DamagedSnapshot``: the agents fetch a good copy, and no step is lost.
3. All ranks void newer slots before they compute anything from the chosen one.
4. Every rank puts the state back in the proved order: masters and moments, low-precision weights (collective under ZeRO),
   buffers, scheduler, parameter groups, counters, the user's extra state, random generators last.

A kill between 2 and 3, or within 3, leaves the chosen snapshot committed on all ranks.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from gemini_gnn.errors import DamagedSnapshot, SnapshotError
from gemini_gnn.snapshot.agree import Ranks
from gemini_gnn.snapshot.capture.shards import Shard, tensor_in
from gemini_gnn.snapshot.state import generators, tree
from gemini_gnn.snapshot.state.collect import TrainingState
from gemini_gnn.snapshot.store import arena, catalog
from gemini_gnn.snapshot.store.catalog import Holding
from gemini_gnn.snapshot.store.format import Header, Manifest, SlotState, difference
from gemini_gnn.snapshot.store.identity import Identity, from_json

log = logging.getLogger(__name__)

Opened = dict[str, tuple[Manifest, memoryview]]


def machine_of(folder: Path) -> tuple[str, str]:
    """Name of this machine, and a string that only its arena has, even if two machines have one name."""
    info = folder.stat()
    return os.uname().nodename, f"{os.uname().nodename}:{info.st_dev}:{info.st_ino}"


def survey(ranks: Ranks, shards: list[Shard], folder: Path, job: str) -> list[Holding]:
    """By rank, the snapshots in its machine's memory and the shards it needs. Collective; changes nothing.

    Raises:
        SnapshotError: a snapshot is of another job, structure or format.
    """
    held = ranks.together(lambda: _committed(shards, folder, job))
    said = ranks.exchange([*machine_of(folder), [s.name for s in shards], held])
    places = {(name, place) for name, place, _, _ in said}
    names = [name for name, _ in places]
    return [
        Holding(
            name if names.count(name) == 1 else place,
            tuple(needed),
            {shard: {from_json(i) for i in found} for shard, found in held.items()},
        )
        for name, place, needed, held in said
    ]


def _committed(shards: list[Shard], folder: Path, job: str) -> dict[str, list[Identity]]:
    """Identities by shard in ``folder``; shards of this rank are checked to be this run's, all to have this format."""
    mine = {shard.name: shard for shard in shards}
    files = arena.slots(folder)
    try:
        for file in files:
            header = file.header()
            if header is not None and header.state is SlotState.COMMITTED and file.shard in mine:
                _check_owner(file, header, mine[file.shard], job)
        found = catalog.committed(file.view() for file in files)
        return {shard: sorted(identities) for shard, identities in found.items()}
    finally:
        for file in files:
            file.close()


def check_start(resume: str, steps_done: int, why: str) -> None:
    """Whether this run, which has no snapshot to restore, may begin at step 0. The same on all ranks.

    Raises:
        SnapshotError: it would lose steps that were done, or the user said ``resume=must``.
    """
    if resume == "must":
        raise SnapshotError(f"resume=must, but no snapshot in host memory can be restored: {why}")
    if steps_done:
        raise SnapshotError(
            f"{steps_done} steps were done, but no snapshot in host memory can be restored: {why}. "
            "Nothing was changed. resume=never starts again from step 0"
        )


def choose(
    ranks: Ranks, shards: list[Shard], holdings: list[Holding], replicas: int = 1
) -> tuple[Identity | None, Opened, str]:
    """The snapshot to restore, verified. Collective.

    Args:
        holdings: from :func:`survey`.

    Returns:
        The identity or None, the manifests and bytes of this rank's shards, and the result in words.

    Raises:
        DamagedSnapshot: on all ranks. The damaged slot is void, and another machine has a copy.
    """
    found = [rank.usable() for rank in holdings]
    refused: set[Identity] = set()
    notes: list[str] = []
    while (identity := catalog.restorable(found, refused)) is not None:
        opened, damage = _open(shards, identity, void=replicas > 1)
        complaints = ranks.exchange(damage)
        if not any(complaints):
            return identity, opened, "; ".join([*notes, f"restored {identity} from host memory"])
        _unpin(shards)
        if replicas > 1:
            where = "; ".join(f"rank {r} on {c}" for r, c in enumerate(complaints) if c)
            raise DamagedSnapshot(
                f"snapshot {identity} cannot be restored from memory: {where}. What is damaged is void now, and the next "
                "generation fetches a good copy from another machine"
            )
        refused.add(identity)
        notes += [f"{identity} is damaged on rank {r} on {c}" for r, c in enumerate(complaints) if c]
        log.warning("%s", notes[-1])
    return None, {}, "; ".join(notes) or "there is none that all ranks can be restored from"


def _check_owner(file: arena.SlotFile, h: Header, shard: Shard, job: str) -> None:
    """Refuse a snapshot that cannot be this job's, and name the difference."""
    if h.job != job or h.shard != shard.name:
        raise SnapshotError(
            f"{file.path}: expected shard {shard.name} of job {job}; got shard {h.shard} of job {h.job}: "
            "files of another job were copied here; remove them or start again with resume=never"
        )
    if h.structure != shard.fingerprint:
        raise SnapshotError(
            f"snapshot {h.identity} in {file.path} does not fit this run: {_difference(file, h, shard)}; "
            "start with the settings it was taken with, or start again with resume=never"
        )


def _difference(file: arena.SlotFile, header: Header, shard: Shard) -> str:
    try:
        manifest, _ = file.manifest(header)
    except SnapshotError as error:
        return f"its structure differs, and it cannot be read either ({error})"
    return difference(manifest.structure, shard.structure)


def _open(shards: list[Shard], identity: Identity, void: bool) -> tuple[Opened, str]:
    """Pin and verify this rank's slots of ``identity``; also the fault found and the machine, or "". ``void`` damaged ones."""
    machine = os.uname().nodename
    opened: Opened = {}
    for shard in shards:
        for file in shard.files:
            h = file.header()
            if h is None or h.state is not SlotState.COMMITTED or h.identity != identity:
                continue
            if not file.lock(exclusive=False):
                return {}, f"{machine}: {file.path} is being written"
            try:
                opened[shard.name] = file.manifest(h)
            except SnapshotError as error:
                if void:
                    file.void()
                return {}, f"{machine}: {error}"
            break
        else:
            return {}, f"{machine}: shard {shard.name} is no longer there"
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


def apply(state: TrainingState, shards: list[Shard], opened: Opened) -> None:
    """Put the state back and unpin the slots. Collective under ZeRO.

    Raises:
        SnapshotError: the engine has already stepped, or the snapshot lacks a tensor.
    """
    if not state.fresh():
        raise SnapshotError(
            "expected a fresh engine to restore into; this one has already taken a step: call attach() before training"
        )
    values: dict[str, Any] = {}
    for late in (False, True):
        for shard in shards:
            manifest, raw = opened[shard.name]
            where = {s.name: o for s, o in zip(manifest.layout.specs, manifest.layout.offsets, strict=True)}
            for entry in shard.entries:
                if entry.at_once is late:
                    offset = where.get(entry.spec.name)
                    entry.put(None if offset is None else tensor_in(raw, offset, entry.spec))
            if manifest.tree is not None:
                values = tree.unpack(manifest.tree, manifest.arrays)
        if not late:
            state.derive()
    state.load_values(values)
    generators.load(values["rng"])
    opened.clear()
    _unpin(shards)
