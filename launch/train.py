#!/usr/bin/env python
"""Train: `deepspeed --num_accelerators 2 launch/train.py dataset=cora ...`, also under srun, or plain with one rank.

Every slot process that the launcher starts runs this file. It finds its place, checks the settings and runs the shim.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gemini_gnn import cgroups
from gemini_gnn.cluster import launcher
from gemini_gnn.cluster.place import Place, discover
from gemini_gnn.compose import command, compose, of_living_run
from gemini_gnn.config import Config, replicas_of, seats_of, to_mapping
from gemini_gnn.errors import RunDirError
from gemini_gnn.faults import schedule
from gemini_gnn.files import read_record
from gemini_gnn.graph.partition import held
from gemini_gnn.observe.progress import say
from gemini_gnn.observe.run_directory import RunDir, check_size, resume_of
from gemini_gnn.recovery import joining, shim
from gemini_gnn.recovery.outcome import STOPPED
from gemini_gnn.recovery.stop import drop_finished
from gemini_gnn.recovery.worker import harm

PURPOSE = """Train a GNN on a partitioned graph. Start it with deepspeed, srun, or python (one rank):
  deepspeed --num_accelerators 2 launch/train.py dataset=cora run_dir=runs/cora
With snapshot=memory, the default, a job whose processes are killed goes on by itself from snapshots in host memory. If the
whole job was killed, type the same command again. resume=never starts over and keeps the old results.
On a repaired or new machine:
  python launch/train.py --join run_dir=runs/cora
It takes a lost machine's place in the living job there, or waits as a standby."""


def main(arguments: list[str]) -> int:
    if "--join" in arguments:
        return join([argument for argument in arguments if argument != "--join"])
    place = discover(os.environ)
    with launcher.first_speaks(place):
        config = compose(arguments)
        config.run_dir = str(Path(config.run_dir).absolute())
        seats = seats_of(config.recovery, place.machines)
        replicas_of(config.snapshot, seats)  # or the first machine refuses, and the others wait for it
        planned = schedule.planned(config.faults, seats * place.local_world_size).values()
        if config.partition.folder:
            stands_by = place.rank >= seats * place.local_world_size
            own = range(place.rank - place.local_rank, place.rank - place.local_rank + place.local_world_size)
            held.expect_here(
                Path(config.partition.folder).expanduser(),
                range(seats * place.local_world_size) if stands_by else own,
                made=config.dataset.name == "partitioned",
            )
        harm.check(sorted({fault.kind for fault in planned}), place.machines)
        # Again under the lock, later; here it costs no imports, and every machine ends at once. A living job answers for
        # itself: its worker agent is asked below. Every slot looks: one that went on would start a worker agent.
        try:
            RunDir.check_earlier_run(Path(config.run_dir), config)
            check_size(config, place)
        except RunDirError:
            if place.local_rank == 0:
                drop_finished(Path(config.run_dir), config.snapshot.arena)
            raise
    if place.local_rank == 0 and place.rank >= seats * place.local_world_size:
        say(f"{place.machine} stands by: it trains once it takes the place of a lost machine")
        stand_by(lambda: _partition_of(Path(config.run_dir)))
    if place.rank == 0:
        say("loading PyTorch and DeepSpeed, a few seconds")
    code = run(place, config, resume_of(config, seats * place.local_world_size), config.distributed.start_timeout_s)
    if code not in (0, STOPPED):
        launcher.free_launcher(place)
    return code


def stand_by(graph: Callable[[], Path | None]) -> None:
    """Have the files of the graph in the page cache, as far as half of the memory that is left allows."""
    from gemini_gnn.graph.partition.near import bring_near

    left = min([cgroups.machine_left() or 0, *(left for _, left in cgroups.left())])
    bring_near(graph, left // 2)


def _partition_of(run_dir: Path) -> Path | None:
    """Of the job that has begun there; None before."""
    folder = read_record(run_dir / "model.json").get("partition")
    return Path(folder) if folder else None


def join(arguments: list[str]) -> int:
    """Serve the living job with this machine, in this terminal, until the job ends."""
    from gemini_gnn.graph.partition.on_demand import expect_made

    config = of_living_run(arguments)
    run_dir = Path(config.run_dir)
    place = joining.find(run_dir)
    ranks = place.local_world_size * seats_of(config.recovery, place.machines)
    expect_made(config, ranks, read_record(run_dir / "model.json").get("graph"))
    stand_by(lambda: _partition_of(run_dir))
    say(f"joining the job of {run_dir} at {place.master_addr}:{place.master_port}; Ctrl-C takes this machine out of it")
    return run(place, config, "auto", joining.FIND_S, joins=True)  # its root has just answered


def run(place: Place, config: Config, resume: str, start_timeout_s: float, joins: bool = False) -> int:
    os.environ["GEMINI_GNN_TTY"] = "1" if sys.stdout.isatty() else "0"
    return shim.run(
        place,
        Path(config.run_dir),
        "gemini_gnn.training.job:main",
        to_mapping(config),
        preload=["gemini_gnn.training.preload"],
        resume=resume,
        terminal=sys.stdout.isatty(),
        arena_root=config.snapshot.arena,
        recovery=replace(config.recovery, same_step_failures=0) if config.snapshot.mode == "none" else config.recovery,
        snapshot=config.snapshot,
        faults=config.faults,
        start_timeout_s=start_timeout_s,
        joins=joins,
    )


if __name__ == "__main__":
    command(main, PURPOSE)
