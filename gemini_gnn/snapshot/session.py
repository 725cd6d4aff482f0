"""From an engine to its snapshots: plan, agree, reserve room, then restore a snapshot or take the first one."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import restore
from gemini_gnn.snapshot.agree import Ranks, connect
from gemini_gnn.snapshot.capture.shards import Shard, live_pieces, make_shard
from gemini_gnn.snapshot.capture.snapshots import Snapshots
from gemini_gnn.snapshot.context import Context, current
from gemini_gnn.snapshot.state.collect import TrainingState, collect, is_deepspeed
from gemini_gnn.snapshot.store import arena, catalog
from gemini_gnn.snapshot.store.identity import COMMON, Identity, shard_of

log = logging.getLogger(__name__)


def attach(
    engine: Any,
    extra_state: Any = None,
    *,
    context: Context | None = None,
    every: int | str = 1,
    mtbf_s: float = 86400.0,
    agree: Callable[[bool], bool] | None = None,
    group: Any = None,
    hook: bool = True,
    timeout_s: float = 120.0,
    steps_done: int = 0,
) -> Snapshots:
    """Restore the newest snapshot in host memory, or take the first one; then take one after each step.

    Call it once, on every rank, after the engine is built and before its first step. Collective.

    A snapshot holds the state at the moment a step *returns*: parameters, moments, buffers, scheduler, counters, random
    generators and ``extra_state``. Its ``state_dict()`` is called at the end of the captured step, so update your own
    counters ("step s is done") before you call ``step``.

    Parameters are copied while the next forward and backward run, so nothing else may change them between two steps.
    Code that does (clipping weights after the step, a momentum encoder updated in forward) first calls ``before_step()``
    of the returned object, which waits until they are copied. Without that call the snapshot is not committed and the
    next call raises SnapshotError. Torch does not count writes through ``.data``, so these are not noticed.

    Args:
        engine: a DeepSpeed engine (ZeRO 0-3, fp32 or bf16), or ``(module, optimizer)`` or ``(module, optimizer,
            scheduler)`` of plain PyTorch. With a scheduler, a step ends when ``scheduler.step()`` returns.
        extra_state: an object with ``state_dict()`` and ``load_state_dict(dict)``: JSON values, numpy arrays, tensors.
            Small: it is copied while training waits.
        context: rank, arena and term of this process. Default: the one that the worker agent installed.
        every: steps between snapshots; "auto": so much time between them that least is lost, by what they are seen to cost
            and by ``mtbf_s``.
        mtbf_s: from one failure of the job to the next on average, as expected for "auto".
        agree: minimum of a bit over all ranks; default: one small all_reduce.
        group: a gloo group of all ranks for the agreements; made here where it is None.
        hook: wrap the engine's ``step`` (or the optimizer's and scheduler's), so that the loop calls nothing else.
            ``False``: the caller calls ``before_step``, ``ready`` and ``after_step`` itself.
        timeout_s: of the agreements and of every wait.
        steps_done: steps that the caller's own records name, on any rank. If these or a snapshot name any, and no
            snapshot can be restored, only ``resume=never`` starts the run again.

    Returns:
        The snapshots of this rank; ``.restored`` says whether and where training resumes.

    Raises:
        SnapshotError: no worker agent; not enough host memory (before training, with needed and available); steps were
            done and no snapshot can be restored (nothing was changed then); the snapshots in memory have another job,
            structure or format; ``resume=must`` and there is no snapshot; with several replicas, copies of the first
            snapshot do not arrive.
        DamagedSnapshot: a copy was damaged and is void now; another machine has a good one, so begin again.
    """
    here = context if context is not None else current()
    if every != "auto" and (isinstance(every, str) or every < 1):
        raise SnapshotError(f"every: expected at least 1 step, or 'auto'; got {every!r}")
    if not mtbf_s > 0:
        raise SnapshotError(f"mtbf_s: expected more than 0 seconds between failures; got {mtbf_s}")
    if extra_state is not None and not (hasattr(extra_state, "state_dict") and hasattr(extra_state, "load_state_dict")):
        raise SnapshotError(
            f"extra_state: expected an object with state_dict() and load_state_dict(); got {type(extra_state).__name__}"
        )
    here.attaching()
    ranks = connect(group, here.rank, here.world_size, timeout_s)
    state = ranks.together(lambda: collect(engine, extra_state))
    _unlink_buffer(here.rank)
    shards = _plan(ranks, state, here)
    folder = arena.make_folder(here.arena)
    holdings: list[catalog.Holding] = []
    if here.resume != "never":
        # Before anything is made: room for shards of other ranks would be in the way of the right start.
        holdings = restore.survey(ranks, shards, folder, here.job)
        steps_done = max(ranks.exchange(steps_done)) or catalog.steps_in_memory(holdings)
        if catalog.restorable([rank.usable() for rank in holdings]) is None:
            restore.check_start(here.resume, steps_done, catalog.explain(holdings))
    _open(ranks, shards, here, folder)
    snapshots = Snapshots(here, ranks, state, shards, every=every, mtbf_s=mtbf_s, timeout_s=timeout_s)
    try:
        identity = _restore(here, ranks, state, shards, holdings, steps_done)
        if identity is not None:
            snapshots.resumed_from(identity)
        else:
            snapshots.first()
    except BaseException:
        snapshots.close()
        raise
    here.restored(snapshots.steps)
    snapshots.warm()
    if hook:
        _hook(engine, snapshots, agree or ranks.all_true)
    return snapshots


def _unlink_buffer(rank: int) -> None:
    """Take the name off the 69 MB that DeepSpeed's all-reduce on CPUs shares between ranks: a kill would leave them.

    A rank that has an engine has opened the buffers of all others, and none opens them later.
    """
    meeting = f"{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{meeting}_{rank}").unlink(missing_ok=True)


def _plan(ranks: Ranks, state: TrainingState, here: Context) -> list[Shard]:
    """The shards of this rank. Common state is one shard per machine, which the machine's first rank writes."""
    large = [e for e in state.entries if not e.at_once]
    small = [e for e in state.entries if e.at_once]
    mine = arena.checksum(live_pieces(large)).hex() if not state.sharded else None
    checksums = ranks.exchange(mine)
    own = shard_of(here.rank)
    if not state.sharded and len(set(checksums)) == 1:
        return [
            make_shard(own, small, state, here.world_size, owned=True),
            make_shard(COMMON, large, state, here.world_size, owned=here.local_rank == 0),
        ]
    if not state.sharded:
        log.warning("the ranks start with different parameters: each keeps a snapshot of its own")
    return [make_shard(own, large + small, state, here.world_size, owned=True)]


def _open(ranks: Ranks, shards: list[Shard], here: Context, folder: Path) -> None:
    """Check that this machine has room for all its slots, and for those it keeps for others; then reserve it."""
    _, machine = restore.machine_of(folder)
    # All ranks measure before any of them allocates: the exchange lets none pass before all have spoken.
    where = arena.room(folder)
    own = {s.name: s.layout.file_bytes for s in shards if s.owned}
    said = ranks.exchange(
        [machine, *_needs(folder, own, catalog.OWN_SLOTS), where.available, shards[0].layout.file_bytes]
    )
    kept = {shard_of(rank): said[rank][4] for rank in here.kept}  # the same on all ranks of this machine
    needed, more = _needs(folder, kept, catalog.FOREIGN_SLOTS)
    here_said = [s[1:] for s in said if s[0] == machine]
    needed, more = needed + sum(s[0] for s in here_said), more + sum(s[1] for s in here_said)
    where = arena.Room(min(s[2] for s in here_said), where.limit, where.remedy)
    ranks.together(lambda: arena.check_room(more, where))
    if here.local_rank == 0:
        log.info(
            "snapshots: %.1f MB of host memory needed on this machine, %.1f %% of all it has: %d slots of each own shard, %d of "
            "each of %d shards kept for other machines. %.1f MB of it not allocated yet, %.1f MB available",
            needed / 1e6,
            100 * needed / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
            catalog.OWN_SLOTS,
            catalog.FOREIGN_SLOTS,
            len(kept),
            more / 1e6,
            where.available / 1e6,
        )
    for owned in (True, False):  # owners make the files that the others open
        ranks.together(functools.partial(_open_all, [s for s in shards if s.owned is owned], folder))
    if here.replicas > 1:
        ranks.together(lambda: _keep(folder, kept if here.local_rank == 0 else {}))


def _needs(folder: Path, shards: dict[str, int], slots: int) -> tuple[int, int]:
    """Bytes of so many slots of each shard (its bytes by name), and what of it is not allocated yet."""
    paths = [(folder / f"{shard}.{slot}", nbytes) for shard, nbytes in shards.items() for slot in range(slots)]
    have = [path.stat().st_blocks * 512 if path.exists() else 0 for path, _ in paths]
    more = (max(0, nbytes - had) for (_, nbytes), had in zip(paths, have, strict=True))
    return sum(nbytes for _, nbytes in paths), sum(more)


def _keep(folder: Path, shards: dict[str, int]) -> None:
    """Reserve the slots of shards that this machine keeps for others; drop a third one, of when it owned the shard.

    A third one that holds the newest copy here stays until a newer one has arrived.
    """
    for shard, nbytes in shards.items():
        found: set[Identity] = set()
        for slot in range(catalog.FOREIGN_SLOTS):
            with closing(arena.SlotFile(folder, shard, slot, create=True)) as file:
                file.reserve(nbytes)
                found |= catalog.committed([file.view()])[shard]
        third = folder / f"{shard}.{catalog.FOREIGN_SLOTS}"
        if third.exists():
            with closing(arena.SlotFile(folder, shard, catalog.FOREIGN_SLOTS)) as file:
                last = catalog.committed([file.view()])[shard]
            if found >= last or max(found, default=Identity(0, 0, 0)) > max(last):
                third.unlink()


def _open_all(shards: list[Shard], folder: Path) -> None:
    for shard in shards:
        shard.open(folder)


def _restore(
    here: Context,
    ranks: Ranks,
    state: TrainingState,
    shards: list[Shard],
    holdings: list[catalog.Holding],
    steps_done: int,
) -> Identity | None:
    """Void all that is newer than the restored snapshot, then put it back; its identity, or None. Collective.

    Raises:
        SnapshotError: steps were done and no snapshot can be restored; or a snapshot is of a later membership.
    """
    identity: Identity | None = None
    opened: restore.Opened = {}
    note = "resume=never"
    if here.resume != "never":
        identity, opened, note = restore.choose(ranks, shards, holdings, here.replicas)
        if identity is None:
            restore.check_start(here.resume, steps_done, note)
    if identity is not None and (here.term, here.generation) < identity[:2]:
        raise SnapshotError(
            f"this process was started for term {here.term}, generation {here.generation}; the newest snapshot "
            f"{identity} is of a later one: another worker agent runs this job, or its arena was copied. Stop the other "
            "job with launch/stop.py, or start again with resume=never"
        )
    ranks.together(lambda: restore.void_newer(shards, identity))
    if here.rank == 0:
        log.info("snapshots: %s", note)
    if identity is not None:
        ranks.together(lambda: restore.apply(state, shards, opened))
    return identity


def _hook(engine: Any, snapshots: Snapshots, agree: Callable[[bool], bool]) -> None:
    """Have the engine's own step call fence, capture-or-skip and capture."""
    if is_deepspeed(engine):
        original = engine.step

        @functools.wraps(original)
        def engine_step(*args: Any, **kwargs: Any) -> Any:
            before = engine.global_steps
            snapshots.before_step()  # costs nothing on a step that only accumulates: there the copy is long done
            result = original(*args, **kwargs)
            if engine.global_steps != before:
                snapshots.steps = engine.global_steps
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
    # The scheduler changes last. It has no hooks, and its state_dict() would contain an attribute of the instance: so it
    # gets a class of its own.
    kind = type(scheduler)

    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.step(self, *args, **kwargs)
        stepped()

    scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})
    snapshots.on_close(lambda: setattr(scheduler, "__class__", kind))


def _capture(snapshots: Snapshots, agree: Callable[[bool], bool], step: int) -> None:
    snapshots.after_step(step, snapshots.wants(step) and agree(snapshots.ready()))
