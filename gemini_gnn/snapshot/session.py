"""From an engine to its snapshots: plan, agree, reserve, restore or take the first one."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import context, restore
from gemini_gnn.snapshot.agree import Ranks, connect
from gemini_gnn.snapshot.capture.shards import REPLICATED, Shard, live_pieces, make_shard, shard_of
from gemini_gnn.snapshot.capture.snapshots import Snapshots
from gemini_gnn.snapshot.state.collect import State, collect, is_deepspeed
from gemini_gnn.snapshot.store import arena, catalog
from gemini_gnn.snapshot.store.identity import Identity

log = logging.getLogger(__name__)


def attach(
    engine: Any,
    extra_state: Any = None,
    *,
    context: context.Context | None = None,
    every: int = 1,
    agree: Callable[[bool], bool] | None = None,
    group: Any = None,
    hook: bool = True,
    timeout_s: float = 120.0,
    steps_done: int = 0,
) -> Snapshots:
    """See :func:`gemini_gnn.snapshot.attach`."""
    here = context if context is not None else _installed()
    if every < 1:
        raise SnapshotError(f"every: expected at least 1 step; got {every}")
    if extra_state is not None and not (hasattr(extra_state, "state_dict") and hasattr(extra_state, "load_state_dict")):
        raise SnapshotError(
            f"extra_state: expected an object with state_dict() and load_state_dict(); got {type(extra_state).__name__}"
        )
    ranks = connect(group, here.rank, here.world_size, timeout_s)
    here = _one_term(ranks, here)
    state = ranks.together(lambda: collect(engine))
    _unlink_buffer(here.rank)
    shards = _plan(ranks, state, here, extra_state is not None)
    folder = arena.make_folder(here.arena)
    holdings: list[catalog.Holding] = []
    if (
        here.resume != "never"
    ):  # before anything is made: room for shards of other ranks would be in the way of the right start
        holdings = restore.survey(ranks, shards, folder, here.job)
        steps_done = max(ranks.exchange(steps_done)) or catalog.steps_in_memory(holdings)
        if catalog.restorable([rank.usable() for rank in holdings]) is None:
            restore.check_start(here.resume, steps_done, catalog.explain(holdings))
    _open(ranks, shards, here, folder)
    snapshots = Snapshots(
        state,
        shards,
        extra_state,
        ranks,
        job=here.job,
        rank=here.rank,
        term=here.term,
        generation=here.generation,
        every=every,
        timeout_s=timeout_s,
        stepped=here.stepped,
    )
    try:
        _begin(ranks, snapshots, state, shards, extra_state, here, holdings, steps_done)
    except BaseException:
        snapshots.close()
        raise
    snapshots.warm()
    if hook:
        _hook(engine, snapshots, agree or ranks.all_true)
    return snapshots


def _unlink_buffer(rank: int) -> None:
    """Take the name off the 69 MB that DeepSpeed's all-reduce on CPUs shares between ranks: a kill would leave them.

    Every rank has opened those of the others when it has an engine, and nobody opens them later.
    """
    meeting = f"{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{meeting}_{rank}").unlink(missing_ok=True)


def _one_term(ranks: Ranks, here: context.Context) -> context.Context:
    """The newest (term, generation) of any machine, for all: shards are combined only under one identity.

    Each machine's agent claims terms of its own; until there is one root agent the ranks agree here. Agreed values never
    go back: each rank's own are at most the maximum.
    """
    term, generation = max(tuple(said) for said in ranks.exchange([here.term, here.generation]))
    return dataclasses.replace(here, term=term, generation=generation)


def _installed() -> context.Context:
    return context.current()


def _plan(ranks: Ranks, state: State, here: context.Context, extra: bool) -> list[Shard]:
    """The shards of this rank. What all ranks hold identically is one shard per machine, written by its first rank."""
    large = [e for e in state.entries if not e.at_once]
    small = [e for e in state.entries if e.at_once]
    mine = arena.checksum(live_pieces(large)).hex() if not state.sharded else None
    checksums = ranks.exchange(mine)
    if not state.sharded and len(set(checksums)) == 1:
        owner = here.local_rank == 0
        return [
            make_shard(shard_of(here.rank), small, state, here.world_size, owned=True, extra_state=extra),
            make_shard(REPLICATED, large, state, here.world_size, owned=owner, extra_state=extra),
        ]
    if not state.sharded:
        log.warning("the ranks start with different parameters: each keeps a snapshot of its own")
    return [make_shard(shard_of(here.rank), large + small, state, here.world_size, owned=True, extra_state=extra)]


def _open(ranks: Ranks, shards: list[Shard], here: context.Context, folder: Path) -> None:
    """Reserve all room of this machine, after looking whether it is there."""
    _, machine = restore.machine_of(folder)
    # Measured on all ranks before any of them allocates: nobody goes on from the exchange before all have spoken.
    where = arena.room(folder)
    needed = more = 0
    for shard in shards:
        if shard.owned:
            for slot in range(catalog.OWN_SLOTS):
                path = folder / f"{shard.name}.{slot}"
                have = path.stat().st_blocks * 512 if path.exists() else 0
                needed += shard.layout.file_bytes
                more += max(0, shard.layout.file_bytes - have)
    said = ranks.exchange([machine, needed, more, where.available])
    here_said = [s[1:] for s in said if s[0] == machine]
    all_needed, total = sum(s[0] for s in here_said), sum(s[1] for s in here_said)
    available = min(s[2] for s in here_said)
    where = arena.Room(available, where.limit, where.remedy)
    ranks.together(lambda: arena.check_room(total, where))
    if here.local_rank == 0:
        log.info(
            "snapshots: %.1f MB of host memory needed on this machine, %.1f MB of it not allocated yet, %.1f MB available",
            all_needed / 1e6,
            total / 1e6,
            available / 1e6,
        )
    for owned in (True, False):  # owners make the files that the others open
        ranks.together(functools.partial(_open_all, [s for s in shards if s.owned is owned], folder))


def _open_all(shards: list[Shard], folder: Path) -> None:
    for shard in shards:
        shard.open(folder)


def _begin(
    ranks: Ranks,
    snapshots: Snapshots,
    state: State,
    shards: list[Shard],
    extra_state: Any,
    here: context.Context,
    holdings: list[catalog.Holding],
    steps_done: int,
) -> None:
    identity: Identity | None = None
    opened: restore.Opened = {}
    note = "resume=never"
    if here.resume != "never":
        identity, opened, note = restore.choose(ranks, shards, holdings)
        if identity is None:
            restore.check_start(here.resume, steps_done, note)
    if identity is not None and (here.term, here.generation) < identity[:2]:
        raise SnapshotError(
            f"this process was started for term {here.term}, generation {here.generation}; the newest snapshot "
            f"{identity} is of a later one: another worker agent runs this job, or its arena was copied"
        )
    ranks.together(lambda: restore.void_newer(shards, identity))
    if here.rank == 0:
        log.info("snapshots: %s", note)
    if identity is not None:
        ranks.together(lambda: restore.apply(state, shards, opened, extra_state))
        snapshots.went_on_from(identity)
        return
    # A first snapshot before the first step: from here on there is always one to go on from.
    if not ranks.all_true(snapshots.ready()):
        raise SnapshotError(
            "no free slot for the first snapshot: something else reads this arena; end it and try again"
        )
    snapshots.after_step(0, capture=True)
    ranks.together(snapshots.wait)
    snapshots.recoverable = snapshots.last


def _hook(engine: Any, snapshots: Snapshots, agree: Callable[[bool], bool]) -> None:
    """Let fence, step, capture-or-skip and capture happen by themselves within the engine's step."""
    if is_deepspeed(engine):
        original = engine.step

        @functools.wraps(original)
        def engine_step(*args: Any, **kwargs: Any) -> Any:
            before = engine.global_steps
            snapshots.before_step()  # costs nothing on a step that only accumulates: there the copy is long done
            result = original(*args, **kwargs)
            if engine.global_steps != before:
                _capture(snapshots, agree, engine.global_steps)
            return result

        engine.step = engine_step
        snapshots.on_close(lambda: engine.__dict__.pop("step", None))
        return
    optimizer, scheduler = engine[1], engine[2] if len(engine) == 3 else None

    def stepped(*_: Any) -> None:
        snapshots.steps += 1
        _capture(snapshots, agree, snapshots.steps)

    fence = optimizer.register_step_pre_hook(lambda *_: snapshots.before_step())
    snapshots.on_close(fence.remove)
    if scheduler is None:
        snapshots.on_close(optimizer.register_step_post_hook(stepped).remove)
        return
    # With a scheduler that is what changes last. It has no hooks, and an attribute of the instance would become a part of
    # its state_dict(): so it gets a class of its own.
    kind = type(scheduler)

    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.step(self, *args, **kwargs)
        stepped()

    scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})
    snapshots.on_close(lambda: setattr(scheduler, "__class__", kind))


def _capture(snapshots: Snapshots, agree: Callable[[bool], bool], step: int) -> None:
    if snapshots.wants(step):
        snapshots.after_step(step, agree(snapshots.ready()))
