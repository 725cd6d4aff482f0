#!/usr/bin/env python
"""Partition a graph: `python launch/partition.py dataset=cora partition.method=metis partition.parts=8`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gemini_gnn.compose import command, compose, take
from gemini_gnn.config import Config, replicas_of, seats_of
from gemini_gnn.errors import ConfigError
from gemini_gnn.observe.progress import say

if TYPE_CHECKING:
    from gemini_gnn.graph.graph import Graph
    from gemini_gnn.graph.partition.folder import PartitionedGraph

PURPOSE = """Write a partitioned graph and print its quality and its folder; training finds it there.
  partition.method=metis|hash partition.parts=N [partition.balance_edges=true] [partition.folder=FOLDER]
  partition.plot=true   also draw a small graph as PNG, coloured by part, cut edges in red
  dataset=partitioned partition.folder=FOLDER   only print the quality of an existing one
  --distribute HOSTFILE --to FOLDER   send each machine what it needs of it, into FOLDER on its own disk; HOSTFILE and
                        recovery.standby_machines as the job will have them; srun in place of HOSTFILE: this allocation
  --check FOLDER        check that a partitioned graph holds every edge exactly once; with the settings it was
                        made from (dataset=...) compare it with the source graph too"""

MOST_EDGES = 2_000_000_000  # edges visited for the predicted traffic, about a minute


def main(arguments: list[str]) -> int:
    arguments = spelled(arguments, {"--check": "a folder", "--distribute": "a hostfile, or srun,", "--to": "a folder"})
    overrides, extras = take(arguments, "check", "distribute", "to")
    config = compose(overrides)
    if "check" in extras:
        return check(config, extras["check"])
    if ("distribute" in extras) != ("to" in extras):
        raise ConfigError(
            "--distribute HOSTFILE --to FOLDER: expected both, the machines and a folder on each one's own disk; got one"
        )
    if "distribute" in extras:
        return distribute(config, extras["distribute"], Path(extras["to"]))
    make(config)
    return 0


def spelled(arguments: list[str], options: dict[str, str]) -> list[str]:
    """``--name VALUE`` as ``name=VALUE``, for the ``options``: what is expected after each. Pure."""
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in options:
            value = next(words, "")
            if not value:
                raise ConfigError(f"{word}: expected {options[word]} after it; got none")
            word = f"{word.removeprefix('--')}={value}"
        rest.append(word)
    return rest


def distribute(config: Config, hostfile: str, folder: Path) -> int:
    from gemini_gnn.cluster import hosts
    from gemini_gnn.graph.partition import held
    from gemini_gnn.graph.partition.distribute import distribute

    if not folder.is_absolute():
        raise ConfigError(f"--to: expected an absolute path, which is the same on all machines; got {folder}")
    how = "srun" if hostfile == "srun" else "ssh"
    machines = hosts.allocated(os.environ) if how == "srun" else hosts.read_hostfile(Path(hostfile))
    if not machines:
        raise ConfigError("--distribute srun: expected to be in an allocation of SLURM; got none. Name a hostfile")
    seats, slots = seats_of(config.recovery, len(machines)), machines[0][1]
    copies = replicas_of(config.snapshot, seats)

    def expect(parts: int) -> None:
        if parts != seats * slots:
            raise ConfigError(
                f"partition.parts: expected one per rank, {seats * slots} ({seats} machines that train, slots={slots}); got "
                f"{parts}. Set partition.parts={seats * slots}, or recovery.standby_machines, or name another hostfile"
            )

    config.partition.parts = config.partition.parts or seats * slots
    expect(config.partition.parts)
    graph = make(config)
    expect(graph.parts)
    parts = held.parts_of(len(machines), slots, len(machines) - seats, copies)
    done = distribute(graph, machines, how, Path.cwd(), folder, parts, say)
    if failed := [one.host for one in done if one.problem]:
        print(f"{len(failed)} of {len(done)} machines lack it: {', '.join(failed)}. Mend them and type the same again")
        return 1
    print(f"on {len(done)} machines: train with dataset=partitioned partition.folder={folder}")
    return 0


def make(config: Config) -> PartitionedGraph:
    from gemini_gnn.graph import datasets
    from gemini_gnn.graph.array_folder import ticking
    from gemini_gnn.graph.partition import quality
    from gemini_gnn.graph.partition.folder import PartitionedGraph
    from gemini_gnn.graph.partition.on_demand import open_or_make
    from gemini_gnn.graph.partition.plot import plot_partitioned

    how = "was there already"
    began = time.monotonic()

    def load() -> Graph:
        nonlocal how
        how = "made now"
        return datasets.load_dataset(config.dataset, say, require_labels=False, layout=config.features.layout)

    if config.dataset.name == "partitioned":
        if not config.partition.folder:
            raise ConfigError("dataset=partitioned: expected partition.folder=FOLDER of a partitioned graph; got none")
        pg = PartitionedGraph.open(config.partition.folder)
    else:
        if config.partition.parts < 1:
            raise ConfigError(
                "partition.parts: expected the number of parts, one per rank, such as partition.parts=8; got none"
            )
        identity = datasets.fingerprint(config.dataset)
        pg = open_or_make(config, config.partition.parts, load, identity, say)
    took_s = time.monotonic() - began
    meta = pg.meta
    print(f"{meta.graph}: {pg.num_nodes:,} nodes, {pg.num_edges:,} edges, {pg.parts} parts by {meta.method}")
    print(f"features: {quality.described(pg.x)}")
    print(quality.table(meta.quality))
    sampling = config.sampling
    if sum(meta.train) and pg.num_edges * pg.parts * len(sampling.fanouts) <= MOST_EDGES:
        with ticking("predicting the traffic of sampled batches", say):
            predicted = quality.sampled_epoch_bytes(
                *(pg.bounds, pg.colptr, pg.row, pg.train_mask),
                *(sampling.fanouts, sampling.batch_size, quality.row_bytes(pg.x)),
            )
        print(
            f"predicted with fanouts {sampling.fanouts} and {sampling.batch_size} seeds per rank: "
            f"{quality.human_bytes(predicted)} of features between ranks per epoch"
        )
    print(f"folder: {pg.folder} ({how}, {took_s:.1f} s)")
    if config.partition.plot:
        with ticking("drawing", say):
            picture = plot_partitioned(pg, pg.folder / "parts.png")
        print(f"picture: {picture}")
    return pg


def check(config: Config, folder: str) -> int:
    from gemini_gnn.graph import datasets
    from gemini_gnn.graph.partition import held
    from gemini_gnn.graph.partition.check import check_partitioned
    from gemini_gnn.graph.partition.folder import PartitionedGraph

    pg = PartitionedGraph.open(folder)
    source = None
    if datasets.fingerprint(config.dataset) == pg.meta.fingerprint:
        source = datasets.load_dataset(config.dataset, say, require_labels=False, layout=config.features.layout)
    check_partitioned(pg, source, say)
    against = "equal to the source graph bit for bit" if source else "edge hash equal to that of the source graph"
    print(
        f"ok: {pg.folder}: {pg.num_nodes:,} nodes and {pg.num_edges:,} edges in {pg.parts} parts, every one exactly once, "
        f"{against}"
    )
    if pg.held:
        print(f"features checked: those of {held.named(pg.held.parts)}, which this machine holds")
    if source is None:
        print("add the dataset settings it was made with to compare it with the source graph, edge by edge")
    return 0


if __name__ == "__main__":
    command(main, PURPOSE)
