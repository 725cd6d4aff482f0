"""The quality of a partition: numbers that predict what a run exchanges, and which ranks wait for others. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gemini_gnn.graph.sparse import SparseRows

CHUNK_EDGES = 1 << 22  # edges looked at in one go: 16-32 MB of scratch


@dataclass(frozen=True)
class Quality:
    """The quality of a partitioned graph.

    Attributes:
        edge_cut: share of the edges whose ends lie in different parts, 0..1.
        node_balance, edge_balance, seed_balance: largest part / mean part; 1.0 is perfect. Edges are in-edges of owned
            nodes, seeds are training nodes. 1.0 where there are none.
        nodes, edges, seeds: ``[parts]`` counts.
        halo: ``[parts]`` number of distinct remote in-neighbors of a part's nodes.
        replication: (nodes + halo nodes over all parts) / nodes: how often a feature row is needed on average when
            every part keeps the rows of its one-hop neighborhood.
        epoch_bytes: sum of ``halo`` times the (mean) bytes of a feature row: what crosses between parts when all nodes
            exchange their input features once with all neighbors. That is one layer of a full-batch epoch, and an upper
            bound for an epoch whose batches are cut so that no row is asked for twice. Mini-batches ask for popular
            rows once per batch; :func:`sampled_epoch_bytes` predicts those.
    """

    edge_cut: float
    node_balance: float
    edge_balance: float
    seed_balance: float
    nodes: list[int]
    edges: list[int]
    seeds: list[int]
    halo: list[int]
    replication: float
    epoch_bytes: int


def balance(counts: Sequence[int]) -> float:
    """Largest / mean; 1.0 for nothing at all."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else 1.0


def chunks(pointers: np.ndarray, begin: int, end: int, size: int = CHUNK_EDGES) -> Iterator[tuple[int, int]]:
    """Cut the columns ``begin..end`` of a CSC into runs of about ``size`` edges (at least one column each)."""
    while begin < end:
        stop = int(np.searchsorted(pointers, pointers[begin] + size, side="right")) - 1
        stop = min(max(stop, begin + 1), end)
        yield begin, stop
        begin = stop


def halo_of(begin: int, end: int, colptr: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, int]:
    """Remote in-neighbors of the nodes ``begin..end`` and the number of cut edges among their in-edges.

    Args:
        colptr: int64 ``[nodes + 1]``, row: ``[edges]`` new ids.

    Returns:
        ``(halo int64 ascending, cut edges)``.
    """
    needed = np.zeros(len(colptr) - 1, dtype=bool)
    cut = 0
    for first, last in chunks(colptr, begin, end):
        sources = row[colptr[first] : colptr[last]]
        remote = sources[(sources < begin) | (sources >= end)]
        cut += len(remote)
        needed[remote] = True
    return np.flatnonzero(needed), cut


def measure(
    bounds: np.ndarray,
    colptr: np.ndarray,
    train_mask: np.ndarray,
    halo_counts: Sequence[int],
    cut_edges: int,
    x: np.ndarray | SparseRows,
) -> Quality:
    """The :class:`Quality` of parts given by ``bounds`` int64 ``[parts + 1]`` over nodes in new order, with features ``x``."""
    nodes = np.diff(bounds).tolist()
    edges = np.diff(colptr[bounds]).tolist()
    seeds = [int(np.count_nonzero(train_mask[b:e])) for b, e in pairwise(bounds.tolist())]
    return Quality(
        edge_cut=cut_edges / max(int(colptr[-1]), 1),
        node_balance=balance(nodes),
        edge_balance=balance(edges),
        seed_balance=balance(seeds),
        nodes=nodes,
        edges=edges,
        seeds=seeds,
        halo=[int(h) for h in halo_counts],
        replication=(sum(nodes) + sum(halo_counts)) / sum(nodes),
        epoch_bytes=round(sum(halo_counts) * row_bytes(x)),
    )


def table(quality: Quality) -> str:
    """The quality as text: one line per part (the first eight), then the sums."""
    lines = [f"{'part':>6} {'nodes':>12} {'in-edges':>14} {'seeds':>10} {'halo':>12}"]
    rows = list(zip(quality.nodes, quality.edges, quality.seeds, quality.halo, strict=True))
    for p, (nodes, edges, seeds, halo) in enumerate(rows[:8]):
        lines.append(f"{p:>6} {nodes:>12,} {edges:>14,} {seeds:>10,} {halo:>12,}")
    if len(rows) > 8:
        lines.append(f"{'...':>6} ({len(rows) - 8} more)")
    lines.append(
        f"{'max/mean':>8} {quality.node_balance:>10.3f} {quality.edge_balance:>14.3f} {quality.seed_balance:>10.3f} "
        f"{balance(quality.halo):>12.3f}"
    )
    lines.append(
        f"edge cut {quality.edge_cut:.1%}, replication factor {quality.replication:.2f}, "
        f"features between parts {human_bytes(quality.epoch_bytes)} per full-batch epoch"
    )
    return "\n".join(lines)


def row_bytes(x: np.ndarray | SparseRows) -> float:
    """Bytes of a row; of sparse rows, which differ, the mean."""
    return x.nbytes / max(len(x), 1)


def described(x: np.ndarray | SparseRows) -> str:
    """Width, form and size of features in words."""
    if isinstance(x, SparseRows):
        size = f"sparse {human_bytes(x.nbytes)}, would be {human_bytes(x.dense_bytes)} dense"
    else:
        size = f"dense {human_bytes(x.nbytes)}"
    return f"{x.shape[1]:,} per node, {size}"


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def sampled_epoch_bytes(
    bounds: np.ndarray,
    colptr: np.ndarray,
    row: np.ndarray,
    train_mask: np.ndarray,
    fanouts: Sequence[int],
    batch_size: int,
    row_bytes: float,
) -> float:
    """Expected bytes of remote feature rows in one training epoch of sampled mini-batches.

    The access probabilities of SALIENT++ (Kaler et al., "Communication-Efficient Graph Neural Networks with
    Probabilistic Neighborhood Expansion Analysis and Caching", MLSys 2023): a seed of a part with s seeds is in a
    batch with probability batch/s; a node is drawn at the next hop with ``1 - prod(1 - min(1, fanout/degree(u)) p(u))``
    over the nodes u it points to. Rows are fetched once per batch, and nothing is cached. Draws of different u are
    taken as independent. Every node that may be on the destination side of a hop is drawn again at the next one.

    Args:
        bounds: int64 ``[parts + 1]``, colptr, row: in new ids, train_mask: bool ``[nodes]``.
        fanouts: hop 1 first, -1 for all. batch_size: seeds per part, -1 for all.
        row_bytes: of a feature row, on average.

    Returns:
        bytes, summed over the parts. Costs hops x parts passes over the edges.
    """
    n = len(colptr) - 1
    degree = np.diff(colptr)
    total = 0.0
    for begin, end in pairwise(bounds.tolist()):
        seeds = int(np.count_nonzero(train_mask[begin:end]))
        if seeds == 0:
            continue
        size = seeds if batch_size == -1 else min(batch_size, seeds)
        missed = np.zeros(n)  # log of the probability that a node is not among the inputs so far
        with np.errstate(divide="ignore"):
            missed[begin:end][train_mask[begin:end]] = np.log1p(-size / seeds)
        for fanout in fanouts:
            present = -np.expm1(missed)
            share = np.ones(n) if fanout == -1 else np.minimum(1.0, fanout / np.maximum(degree, 1))
            with np.errstate(divide="ignore"):
                log_not = np.log1p(-np.minimum(share * present, 1.0))
            new = missed.copy()
            for first, last in chunks(colptr, 0, n):
                sources = row[colptr[first] : colptr[last]]
                weight = np.repeat(log_not[first:last], degree[first:last])
                useful = weight < 0
                np.add.at(new, sources[useful], weight[useful])
            missed = new
        present = -np.expm1(missed)
        remote = present[:begin].sum() + present[end:].sum()
        total += float(remote) * row_bytes * -(-seeds // size)
    return total
