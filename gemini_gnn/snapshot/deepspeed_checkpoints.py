"""The baseline that snapshots in memory are compared with: DeepSpeed's own checkpoints in a shared folder every n steps.

Ownership. All ranks call ``save`` and ``load_latest`` together. All ranks write a folder ``step-000000300`` and force it to
storage. It counts only with its file COMPLETE, which rank 0 writes last; so a kill anywhere leaves the checkpoint before it.
Rank 0 then removes all but the newest two.

DeepSpeed keeps masters, moments, scheduler and counters. A bit-identical resume needs more, so each rank writes beside them,
without pickle: its buffers, parameter groups, random generators, ``extra_state``.

DeepSpeed reads its checkpoints with ``torch.load(weights_only=False)``, which runs any code in a changed file. While this
module loads, the engine reads with ``weights_only=True`` and a list of the four DeepSpeed classes that its optimizer states
contain. Enumerations are written by value, so that it can: Python 3.11.0 to 3.11.3 would write them as a call of
``getattr``, which no safe reader allows.
"""

from __future__ import annotations

import copyreg
import enum
import importlib
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from gemini_gnn.errors import SnapshotError
from gemini_gnn.files import sync, write_atomically
from gemini_gnn.snapshot.agree import Ranks, connect
from gemini_gnn.snapshot.capture.shards import structure_of
from gemini_gnn.snapshot.capture.stats import Stats
from gemini_gnn.snapshot.persist import COMPLETE, tag_of
from gemini_gnn.snapshot.state import generators, tree
from gemini_gnn.snapshot.state.collect import TrainingState, collect, is_deepspeed
from gemini_gnn.snapshot.store import format
from gemini_gnn.snapshot.store.identity import Identity, shard_of

KEEP = 2
_SAFE = (
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
)


def complete_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder`` that count, ascending. The mark of a checkpoint of snapshot=memory is not empty."""
    marks = (p for p in folder.glob(f"step-*/{COMPLETE}") if not p.stat().st_size)
    found = (re.fullmatch(r"step-(\d{9})", p.parent.name) for p in marks)
    return sorted(int(m[1]) for m in found if m)


def save(engine: Any, extra_state: Any, folder: Path, step: int, ranks: Ranks) -> None:
    """Write the checkpoint of ``step``; on return it is complete on storage. Collective.

    Raises:
        SnapshotError: the folder cannot be written.
    """
    tag = tag_of(step)
    here = folder / tag
    ranks.together(lambda: _begin(here) if ranks.rank == 0 else None)
    ranks.together(lambda: _write(engine, extra_state, folder, tag, ranks.rank))
    ranks.together(lambda: _end(folder, tag) if ranks.rank == 0 else None)


def _end(folder: Path, tag: str) -> None:
    """Mark the checkpoint COMPLETE, then remove old ones."""
    write_atomically(folder / tag / COMPLETE, b"", mode=0o600)
    sync(folder)
    sync(folder.parent)
    for old in complete_steps(folder)[:-KEEP]:
        (folder / tag_of(old) / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder / tag_of(old), ignore_errors=True)


def _begin(here: Path) -> None:
    """Remove an incomplete checkpoint of this step, or one that was rolled back.

    Raises:
        SnapshotError: it is of another kind.
    """
    if (here / COMPLETE).exists() and (here / COMPLETE).stat().st_size:
        raise SnapshotError(
            f"{here}: expected no checkpoint, or one of snapshot=nfs; it is one of snapshot=memory. "
            "Give another folder (snapshot.folder)"
        )
    if here.exists():
        (here / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(here)


def _write(engine: Any, extra_state: Any, folder: Path, tag: str, rank: int) -> None:
    here = folder / tag
    try:
        here.mkdir(parents=True, exist_ok=True, mode=0o700)
        with writing_plainly():
            engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        state = collect(engine, extra_state)
        values = state.values()
        values["rng"] = generators.values(generators.read())
        values["buffers"] = {e.spec.name: e.get() for e in state.entries if e.at_once}
        packed, arrays = tree.pack(values)
        body = format.encode_tail(format.layout_json(format.plan([]), [], _structure(state)), packed, arrays)
        write_atomically(here / f"{shard_of(rank)}.state", xxhash.xxh3_128_digest(body) + body, mode=0o600)
        for path in here.glob("*.pt"):
            sync(path)
        sync(here)
    except OSError as error:
        raise SnapshotError(f"cannot write the checkpoint {here}: {error.strerror}; check snapshot.folder") from error


def _structure(state: TrainingState) -> dict[str, Any]:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return structure_of(state, world, format.plan(e.spec for e in state.entries))


def load_latest(engine: Any, extra_state: Any, folder: Path, ranks: Ranks) -> int | None:
    """Put the newest complete checkpoint that every rank can see into a fresh engine; its step, or None. Collective.

    Raises:
        SnapshotError: it has another structure, is damaged, or the engine has stepped.
    """
    seen = ranks.exchange(complete_steps(folder) if folder.is_dir() else [])
    seen_by_all = set(seen[0]).intersection(*seen[1:])
    if not seen_by_all:
        return None
    step = max(seen_by_all)
    state = ranks.together(lambda: collect(engine, extra_state))
    values = ranks.together(lambda: _read(folder / tag_of(step) / f"{shard_of(ranks.rank)}.state", state))
    with reading_safely(engine):
        loaded, _ = engine.load_checkpoint(str(folder), tag=tag_of(step))
    if loaded is None:
        raise SnapshotError(
            f"DeepSpeed could not load {folder / tag_of(step)}; remove it to resume from the one before"
        )
    for entry in state.entries:
        if entry.at_once:
            entry.put(values["buffers"][entry.spec.name])
    state.load_values(values)
    generators.load(values["rng"])
    return step


def _read(path: Path, state: TrainingState) -> dict[str, Any]:
    if not state.fresh():
        raise SnapshotError(
            "expected a fresh engine to restore into; this one has taken a step: attach before training"
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SnapshotError(
            f"cannot read {path}: {error.strerror}; start with the number of ranks that wrote it, or with resume=never"
        ) from error
    if xxhash.xxh3_128_digest(raw[16:]) != raw[:16]:
        raise SnapshotError(f"{path} does not fit its checksum; remove its folder to resume from the one before")
    manifest = format.decode_tail(memoryview(raw)[16:], format.PAGE)
    if words := format.difference(manifest.structure, _structure(state)):
        raise SnapshotError(f"the checkpoint {path.parent} does not fit this run: {words}; use resume=never")
    return tree.unpack(manifest.tree, manifest.arrays)


def _safe_classes() -> list[type]:
    return [getattr(importlib.import_module(module), name) for module, name in _SAFE]


@contextmanager
def writing_plainly() -> Iterator[None]:
    """Have every version of Python pickle an enumeration as its class and value."""
    enumerations = [one for one in _safe_classes() if issubclass(one, enum.Enum)]
    for one in enumerations:
        copyreg.pickle(one, lambda member: (type(member), (member.value,)))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for one in enumerations:
            del copyreg.dispatch_table[one]


@contextmanager
def reading_safely(engine: Any) -> Iterator[None]:
    """Let the engine read tensors, containers and four known classes, and no code."""
    safe = _safe_classes()
    reader = engine.checkpoint_engine

    def load(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location=map_location, weights_only=True)

    reader.load = load
    try:
        yield
    finally:
        del reader.load


class Checkpoints:
    """The same calls as :class:`capture.snapshots.Snapshots`, for ``snapshot=nfs``; made by :func:`attach`.

    Attributes:
        restored: identity of the checkpoint that training resumed from (term and generation 0), or None.
        stats: ``stall_s`` is the time of all saves: none of it is hidden.
    """

    def __init__(self, engine: Any, extra_state: Any, folder: Path, every: int, ranks: Ranks):
        self._engine, self._extra, self._folder, self._every, self._ranks = engine, extra_state, folder, every, ranks
        self.restored: Identity | None = None
        self.stats = Stats()
        self._saved: int | None = None

    def ready(self) -> bool:
        return True

    def before_step(self) -> None:
        pass

    def after_step(self, step: int, capture: bool) -> None:
        """Save after every ``every`` steps, on all ranks, whatever ``capture`` is."""
        if step % self._every == 0:
            self._save(step)

    def final(self, step: int) -> None:
        """At an orderly stop that all ranks agreed on: save ``step``, if the newest checkpoint has another. Collective.

        Raises:
            SnapshotError: as for :func:`save`.
        """
        if not self._ranks.all_true(self._saved == step):
            self._save(step)

    def _save(self, step: int) -> None:
        begin = time.perf_counter()
        save(self._engine, self._extra, self._folder, step, self._ranks)
        self.stats.stall_s += time.perf_counter() - begin
        self.stats.captures += 1
        self._saved = step

    def close(self) -> None:
        pass


def attach(
    engine: Any,
    extra_state: Any,
    folder: str | Path,
    *,
    every: int = 100,
    resume: str = "auto",
    group: Any = None,
    timeout_s: float = 120.0,
    steps_done: int = 0,
) -> Checkpoints:
    """Restore the newest complete checkpoint in ``folder``, then save one every ``every`` steps. Collective.

    Args:
        engine: a DeepSpeed engine. extra_state: as for ``snapshot.attach``.
        resume: "auto" | "never" (older checkpoints no longer count) | "must".
        steps_done: steps that the caller's own records name, on any rank.

    Raises:
        SnapshotError: not a DeepSpeed engine; there is no checkpoint, with ``must`` or although ``every`` steps were done;
            or as for :func:`load_latest`.
    """
    if not is_deepspeed(engine):
        raise SnapshotError(f"snapshot=nfs: expected a DeepSpeed engine; got {type(engine).__name__}")
    distributed = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    world = torch.distributed.get_world_size() if distributed else 1
    ranks = connect(group, rank, world, timeout_s)
    checkpoints = Checkpoints(engine, extra_state, Path(folder), every, ranks)
    if resume == "never":
        ranks.together(lambda: _forget(Path(folder)) if rank == 0 else None)
        return checkpoints
    step = load_latest(engine, extra_state, Path(folder), ranks)
    if step is None and resume == "must":
        raise SnapshotError(f"resume=must, but there is no complete checkpoint in {folder}; check snapshot.folder")
    if step is None and (done := max(ranks.exchange(steps_done))) >= every:
        raise SnapshotError(
            f"{done} steps were done, but there is no complete checkpoint in {folder}. Nothing was changed. Give the folder "
            "they were saved in, which all machines must see (snapshot.folder); resume=never starts again from step 0"
        )
    if step is not None:
        checkpoints.restored, checkpoints._saved = Identity(0, 0, step), step
    return checkpoints


def _forget(folder: Path) -> None:
    for step in complete_steps(folder):
        (folder / tag_of(step) / COMPLETE).unlink(missing_ok=True)
