"""One trainer from its settings to its exit code: the function that every way of starting ends in.

payload (plain settings) -> Config -> run directory -> process groups -> partitioned graph -> Run -> train -> result
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gemini_gnn.cluster.place import Place
from gemini_gnn.config import Config, from_checked
from gemini_gnn.errors import ConfigError, RunDirError, SnapshotError
from gemini_gnn.faults import injection, schedule
from gemini_gnn.files import write_if_new
from gemini_gnn.graph.datasets import fingerprint, load_dataset
from gemini_gnn.graph.graph import Graph, one_way_share
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.graph.partition.on_demand import open_or_make
from gemini_gnn.models import bf16
from gemini_gnn.observe import votes
from gemini_gnn.observe.errors import forget_errors, record_error
from gemini_gnn.observe.events import EventLog
from gemini_gnn.observe.progress import say
from gemini_gnn.observe.run_directory import RunDir, keep_earlier, steps_done
from gemini_gnn.observe.writer import Writer
from gemini_gnn.recovery import board
from gemini_gnn.recovery.outcome import STOPPED
from gemini_gnn.snapshot import context as snapshot_context
from gemini_gnn.training import engine
from gemini_gnn.training import groups as process_groups
from gemini_gnn.training.data import features_said
from gemini_gnn.training.loop import NoSnapshots, Run, build_run, train
from gemini_gnn.training.report import Report, model_card

EVENTS_S = 5.0  # for the last events, at the end


def main(payload: dict[str, Any], place: Place, listen_fd: int | None = None) -> int:
    """Train as rank ``place.rank``; what a worker agent's trainer runs. Errors go on to it, after they are written down.

    Args:
        payload: ``to_mapping`` of settings that the slot process has checked.

    Returns:
        0 when the run is complete, STOPPED after an orderly stop before that.
    """
    here = snapshot_context.current()
    result = Path(payload["run_dir"]) / "result.json"
    if here.generation > 1 and result.exists():
        if votes.private(result.parent) is None:
            return 0  # the run was complete when a trainer was lost on its way out
        result.unlink(missing_ok=True)  # other machines may lack it: all finish once more
    try:
        return run(from_checked(payload, Config), place, listen_fd)
    except RunDirError:  # the folder is not ours: nothing is written there
        raise
    except Exception as error:
        record_error(Path(payload["run_dir"]), place.rank, error)  # before this rank's connections close
        raise


def run(config: Config, place: Place, listen_fd: int | None = None) -> int:
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    torch.manual_seed(config.seed)
    _speak(place.rank)
    here = snapshot_context.installed()
    membership = f"{here.term}.{here.generation}" if here else f"pid {os.getpid()}"
    groups = process_groups.join(place, config.distributed, listen_fd, membership=membership)
    board.milestone(board.Milestone.JOINED)
    claimed: list[RunDir] = []
    private = votes.private(Path(config.run_dir)) is not None
    resume = here.resume if here else config.resume  # of an agent's trainers only the first generation forgets

    def claim() -> None:
        claimed.append(RunDir.claim(config, anew=resume == "never", held=here is not None))
        forget_errors(claimed[0].path)

    # Only after rank 0 holds the run directory may others write into it.
    timeout_s = config.distributed.timeout_s
    try:
        process_groups.run_on_first(groups.store, place.rank, "claim run_dir", timeout_s, claim, error=RunDirError)
    except RunDirError:
        process_groups.part(groups)  # else ranks that still join would take the end of rank 0 for the error
        raise
    if private and place.rank > 0 and place.local_rank == 0:
        claim()
    run_dir = claimed[0] if claimed else None
    try:
        code = _with_groups(config, place, groups, run_dir, private)
    except BaseException as error:
        if run_dir is not None:
            run_dir.status("failed", reason=f"{type(error).__name__}: {error}"[:2000])
        raise
    finally:
        if run_dir is not None:
            run_dir.release()
    # Only now: after an error the connections stay open until it has been written down, so that the others' errors,
    # which are its consequences, come later.
    process_groups.part(groups)
    engine.leave()
    return code


def _speak(rank: int) -> None:
    """The library logs; this is where a program lets it be heard: news of rank 0, warnings of all."""
    logger = logging.getLogger("gemini_gnn")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def _with_groups(
    config: Config, place: Place, groups: process_groups.Groups, run_dir: RunDir | None, private: bool
) -> int:
    writer = Writer("events")
    events = EventLog(writer, Path(config.run_dir) / "events" / f"rank-{place.rank}.jsonl", rank=place.rank)
    report = Report(run_dir, config, groups, private)
    try:
        events.emit("start", machine=place.machine, pid=os.getpid(), backend=groups.backend, device=str(groups.device))
        if run_dir is not None:
            run_dir.status("starting", world_size=place.world_size)
        faults, path = schedule.planned(config.faults, place.world_size), Path(config.run_dir)
        injection.install(faults, place.rank, path, steps_done(path) if faults else 0)
        board.mark(board.Phase.PARTITIONING)
        graph = partitioned_graph(config, groups)
        board.mark(board.Phase.START_UP)
        events.emit("graph_open")
        job = build_run(config, graph, groups, report, events, terminal=os.environ.get("GEMINI_GNN_TTY") == "1")
        events.emit("engine_built")
        board.milestone(board.Milestone.BUILT)
        board.total_steps(job.total_steps)
        return _train(job, run_dir)
    finally:
        report.close()
        writer.close(EVENTS_S)


def _train(job: Run, run_dir: RunDir | None) -> int:
    config, groups, graph = job.config, job.groups, job.graph
    if run_dir is not None:
        say(
            f"{graph.meta.graph}: {graph.num_nodes:,} nodes, {graph.num_edges:,} edges, {graph.x.shape[1]} features, "
            f"{graph.num_classes} classes; {graph.parts} parts ({graph.meta.method}, "
            f"edge cut {graph.meta.quality.edge_cut:.3f}); "
            f"{groups.world_size} ranks on {groups.backend}, {job.source.steps_per_epoch} steps per epoch"
        )
        for line in features_said(job.source, job.model):
            say(line)
        if config.training.precision == "bf16_products" and bf16.slow_here(groups.device):
            say(
                "this CPU does not multiply bfloat16 (avx512_bf16, amx_bf16): training.precision=bf16_products makes "
                "steps slower here; leave it out"
            )
        one_way = one_way_share(graph.colptr, graph.row, graph.original)
        if one_way > 0.5:
            say(
                f"about {one_way:.0%} of the edges have no reverse: messages go from source to target only. If the graph is "
                "undirected and its file lists each edge once, read it with dataset.undirected=true"
            )
    job.snapshots = start_snapshots(job)
    board.restored(job.state.step)
    job.events.emit("restored" if job.state.step else "first_snapshot", step=job.state.step)
    if run_dir is not None:
        if job.snapshots.restored is None:  # snapshot=none, or a first checkpoint that was not due yet
            keep_earlier(run_dir.path)
        card = model_card(config, graph)
        write_if_new(run_dir.path / "model.json", json.dumps(card, indent=1))
        run_dir.status("running", step=job.state.step, total_steps=job.total_steps, world_size=groups.world_size)
        if job.state.step:
            say(f"going on after step {job.state.step} of {job.total_steps}")
    begin, first_step = time.perf_counter(), job.state.step
    job.report.begin(job.state)
    job.events.emit("training")
    state = train(job)
    train_s = time.perf_counter() - begin
    complete = state.stopped or state.step >= job.total_steps
    extra = {"dataset": graph.meta.graph, "parts": graph.parts, "partition_method": graph.meta.method}
    result = job.report.result(
        state, extra | {"train_s": train_s, "measured_from_step": first_step}, job.source.remote_bytes
    )
    if not complete:
        if run_dir is not None:
            run_dir.status("stopped", step=state.step)
            say(
                f"stopped after step {state.step} of {job.total_steps}; the same command resumes from the last snapshot"
            )
        return STOPPED

    def finish() -> None:
        assert run_dir is not None
        job.report.close()
        run_dir.finish(result)

    # No rank is done before the result is on disk: an agent drops the snapshots of ranks that are.
    process_groups.run_on_first(groups.store, groups.rank, "result.json", config.distributed.timeout_s, finish)
    if run_dir is not None and groups.rank > 0:
        finish()
    if run_dir is not None:
        say(
            f"done: test accuracy {_shown(result['test_accuracy'], 4)} at the best validation "
            f"({_shown(result['val_accuracy'], 4)}, epoch {result['best_epoch']}); "
            f"{_shown(result['epoch_s'], 2)} s per epoch, {result['edges_per_s'] / 1e6:.2f} M edges/s, "
            f"communication {100 * result['communication_fraction']:.1f} %; results in {run_dir.path}"
        )
    return 0


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def start_snapshots(job: Run) -> Any:
    """Restore ``job.engine`` and ``job.state`` from the newest snapshot, if there is one, and take snapshots from now on.

    Raises:
        SnapshotError: no room; nothing to restore with resume=must, or although steps were done; or a snapshot of another
            job or shape.
    """
    settings, here = job.config.snapshot, snapshot_context.installed()
    done = steps_done(Path(job.config.run_dir)) if job.groups.rank == 0 else 0
    if settings.mode == "memory":
        from gemini_gnn import snapshot

        return snapshot.attach(
            job.engine,
            job.state,
            # The loop marks its phases itself.
            context=replace(snapshot_context.current(), stepped=lambda step: None),
            every=settings.every,
            group=job.groups.control,
            hook=False,
            timeout_s=job.config.distributed.timeout_s,
            steps_done=done,
        )
    if settings.mode == "nfs":
        from gemini_gnn.snapshot import deepspeed_checkpoints

        return deepspeed_checkpoints.attach(
            job.engine,
            job.state,
            settings.folder or str(Path(job.config.run_dir) / "checkpoints"),
            every=settings.nfs_every,
            resume=here.resume if here else job.config.resume,
            group=job.groups.control,
            timeout_s=job.config.distributed.timeout_s,
            steps_done=done,
        )
    if job.config.resume == "must":
        raise SnapshotError(
            "resume=must: snapshot=none keeps nothing to go on from; use snapshot=memory or snapshot=nfs"
        )
    return NoSnapshots()


def partitioned_graph(config: Config, groups: process_groups.Groups) -> PartitionedGraph:
    """Open the partitioned graph of these settings; rank 0 makes it first where it is missing. Collective.

    ``dataset=partitioned`` takes ``partition.folder`` as it is, whatever it was made from.
    """
    if config.dataset.name == "partitioned":
        if not config.partition.folder:
            raise ConfigError("dataset=partitioned: expected partition.folder=FOLDER of a partitioned graph; got none")

        def get(verify: bool) -> PartitionedGraph:
            graph = PartitionedGraph.open(str(config.partition.folder))
            if verify:
                graph.verify_checksums(say, features=False)
            return graph
    else:
        parts = config.partition.parts or groups.world_size
        identity = fingerprint(config.dataset)

        def load() -> Graph:
            return load_dataset(config.dataset, say, layout=config.features.layout)

        def get(verify: bool) -> PartitionedGraph:
            return open_or_make(config, parts, load, identity, say, verify)

    # Not in a recovery, which would take longer for it: this job has read the files already.
    here = snapshot_context.installed()
    again = here is not None and here.generation > 1
    got: list[PartitionedGraph] = []
    process_groups.run_on_first(
        groups.store,
        groups.rank,
        "partition",
        config.partition.timeout_s,
        lambda: got.append(get(verify=config.partition.verify and not again)),
    )
    if got:
        return got[0]
    graph = get(verify=False)
    if graph.held and config.partition.verify and not again:  # on a disk of this machine's own: rank 0 has read another
        graph.verify_checksums(say, features=False)
    return graph


def in_process(config: Config) -> int:
    """Train with one rank in this process (notebooks): a store on a free port, nothing left behind."""
    place = Place(0, 1, 0, 1, os.uname().nodename, "127.0.0.1", 0, "plain")
    before = dict(os.environ)
    try:
        return run(config, place)
    finally:
        engine.leave()
        os.environ.clear()
        os.environ.update(before)
