"""One partition per graph, method, parts and settings, made once and found from then on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemini_gnn.config import Config, PartitionConfig
from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.array_folder import Progress, locked, ticking
from gemini_gnn.graph.datasets import fingerprint as dataset_fingerprint
from gemini_gnn.graph.graph import Graph
from gemini_gnn.graph.partition.assign import partition_nodes
from gemini_gnn.graph.partition.folder import FORMAT_VERSION, PartitionedGraph
from gemini_gnn.graph.partition.held import expect as expect_held
from gemini_gnn.graph.partition.write import write_partitioned


def open_or_make(
    config: Config,
    parts: int,
    load: Callable[[], Graph],
    fingerprint: str,
    progress: Progress | None = None,
    verify: bool = False,
) -> PartitionedGraph:
    """The partitioned graph a run needs: found, or made here.

    Ownership: the folder is complete from the moment it has its name (see :mod:`array_folder`), so a reader needs no
    lock. A job that makes it takes a ``flock`` on ``.<folder>.lock`` beside it; a second job waits, and then opens the
    folder of the first. If the first dies, the kernel drops its lock; the second removes its remains and starts afresh.
    On a file system without locks two jobs may do the work twice: the second rename fails, and that job opens the folder
    of the other.

    Args:
        config: its ``dataset``, ``partition`` and ``features.layout``. parts: number of parts.
        load: called only when the partition has to be made; its graph has the form of ``features.layout``. A folder that
            is named by ``partition.folder`` keeps the form it was made in.
        fingerprint: of the graph that ``load`` returns.
        verify: compare the checksums of a graph that was found, but for its features.

    Raises:
        PartitionError: ``partition.folder`` holds something else or is damaged, more parts than nodes, no room, or
            another process held the lock for longer than ``partition.timeout_s``.
    """
    partition = config.partition
    settings = partition_settings(partition)
    folder = partition_folder(config, parts, fingerprint)
    say = progress or (lambda _: None)

    def found() -> PartitionedGraph | None:
        if not folder.is_dir() or not any(folder.iterdir()):
            return None
        graph = PartitionedGraph.open(folder)
        graph.expect(fingerprint=fingerprint, method=partition.method, parts=parts, settings=settings)
        if verify:
            graph.verify_checksums(progress, features=False)
        return graph

    if (graph := found()) is not None:
        return graph
    with locked(folder, partition.timeout_s, say, "partition.timeout_s"):
        if (graph := found()) is not None:
            return graph
        source = load()
        what = f"cutting {source.name} ({source.num_nodes:,} nodes, {source.num_edges:,} edges) into {parts} parts"
        with ticking(f"{what} with {partition.method}", say):
            assignment = partition_nodes(source, partition.method, parts, partition.seed, partition.balance_edges)
        try:
            return write_partitioned(
                source,
                assignment,
                folder,
                method=partition.method,
                settings=settings,
                fingerprint=fingerprint,
                progress=progress,
            )
        except PartitionError:
            if (graph := found()) is not None:  # no locks here, and another job came first
                return graph
            raise


def expect_made(config: Config, parts: int, fingerprint: str | None) -> None:
    """Refuse a machine that has not the partitioned graph of a living job, with the features of all parts: it may take any place.

    Args:
        parts: ranks of the job. fingerprint: of the graph that the job trains on; None: not known yet.

    Raises:
        DataError, PartitionError: the data set or its partition is missing here, or of another graph.
    """
    own = None if config.dataset.name == "partitioned" else dataset_fingerprint(config.dataset)
    folder = partition_folder(config, config.partition.parts or parts, own or "")
    if own is not None and own != (fingerprint or own):
        raise PartitionError(
            f"this machine has another data set than the job: expected the graph {fingerprint}, got {own} "
            f"({config.dataset.name}); copy the job's files here, or name their folder with dataset.root=FOLDER"
        )
    if not folder.is_dir():
        raise PartitionError(
            f"this machine has not the job's partitioned graph: expected {folder}; copy it from a machine of the job, or "
            "name the folder that holds it with dataset.cache=FOLDER"
        )
    graph = PartitionedGraph.open(folder)
    graph.expect(fingerprint=fingerprint or own)
    expect_held(folder, graph.held, range(graph.parts))


def partition_settings(partition: PartitionConfig) -> dict[str, Any]:
    """The settings that change the assignment beside method and parts."""
    return {"balance_edges": partition.balance_edges, "seed": partition.seed}


def partition_folder(config: Config, parts: int, fingerprint: str) -> Path:
    """``partition.folder``, or ``<cache>/partitions/<name>-<fingerprint>-<method>-<parts>-<settings hash>``."""
    if config.partition.folder:
        return Path(config.partition.folder).expanduser()
    import xxhash

    from gemini_gnn.graph.datasets import cache_folder

    rest = json.dumps([FORMAT_VERSION, config.features.layout, partition_settings(config.partition)], sort_keys=True)
    file = Path(config.dataset.path or "").name.partition(".")[0]  # what an edge list or folder is known by
    name = re.sub(r"[^\w.-]+", "_", file or config.dataset.name)
    key = f"{name}-{fingerprint}-{config.partition.method}-{parts}-{xxhash.xxh3_64_hexdigest(rest.encode())[:8]}"
    return cache_folder(config.dataset) / "partitions" / key
