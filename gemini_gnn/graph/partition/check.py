"""Prove that a partitioned graph is what its ``meta.json`` says, and that every edge is in it exactly once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from gemini_gnn.errors import DataError, PartitionError
from gemini_gnn.graph.array_folder import Progress
from gemini_gnn.graph.graph import Graph
from gemini_gnn.graph.partition.assign import ranges
from gemini_gnn.graph.partition.folder import MASKS, PartitionedGraph
from gemini_gnn.graph.partition.quality import chunks, halo_of, measure
from gemini_gnn.graph.partition.write import CHUNK_BYTES, edge_hash
from gemini_gnn.graph.sparse import SparseRows, dense, row_chunks


def check_partitioned(pg: PartitionedGraph, graph: Graph | None = None, progress: Progress | None = None) -> None:
    """Check a partitioned graph, array by array, in chunks.

    Features of parts that this machine does not hold are left out.
    Without ``graph``: the checksums; bounds without empty parts; ``original`` is a permutation, ascending within a part;
    the columns of the parts follow one another without gap or overlap; sources ascend by original id; the columns of
    sparse features lie within their width and ascend; halo lists are exact; counts and quality are those of
    ``meta.json``; and the edges, translated to original ids, have the hash that was taken from the source graph (a lost,
    doubled or changed edge goes unseen once in 2^64).
    With ``graph``: every column holds the very sources of the source graph, and weights, features, labels, masks and
    ids are equal bit for bit; features may be sparse in one and dense in the other.

    Raises:
        PartitionError: the first thing that is wrong.
    """
    say = progress or (lambda _: None)
    meta, n, m, colptr, row, original = pg.meta, pg.num_nodes, pg.num_edges, pg.colptr, pg.row, pg.original

    def demand(ok: bool, what: str) -> None:
        if not ok:
            raise PartitionError(f"{pg.folder}: {what}; delete the folder and partition again")

    say("checksums")
    pg.verify_checksums()

    say("numbering")
    demand(bool(np.all(np.diff(pg.bounds) > 0)), "a part is empty")
    seen = np.zeros(n, dtype=bool)
    inside = bool(n) and int(original.min()) >= 0 and int(original.max()) < n
    if inside:
        seen[original] = True
    demand(inside and bool(seen.all()), "original.npy is no permutation of the nodes")
    descents = np.flatnonzero(np.diff(original) < 0) + 1
    demand(bool(np.isin(descents, pg.bounds).all()), "the original ids of a part do not ascend")

    say("edges")
    demand(
        int(colptr[0]) == 0 and int(colptr[-1]) == m and bool(np.all(np.diff(colptr) >= 0)),
        "colptr.npy does not cut the edges into columns",
    )
    for begin, end in chunks(colptr, 0, n):
        sources = row[colptr[begin] : colptr[end]]
        demand(
            len(sources) == 0 or (int(sources.min()) >= 0 and int(sources.max()) < n),
            f"an edge into nodes {begin}..{end - 1} comes from outside 0..{n - 1}",
        )
        step = np.diff(original[sources])
        starts = colptr[begin + 1 : end] - colptr[begin]
        step[starts[(starts > 0) & (starts < len(sources))] - 1] = 0  # from one column to the next
        demand(
            bool(np.all(step >= 0)),
            f"in-edges of a node in {begin}..{end - 1} do not ascend by original id of the source",
        )
    demand(
        edge_hash(colptr, row, original) == meta.edge_hash, "the edges are not those of the source graph (edge hash)"
    )

    say("features")
    if isinstance(pg.x, SparseRows):
        demand(int(pg.x.ptr[0]) == 0, "x_ptr.npy does not begin with 0")
        try:
            for begin, end in _held(pg):
                _validate(pg.x[begin:end], original[begin:end])
        except DataError as error:
            demand(False, str(error))

    say("halo")
    cut = 0
    for p, (begin, end) in enumerate(pairwise(pg.bounds.tolist())):
        halo, crossing = halo_of(begin, end, colptr, row)
        cut += crossing
        written = pg.halo[pg.halo_ptr[p] : pg.halo_ptr[p + 1]]
        demand(np.array_equal(halo, written), f"the halo list of part {p} is not its set of remote in-neighbors")
    quality = measure(pg.bounds, colptr, pg.train_mask, np.diff(pg.halo_ptr).tolist(), cut, pg.x)
    demand(quality == meta.quality, "the quality in meta.json is not that of the arrays")
    for name, counts in zip(MASKS, (meta.train, meta.val, meta.test), strict=True):
        mask = getattr(pg, name)
        found = [int(np.count_nonzero(mask[begin:end])) for begin, end in pairwise(pg.bounds.tolist())]
        demand(found == counts, f"{name}.npy does not hold the numbers of nodes of meta.json")

    if graph is not None:
        say("source graph")
        _compare(pg, graph, demand)


def _validate(rows: SparseRows, original: np.ndarray) -> None:
    rows.validate("features", lambda row: f"of node {original[row]}")


def _held(pg: PartitionedGraph) -> list[tuple[int, int]]:
    """The ranges of new ids whose features are here."""
    if pg.held is None:
        return [(0, pg.num_nodes)]
    return [(int(pg.bounds[p]), int(pg.bounds[p + 1])) for p in pg.held.parts]


def _compare(pg: PartitionedGraph, graph: Graph, demand: Callable[[bool, str], None]) -> None:
    colptr, row, original = pg.colptr, pg.row, pg.original
    demand(graph.num_nodes == pg.num_nodes, f"expected {graph.num_nodes} nodes; got {pg.num_nodes}")
    demand(graph.num_edges == pg.num_edges, f"expected {graph.num_edges} edges; got {pg.num_edges}")
    demand((graph.edge_weight is None) == (pg.edge_weight is None), "edge weights are there in one graph only")
    for begin, end in chunks(colptr, 0, pg.num_nodes):
        nodes, edges = original[begin:end], slice(int(colptr[begin]), int(colptr[end]))
        degree = graph.colptr[nodes + 1] - graph.colptr[nodes]
        where = f"of nodes {begin}..{end - 1} (new ids) differ from those of the source graph"
        demand(np.array_equal(degree, np.diff(colptr[begin : end + 1])), f"in-degrees {where}")
        at = ranges(graph.colptr[nodes], degree)
        demand(np.array_equal(graph.row[at], original[row[edges]]), f"in-edges {where}")
        if graph.edge_weight is not None and pg.edge_weight is not None:
            demand(np.array_equal(graph.edge_weight[at], pg.edge_weight[edges]), f"edge weights {where}")
    demand(graph.x.shape == pg.x.shape, f"x: expected shape {list(graph.x.shape)}; got {list(pg.x.shape)}")
    for begin, end in _held(pg):  # as numbers: the form is the folder's, not the graph's
        ours, theirs = pg.x[begin:end], original[begin:end]
        for rows in row_chunks(ours):
            same = np.array_equal(dense(ours[rows]), dense(graph.x[theirs[rows]]))
            demand(same, f"x of nodes {begin + rows.start}.. (new ids) differs from the source graph")
    for name in ("y", *MASKS):
        ours, theirs = getattr(pg, name), getattr(graph, name)
        demand(ours.shape == theirs.shape, f"{name}: expected shape {list(theirs.shape)}; got {list(ours.shape)}")
        step = max(1, CHUNK_BYTES // max(1, ours[:1].nbytes))
        for begin in range(0, pg.num_nodes, step):
            same = np.array_equal(ours[begin : begin + step], theirs[original[begin : begin + step]])
            demand(same, f"{name} of nodes {begin}.. (new ids) differs from the source graph")
    if graph.node_ids is None or pg.node_ids is None:
        demand(graph.node_ids is pg.node_ids, "node ids are there in one graph only")
    else:
        demand(np.array_equal(pg.node_ids, graph.node_ids), "node ids differ from the source graph")
