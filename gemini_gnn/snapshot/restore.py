"""Going on from a snapshot: which one is a decision of all ranks, and nothing is touched before every checksum fits.

0. Every rank says what lies in its machine's memory. Where steps were done and nothing fits, the job ends here, with nothing
   made or changed and the reason in words (pure: ``catalog.explain``).
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
import os
from pathlib import Path
from typing import Any

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.agree import Ranks
from gemini_gnn.snapshot.capture.shards import Shard, tensor_in
from gemini_gnn.snapshot.state import generators, tree
from gemini_gnn.snapshot.state.collect import State
from gemini_gnn.snapshot.store import arena, catalog
from gemini_gnn.snapshot.store.catalog import Holding
from gemini_gnn.snapshot.store.format import Header, Manifest, SlotState, difference
from gemini_gnn.snapshot.store.identity import Identity, from_json

log = logging.getLogger(__name__)

Opened = dict[str, tuple[Manifest, memoryview]]


def machine_of(folder: Path) -> tuple[str, str]:
    """Name of this machine, and what tells its arena from that of every other machine, whatever they are called."""
    info = folder.stat()
    return os.uname().nodename, f"{os.uname().nodename}:{info.st_dev}:{info.st_ino}"


def survey(ranks: Ranks, shards: list[Shard], folder: Path, job: str) -> list[Holding]:
    """What lies in the memory of every rank's machine, by rank, and who needs what of it. Collective; changes nothing.

    Raises:
        SnapshotError: what is there was made for another job, topology or format.
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
    """Identities by shard in ``folder``; shards of this rank are checked to be this run's."""
    mine = {shard.name: shard for shard in shards}
    files = arena.slots(folder)
    try:
        for file in files:
            if file.shard in mine:
                _check_owner(file, mine[file.shard], job)
        found = catalog.committed(file.view() for file in files)
        return {shard: sorted(identities) for shard, identities in found.items()}
    finally:
        for file in files:
            file.close()


def check_start(resume: str, steps_done: int, why: str) -> None:
    """Whether this run may begin at step 0, although there may be something to go on from. The same on all ranks.

    Raises:
        SnapshotError: it would lose steps that were done, or must go on.
    """
    if resume == "must":
        raise SnapshotError(f"resume=must, but there is no snapshot in host memory to go on from: {why}")
    if steps_done:
        raise SnapshotError(
            f"{steps_done} steps were done, but no snapshot in host memory can be gone on from: {why}. "
            "Nothing was changed. resume=never starts again from step 0"
        )


def choose(ranks: Ranks, shards: list[Shard], holdings: list[Holding]) -> tuple[Identity | None, Opened, str]:
    """The snapshot to go on from, verified. Collective.

    Args:
        holdings: what :func:`survey` found.

    Returns:
        The identity (None: there is none), the manifests and bytes of this rank's shards, and in words what was found.
    """
    found = [rank.usable() for rank in holdings]
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
    return None, {}, "; ".join(notes) or "there is no complete one"


def _check_owner(file: arena.SlotFile, shard: Shard, job: str) -> None:
    """Refuse what cannot be this job's, with the difference named."""
    h = file.header()
    if h is None or h.state is not SlotState.COMMITTED:
        return
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
