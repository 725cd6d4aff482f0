"""Writing a partitioned graph; what lies where is said in :mod:`gemini_gnn.graph.partition.folder`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.array_folder import Progress, map_array, new_folder, write_array, write_json
from gemini_gnn.graph.graph import Graph
from gemini_gnn.graph.partition.assign import ranges
from gemini_gnn.graph.partition.folder import FORMAT_VERSION, MASKS, Meta, PartitionedGraph, inverse
from gemini_gnn.graph.partition.quality import chunks, halo_of, measure
from gemini_gnn.graph.sparse import SparseRows
from gemini_gnn.hashing import splitmix64

CHUNK_BYTES = 64 << 20  # of feature rows held in memory while writing


def write_partitioned(
    graph: Graph,
    assignment: np.ndarray,
    folder: str | os.PathLike,
    *,
    method: str,
    settings: Mapping[str, Any],
    fingerprint: str,
    progress: Progress | None = None,
) -> PartitionedGraph:
    """Write ``graph`` cut into parts, and map the result.

    Holds, besides the graph, two int64 per node and chunks of fixed size; features are never copied as a whole.

    Args:
        graph: the graph. assignment: integer ``[nodes]``, the part of each node; every part 0..max has one.
        folder: must not exist, or be empty.
        method, settings, fingerprint: written to ``meta.json``; what :meth:`PartitionedGraph.expect` compares.
        progress: told what is being written.

    Raises:
        PartitionError: the folder exists or cannot be written, or the assignment has an empty part.
    """
    n = graph.num_nodes
    say = progress or (lambda _: None)
    sizes = np.bincount(assignment)
    if len(assignment) != n or not sizes.all():
        raise PartitionError(
            f"{graph.name}: expected a part for each of {n} nodes and no empty part; got {len(assignment)} nodes, "
            f"part sizes {sizes.tolist()[:20]}"
        )
    parts = len(sizes)
    kind = np.dtype(np.int32 if n < 2**31 else np.int64)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    original = np.argsort(assignment, kind="stable").astype(np.int64, copy=False)
    new_of = inverse(original).astype(kind, copy=False)
    colptr = reordered(graph.colptr, original)

    def of_lists(values: np.ndarray, before: np.ndarray, after: np.ndarray) -> Iterator[np.ndarray]:
        """One list per node, cut by ``before`` in the graph and by ``after`` in new order."""
        for begin, end in chunks(after, 0, n):
            nodes = original[begin:end]
            yield values[ranges(before[nodes], before[nodes + 1] - before[nodes])]

    def of_edges(values: np.ndarray) -> Iterator[np.ndarray]:
        return of_lists(values, graph.colptr, colptr)

    def of_nodes(values: np.ndarray) -> Iterator[np.ndarray]:
        step = max(1, CHUNK_BYTES // max(1, values[:1].nbytes))
        for begin in range(0, n, step):
            yield values[original[begin : begin + step]]

    checksums: dict[str, str] = {}
    with new_folder(Path(folder)) as place:

        def write(name: str, dtype: Any, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> None:
            dtype = np.dtype(dtype)
            if dtype.itemsize * int(np.prod(shape)) > CHUNK_BYTES:
                say(f"writing {name} of {graph.name} ({dtype.itemsize * int(np.prod(shape)) / 2**20:,.0f} MiB)")
            checksums[name] = write_array(place, name, dtype, shape, pieces)

        write("original", np.int64, (n,), [original])
        write("colptr", np.int64, (n + 1,), [colptr])
        write("row", kind, (graph.num_edges,), (new_of[piece] for piece in of_edges(graph.row)))
        if graph.edge_weight is not None:
            write("edge_weight", np.float32, (graph.num_edges,), of_edges(graph.edge_weight))
        if isinstance(x := graph.x, SparseRows):
            ptr = reordered(x.ptr, original)
            write("x_ptr", np.int64, (n + 1,), [ptr])
            write("x_index", np.int32, (x.stored,), of_lists(x.index, x.ptr, ptr))
            if x.value is not None:
                write("x_value", np.float32, (x.stored,), of_lists(x.value, x.ptr, ptr))
        else:
            write("x", np.float32, x.shape, of_nodes(x))
        write("y", graph.y.dtype, graph.y.shape, of_nodes(graph.y))
        for name in MASKS:
            write(name, np.bool_, (n,), of_nodes(getattr(graph, name)))
        if graph.node_ids is not None:
            write("node_ids", graph.node_ids.dtype, (n,), [graph.node_ids])

        row = map_array(place, "row")
        halos, cut = [], 0
        for p in range(parts):
            halo, crossing = halo_of(int(bounds[p]), int(bounds[p + 1]), colptr, row)
            halos.append(halo.astype(kind))
            cut += crossing
        halo_ptr = np.concatenate([[0], np.cumsum([len(halo) for halo in halos])]).astype(np.int64)
        write("halo", kind, (int(halo_ptr[-1]),), halos)
        per_part = {name: np.bincount(assignment[getattr(graph, name)], minlength=parts).tolist() for name in MASKS}
        meta = Meta(
            format_version=FORMAT_VERSION,
            graph=graph.name,
            fingerprint=fingerprint,
            method=method,
            settings=dict(settings),
            parts=parts,
            num_nodes=n,
            num_edges=graph.num_edges,
            feature_width=graph.x.shape[1],
            num_classes=graph.num_classes,
            multi_label=graph.multi_label,
            bounds=bounds.tolist(),
            halo_ptr=halo_ptr.tolist(),
            train=per_part["train_mask"],
            val=per_part["val_mask"],
            test=per_part["test_mask"],
            edge_hash=edge_hash(graph.colptr, graph.row),
            quality=measure(bounds, colptr, graph.train_mask[original], np.diff(halo_ptr).tolist(), cut, graph.x),
            checksums=checksums,
            notes={str(k): str(v) for k, v in graph.notes.items()},
        )
        write_json(place, asdict(meta), "meta.json")
    return PartitionedGraph.open(folder)


def reordered(ptr: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Where the lists that ``ptr`` cuts begin once they stand in the order ``original``: int64, begins with 0."""
    found = np.zeros(len(original) + 1, dtype=np.int64)
    np.cumsum(np.diff(ptr)[original], out=found[1:])
    return found


def edge_hash(colptr: np.ndarray, row: np.ndarray, original: np.ndarray | None = None) -> int:
    """Order-free hash of the edges: the sum of splitmix64(splitmix64(source) + target) over them, modulo 2^64.

    Args:
        colptr, row: in-edges. original: original id of each node, where they are numbered differently.
    """
    total = 0
    for begin, end in chunks(colptr, 0, len(colptr) - 1):
        target = np.repeat(np.arange(begin, end), np.diff(colptr[begin : end + 1]))
        source = row[colptr[begin] : colptr[end]]
        if original is not None:
            source, target = original[source], original[target]
        with np.errstate(over="ignore"):
            total += int(np.sum(splitmix64(splitmix64(source) + target.astype(np.uint64)), dtype=np.uint64))
    return total % 2**64
